"""A batch's worker on Ray: an engine in an actor, which writes what it draws into the batch's folder."""

from __future__ import annotations

import asyncio
import platform
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepforge.runtime.errors import Cancelled, RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.serve.draw import Encoding, Ended, EngineDrawer, Task
from stepforge.runtime.serve.store import Files

STOPPED = "the batch was stopped"
WRITTEN = "written"  # key of a file's name so far


@dataclass(frozen=True, slots=True)
class Setup:
    """What each worker loads, and where it writes. Paths are absolute: the folder is shared by all nodes."""

    bundle: str  # path on every node, or "fake"
    options: Mapping[str, Any]  # further arguments of `load`
    adapters: Mapping[str, str]  # name -> file
    files: Files
    encoding: Encoding


def setup(
    bundle: Path, options: Mapping[str, Any], adapters: Mapping[str, Path], files: Files, encoding: Encoding
) -> Setup:
    """With the paths that this process sees as absolute ones."""
    found = {name: str(file.absolute()) for name, file in adapters.items()}
    path = str(bundle) if str(bundle) == "fake" else str(bundle.absolute())
    return Setup(path, options, found, Files(files.partial.absolute(), files.ending), encoding)


class OwnFiles(Files):
    """Files of one worker among several, under names that no other uses: a worker that is thought dead may still write while
    another draws its jobs again, or a later run does. The driver gives them the names that `Store.publish` looks for."""

    def write(self, name: str, data: bytes, about: Mapping[str, Any]) -> dict[str, Any]:
        stored = super().write(f"{secrets.token_hex(8)}.{name}", data, about)
        return {**stored, "name": name, WRITTEN: stored["name"]}


def take_over(files: Files, ended: Ended | None) -> Ended:
    """What a worker gave, its files under their own names. Raises OSError, and Cancelled for a job that `stop` ended."""
    if ended is None:
        raise Cancelled(STOPPED)
    for file in ended.record.get("files", ()):
        (files.partial / file.pop(WRITTEN)).replace(files.partial / file["name"])
    return ended


class Worker:
    """The actor. Its methods are asynchronous, so that many jobs are in its engine at a time."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._drawer: EngineDrawer | None = None

    async def load(self) -> Mapping[str, Any]:
        """Start the engine; what decides its pictures beside requests. Raises StepforgeError."""
        self._drawer = await asyncio.to_thread(self._load)
        return self._drawer.facts

    async def draw(self, task: Task) -> Ended | None:
        """Draw a job and write its images; None if `stop` ended it. Raises what else the future of `Drawer.submit` does."""
        assert self._drawer is not None
        try:
            return await asyncio.wrap_future(self._drawer.submit(task))
        except Cancelled:  # Ray would take it for a call that its caller has cancelled
            return None

    async def stop(self) -> None:
        """Stop after the current step."""
        if self._drawer is not None:
            await asyncio.to_thread(self._drawer.stop)

    def _load(self) -> EngineDrawer:
        from stepforge.runtime.load import load

        setup = self._setup
        if not Path(setup.files.partial).is_dir():
            raise RequestError(
                f"node {platform.node()} does not see {printable(setup.files.partial.parent.parent)}; "
                "a batch on several nodes needs a folder that all of them share"
            )
        engine = load(setup.bundle, **setup.options)
        for name, file in setup.adapters.items():
            engine.adapters.load(name, file)
        return EngineDrawer(engine, OwnFiles(setup.files.partial, setup.files.ending), setup.encoding)
