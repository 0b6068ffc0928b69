"""The command line: one file a command, and what they share."""

from __future__ import annotations

import sys


def start() -> None:
    """The console script. Ctrl-C shows no traceback while the commands are still being imported, either."""
    try:
        from stepforge.runtime.cli.main import main
    except KeyboardInterrupt:
        print("stepforge: interrupted", file=sys.stderr)
        sys.exit(130)
    main()
