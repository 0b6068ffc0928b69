"""Words and tables on standard output and standard error, whatever these are connected to."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from stepforge.runtime.files import printable

LONGEST = 1000  # letters of an error message


class Stream:
    """A text stream whose failure does not fail the command: once it is closed or full, nothing more is written to it.

    The work goes on when `head` has read enough. Lines are written as they come, letters that the stream has no code for as
    escapes.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.error: OSError | None = None
        if hasattr(inner, "reconfigure"):
            inner.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._inner.write(text)
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


def lost_output() -> str | None:
    """Why standard output was not written to its end; None if it was, or if its reader closed it."""
    error = getattr(sys.stdout, "error", None)
    return None if error is None or isinstance(error, BrokenPipeError) else str(error.strerror)


def complain(message: object) -> None:
    """One line on standard error."""
    if sys.stderr is not None:
        print(f"stepforge: {printable(message, LONGEST)}", file=sys.stderr)


def print_table(rows: list[dict[str, Any]], left: Sequence[str] = ()) -> None:
    """Rows with equal keys as a table on standard output; columns in `left` are aligned there."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    terminal = Console(markup=False)
    (terminal if terminal.is_terminal else Console(width=200, markup=False)).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{number:+.5g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else printable(value, 100)


@contextmanager
def progress_bar(label: str, total: Callable[[], int]) -> Iterator[Any]:
    """A bar on standard error, as a callback that takes what is done so far; None where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total())
        yield lambda done: bar.update(task, completed=done)
