"""`python -m stepforge.runtime` is the `stepforge` command."""

from stepforge.runtime.cli import start

start()
