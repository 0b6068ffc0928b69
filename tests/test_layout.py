"""The architecture, held by tests: arrows one way, no torch at run time, file sizes, public names."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "runtime", "export")
RUNTIME_IMPORTS = {"numpy", "PIL", "tokenizers", "safetensors", "typer", "rich", "stepforge"}
BACKEND_IMPORTS = RUNTIME_IMPORTS | {"openvino", "onnxruntime"}
TORCH_IMPORTS = RUNTIME_IMPORTS | {"torch", "onnx"}  # runtime/backends/torch/
BUDGET = 400  # lines a file
LONGER = {
    "runtime/samplers.py": "one table of samplers, and what turns a request into its row of it",
    "runtime/cli.py": "five commands of declarations",
}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_left(room):
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for path in (ROOT / room).rglob("*.py"):
        for name in imports(path):
            if name.startswith("stepforge."):
                assert name.split(".")[1] in allowed, f"{path} imports {name}"


def test_runtime_imports_only_what_it_may():
    for path in (ROOT / "runtime").rglob("*.py"):
        allowed = BACKEND_IMPORTS if path.parent.name == "backends" or path.name == "doctor.py" else RUNTIME_IMPORTS
        if path.parent == ROOT / "runtime/backends/torch":
            allowed = TORCH_IMPORTS
        if path.name == "preprocess.py":
            allowed = allowed | {"cv2"}  # Canny, when asked for
        for name in imports(path):
            root = name.split(".")[0]
            assert root in allowed or root in sys.stdlib_module_names, f"{path} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_not_top_level(room):
    spec = importlib.util.find_spec(room)
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_generation_leaves_torch_alone(tmp_path):
    code = (
        "import sys; from stepforge.runtime import Request, load\n"
        "with load('fake') as engine: engine.generate(Request(prompt='x', steps=2))\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'openvino', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_files_are_small():
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= BUDGET or name in LONGER, f"{name} has {lines} lines"


def test_public_names_exist():
    import stepforge.runtime as runtime

    assert runtime.__all__ == sorted(runtime.__all__, key=lambda name: (name[0].islower(), name))
    for name in runtime.__all__:
        assert hasattr(runtime, name)


def test_architecture_names_every_file():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py") and "backends" not in path.parts:
                assert path.name in text, f"ARCHITECTURE.md does not mention {path.relative_to(ROOT)}"


def test_importing_does_nothing(tmp_path):
    """Every module imports in a bare folder and leaves it empty."""
    names = [
        ".".join(["stepforge", room, *path.relative_to(ROOT / room).with_suffix("").parts])
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    ]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
