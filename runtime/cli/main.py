"""The command line: `stepforge generate | upscale | batch | serve | bench | plan | info | doctor | tune | triton | lora | ...`.

Commands only read arguments, call the rooms and print. Commands of the offline room join through the entry point group
`stepforge.commands`; `lora.convert` there is the command `convert` of the group `lora`. Exit codes: 0 done, 1 it ran and
failed, 2 the arguments were wrong, 130 interrupted, 143 terminated. User errors print one line, never a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points, version
from typing import Annotated, Any

import typer

from stepforge.runtime.cli.bench import bench
from stepforge.runtime.cli.doctor import doctor
from stepforge.runtime.cli.generate import generate
from stepforge.runtime.cli.info import info
from stepforge.runtime.cli.lora import lora
from stepforge.runtime.cli.output import complain, lost_output, quiet, streams
from stepforge.runtime.cli.plan import plan
from stepforge.runtime.cli.serving.batch import batch
from stepforge.runtime.cli.serving.serve import serve
from stepforge.runtime.cli.serving.triton import triton
from stepforge.runtime.cli.signals import Stopped, leave, on_signal
from stepforge.runtime.cli.tune import tune
from stepforge.runtime.cli.upscale import upscale
from stepforge.runtime.errors import RequestError, StepforgeError

INTERRUPTED = 130

app = typer.Typer(
    help="Compile text-to-image diffusion models into bundles of engine graphs, and run them without torch.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(upscale)
app.command(short_help="Draw a manifest of jobs, resumable.")(batch)
app.command(short_help="Answer HTTP with images: OpenAI's image API.")(serve)
app.command(short_help="Say how fast a bundle draws on this machine.")(bench)
app.command()(plan)
app.command()(info)
app.command()(doctor)
app.command(short_help="Find a cheaper plan and keep it as a preset.")(tune)
app.command(short_help="Write a model repository for NVIDIA Triton.")(triton)
app.add_typer(lora, name="lora")


@app.callback(invoke_without_command=True)
def root(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(version("stepforge"))
        raise typer.Exit


@cache
def command() -> Any:
    """The command line with what joined it."""
    for entry in entry_points(group="stepforge.commands"):
        group, _, name = entry.name.rpartition(".")
        (lora if group == "lora" else app).command(name)(entry.load())
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    with streams():
        try:
            with on_signal(leave), quiet():
                code = run(arguments)
        except Stopped as stopped:
            complain(stopped.text)
            code = int(stopped.code or 0)
        if sys.stdout is not None:
            sys.stdout.flush()
        if (reason := lost_output()) is not None:
            complain(f"cannot write to standard output: {reason}")
            code = code or 1
        sys.exit(code)


def run(arguments: Sequence[str] | None) -> int:
    """Run a command; what the user can mend becomes one line on standard error. Returns the exit code."""
    try:
        code = command().main(args=arguments, prog_name="stepforge", standalone_mode=False)
        if code == INTERRUPTED:  # typer's, for a KeyboardInterrupt
            complain("interrupted")
        return code if isinstance(code, int) else 0
    except StepforgeError as error:
        complain(error)
        return 2 if isinstance(error, RequestError) else 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("stepforge"):
            raise
        complain(f"this command needs the package {error.name}; pip install 'stepforge[export]'")
    except MemoryError:
        complain("out of memory; ask for smaller or fewer images at a time, or close other programs")
    except OSError as error:
        complain(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        complain(error.format_message())  # a usage error of typer's
        return int(getattr(error, "exit_code", 2))
    return 1
