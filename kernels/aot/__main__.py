"""`python -m stepforge.kernels.aot`"""

import sys

from stepforge.kernels.aot.main import main

sys.exit(main())
