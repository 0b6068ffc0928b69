"""Kernels run in Triton's interpreter here, which must be asked for before triton is first imported.

The variable is set only while triton and the kernels are imported, so that no other test and no child process sees it.
`TRITON_INTERPRET=0 pytest -m gpu` leaves the compiler in place: the tests of a GPU need it, all others then skip.
"""

from __future__ import annotations

import importlib
import os
import sys

import pytest

from stepforge.kernels.launch import interpreted


def forget_triton() -> None:
    """As if triton had not been imported: torch's tracing does so when other tests are collected. What holds its old
    modules keeps them; the compiled part of triton stays, it cannot be loaded twice."""
    for name, module in list(sys.modules.items()):
        own = name.startswith("stepforge.kernels.") and (hasattr(module, "triton") or hasattr(module, "tl"))
        if own or (name.split(".")[0] == "triton" and not name.startswith("triton._C")):
            del sys.modules[name]


if os.environ.get("TRITON_INTERPRET", "1") == "1":
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules:
        forget_triton()
    importlib.import_module("triton.experimental.gluon")  # the interpreter's first launch does, and it looks too
    for name in ("bank", "conv", "gated", "lowrank", "norms", "sums", "update", "wide"):
        importlib.import_module(f"stepforge.kernels.{name}")

    if before is None:
        del os.environ["TRITON_INTERPRET"]


COMPILED = pytest.mark.skip(reason="needs Triton's interpreter: unset TRITON_INTERPRET")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not interpreted():
        for item in items:
            if "tests/kernels/" in item.path.as_posix() and not item.get_closest_marker("gpu"):
                item.add_marker(COMPILED)


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(5)


@pytest.fixture
def orders(monkeypatch):
    """Iterate over it: the interpreter runs the programs of a launch backwards, then interleaved from both ends."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forward = builder.set_grid_idx

    def each():
        for order in (lambda i, n: n - 1 - i, lambda i, n: i // 2 if i % 2 == 0 else n - 1 - i // 2):

            def shuffled(*at, order=order):
                forward(*(order(i, n) for i, n in zip(at, builder.grid_dim, strict=True)))

            with monkeypatch.context() as patch:
                patch.setattr(builder, "set_grid_idx", shuffled)
                yield

    return each()


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    """mutant(module, old, new): puts the Triton bodies of the module, with one text replaced, in place of its own."""
    import importlib.util
    from pathlib import Path

    def load(module, old, new):
        source = Path(module.__file__).read_text("utf-8")
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        file = tmp_path / f"mutant_{Path(module.__file__).name}"
        file.write_text(source.replace(old, new), "utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        changed = importlib.util.module_from_spec(spec)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(changed)
        monkeypatch.delenv("TRITON_INTERPRET")
        for name in [name for name in vars(changed) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, getattr(changed, name))

    return load
