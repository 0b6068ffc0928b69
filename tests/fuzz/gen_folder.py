"""Bundle folders with missing, further, linked, changed and strange files: `read` and `doctor`."""

import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gen_manifest import full_bundle
from mutate import flipped

from stepforge.runtime.bundle import MANIFEST, Bundle, read
from stepforge.runtime.errors import BundleError

ERRORS = (BundleError,)
QUICK, SOAK = 40, 600


def start(folder: Path) -> tuple[Path, Bundle]:
    full_bundle(folder / "pristine")
    return folder, read(folder / "pristine")


def case(rng: random.Random, base: Any) -> tuple[str, int]:
    """Names of what is done, and a seed for it."""
    names = [rng.choice(list(CHANGES)) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return " ".join(names), rng.randrange(1 << 30)


def check(case: tuple[str, int], base: tuple[Path, Bundle]) -> None:
    names, seed = case
    folder, pristine = base
    path, rng = folder / "bundle", random.Random(seed)
    shutil.copytree(folder / "pristine", path)
    try:
        harmless = True
        for name in names.split():
            try:
                CHANGES[name](path, rng)
            except (OSError, IndexError):  # one change took the place of another
                continue
            harmless = harmless and name in HARMLESS
        bundle = read(path)
        assert harmless, "a changed folder was read"
        assert bundle.digest == pristine.digest
    finally:
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def files(path: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink()))


def content(path: Path, rng: random.Random) -> Path:
    """A file that is not the manifest."""
    return rng.choice(sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST))


def missing(path: Path, rng: random.Random) -> None:
    files(path, rng).unlink()


def missing_folder(path: Path, rng: random.Random) -> None:
    shutil.rmtree(rng.choice([folder for folder in path.iterdir() if folder.is_dir()]))


def further(path: Path, rng: random.Random) -> None:
    names = (
        "run.py",
        "model.pkl",
        ".hidden",
        "a\nb",
        "\x1b[2J",
        "é",
        "x" * 255,
        "bundle.json.bak",
        "Bundle.json",
        "-rf",
        "\u202e",
    )
    (files(path, rng).parent / rng.choice(names)).write_bytes(b"x")


def changed(path: Path, rng: random.Random) -> None:
    file = content(path, rng)
    if file.stat().st_size > 1 << 24:
        raise OSError("sparse by a change before")
    data = file.read_bytes()
    file.write_bytes(new if (new := flipped(data, rng)) != data else data + b"x")


def longer(path: Path, rng: random.Random) -> None:
    with content(path, rng).open("ab") as file:
        file.write(b"x")


def sparse(path: Path, rng: random.Random) -> None:
    """Terabytes that take no room."""
    os.truncate(files(path, rng), 1 << rng.choice((33, 42)))


def link_outside(path: Path, rng: random.Random) -> None:
    file = files(path, rng)
    file.unlink()
    file.symlink_to(path.parents[1] / "outside" / "secret")


def link_inside(path: Path, rng: random.Random) -> None:
    file = files(path, rng)
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


def link_loop(path: Path, rng: random.Random) -> None:
    file = files(path, rng)
    if rng.random() < 0.5:
        file.unlink()
    else:
        file = file.with_name("loop")
    file.symlink_to(file.name)


def linked_folder(path: Path, rng: random.Random) -> None:
    folder = rng.choice([folder for folder in path.iterdir() if folder.is_dir()])
    folder.rename(path.parent / "elsewhere")
    folder.symlink_to(path.parent / "elsewhere")
    shutil.rmtree(path.parent / "elsewhere")


def fifo(path: Path, rng: random.Random) -> None:
    file = files(path, rng)
    if rng.random() < 0.6:
        file.unlink()
    else:
        file = file.with_name("fifo")
    os.mkfifo(file)


def a_socket(path: Path, rng: random.Random) -> None:
    file = files(path, rng)
    file.unlink()
    here = os.getcwd()
    os.chdir(file.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(file.name)
    finally:
        os.chdir(here)


def folder_for_file(path: Path, rng: random.Random) -> None:
    file = files(path, rng)
    file.unlink()
    file.mkdir()


def file_for_folder(path: Path, rng: random.Random) -> None:
    folder = rng.choice([folder for folder in path.iterdir() if folder.is_dir()])
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def many(path: Path, rng: random.Random) -> None:
    for index in range(rng.choice((10, 300))):
        (path / f"f{index}").touch()


def deep(path: Path, rng: random.Random) -> None:
    place = path
    for _ in range(200):
        place /= "d" * 10
    place.mkdir(parents=True)


def gone(path: Path, rng: random.Random) -> None:
    shutil.rmtree(path)
    if rng.random() < 0.7:
        path.write_bytes(rng.choice((b"", b"{}", b"PK\3\4")))


def partial_manifest(path: Path, rng: random.Random) -> None:
    """What a killed writer leaves: nobody reads it."""
    (path / f".{rng.getrandbits(64):016x}.tmp").write_bytes(b"{")


def empty_folder(path: Path, rng: random.Random) -> None:
    (path / "empty").mkdir()


def touched(path: Path, rng: random.Random) -> None:
    os.utime(files(path, rng), (0, 0))


HARMLESS = ("partial_manifest", "empty_folder", "touched", "deep")
CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    change.__name__: change
    for change in (
        missing, missing_folder, further, changed, longer, sparse, link_outside, link_inside, link_loop, linked_folder,
        fifo, a_socket, folder_for_file, file_for_folder, many, deep, gone, partial_manifest, empty_folder, touched,
    )
}  # fmt: skip
