"""Words and tables on standard output and standard error, whatever these are connected to."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from stepforge.runtime.files import escaped, printable

GAP = "  "  # between columns
LONGEST = 1000  # letters of an error message


class Stream:
    """A text stream whose failure does not fail the command: once it is closed or full, nothing more is written to it.

    The work goes on when `head` has read enough. Lines are written as they come, control characters and letters that the
    stream has no code for as escapes: names in files must not command the terminal.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.raw = inner  # stream for what draws on the terminal
        self.error: OSError | None = None
        if hasattr(inner, "reconfigure"):
            inner.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                start = "\r" if text.startswith("\r") else ""  # tqdm's bars, of libraries
                self._inner.write(start + escaped(text.removeprefix(start)))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._inner.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.error = error
        with suppress(OSError, ValueError):  # what its buffer holds would fail again when the interpreter exits
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._inner.fileno())
            os.close(null)


@contextmanager
def streams() -> Iterator[None]:
    """Standard output and error as `Stream`; where the process has none (`>&-`), there is nothing to guard."""
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = Stream(sys.stdout)  # type: ignore[assignment]
    if sys.stderr is not None:
        sys.stderr = Stream(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Warnings(logging.Handler):
    """Warnings of ours, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a wrong format string must not end a command
            complain(f"warning: {record.getMessage()}")


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of stepforge's loggers go to standard error in the words of the commands; other libraries' logs and Python
    warnings (NumPy's of overflows, torch's of its exporter) go nowhere, unless -W or PYTHONWARNINGS asks for these."""
    ours, root = logging.getLogger("stepforge"), logging.getLogger()
    handler, nothing = _Warnings(logging.WARNING), logging.NullHandler()
    ours.addHandler(handler)
    root.addHandler(nothing)  # logging's last resort prints what has no handler
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        ours.removeHandler(handler)
        root.removeHandler(nothing)


def lost_output() -> str | None:
    """Why standard output was not written to its end; None if it was, or if its reader closed it."""
    error = getattr(sys.stdout, "error", None)
    return None if error is None or isinstance(error, BrokenPipeError) else str(error.strerror)


def complain(message: object) -> None:
    """One line on standard error."""
    if sys.stderr is not None:
        print(f"stepforge: {printable(message, LONGEST)}", file=sys.stderr)


def print_table(rows: list[dict[str, Any]], left: Sequence[str] = ()) -> None:
    """Rows with equal keys as a table on standard output; columns in `left` are aligned there.

    Plain text, 200 letters wide where that is no terminal. Not rich's table, whose time is felt at tens of thousands of rows.
    """
    from rich.cells import cell_len
    from rich.console import Console

    names = list(rows[0])
    lines = [names, *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    console = Console()
    room = (console.width if console.is_terminal else 200) - len(GAP) * (len(names) - 1)
    while sum(widths) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    for line in lines:
        cells = [_fitted(text, width, name in left) for text, width, name in zip(line, widths, names, strict=True)]
        print(GAP.join(cells).rstrip())


def _fitted(text: str, width: int, left: bool) -> str:
    """The text at one side of its cell, cut where it is too wide."""
    from rich.cells import cell_len, set_cell_size

    if (taken := cell_len(text)) > width:
        return set_cell_size(text, width - 1) + "…"
    spaces = " " * (width - taken)
    return text + spaces if left else spaces + text


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{number:+.5g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else printable(value, 100)


@contextmanager
def progress_bar(label: str, total: Callable[[], int]) -> Iterator[Any]:
    """A bar on standard error, as a callback that takes what is done so far; None where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=getattr(sys.stderr, "raw", sys.stderr))
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total())
        yield lambda done: bar.update(task, completed=done)
