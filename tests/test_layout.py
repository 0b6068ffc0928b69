"""The architecture, held by tests: arrows one way between rooms and between floors, no torch at run time, small files."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "runtime", "export")
# Packages and modules of a room, ground floor first: each imports those that stand before it, never one behind it.
FLOORS = {
    "runtime": (
        "arrays", "errors", "files", "checks", "grammar", "bundle", "plan", "imaging", "lora", "request", "backends",
        "engine", "load", "serve", "tune", "cli", "__main__",
    ),
    "export": (
        "oracle", "models", "memory", "lora", "graph", "parts", "publish", "stages", "expert_source", "experts", "build",
        "engines", "parity", "int8", "cli",
    ),
}  # fmt: skip
RUNTIME_IMPORTS = {"numpy", "ml_dtypes", "PIL", "tokenizers", "safetensors", "typer", "rich", "stepforge"}
ALSO = {  # beside those, by folder or file of runtime/
    "backends/openvino.py": {"openvino"},
    "backends/onnxruntime": {"onnxruntime"},
    "backends/torch": {"torch", "onnx"},
    "backends/tensorrt": {"tensorrt_rtx", "cuda"},  # the former for type checkers; the latter when a backend is opened
    "lora/onnx_adapter.py": {"onnxruntime"},
    "cli/doctor.py": {"openvino"},
    "imaging/preprocess.py": {"cv2"},  # Canny, when asked for
    "serve/http": {"fastapi", "starlette", "uvicorn", "prometheus_client"},
    "tune/plot.py": {"matplotlib"},  # when asked for
    "serve/ray": {"ray"},  # when asked for
    "serve/triton": {"triton_python_backend_utils"},  # Triton's own, inside its Python backend
}
BUDGET = 400  # lines a file
ENTRIES = 16  # a folder of code
PYTHONS = ("__pycache__", "py.typed", "__init__.py", "__main__.py")  # entries whose names are not ours


def imports(path: Path, *, types: bool = True) -> Iterator[str]:
    """Modules that a file imports; types: also those that only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not types and id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_to_their_left(room):
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for path in sources(room):
        for name in imports(path):
            assert name != "stepforge", f"{path} imports the face"
            if name.startswith("stepforge."):
                assert name.split(".")[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("room", FLOORS)
def test_floors_import_downwards(room):
    floors = FLOORS[room]
    for path in sources(room):
        own = path.relative_to(ROOT / room).with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in floors, f"{path} stands on no floor; name it in FLOORS"
        for name in imports(path, types=False):
            if name.startswith(f"stepforge.{room}."):
                other = name.split(".")[2]
                assert floors.index(other) <= floors.index(own), f"{path} imports {name} from a higher floor"


def test_modules_of_a_package_import_in_no_circle():
    for room in ROOMS:
        arrows = {}
        for path in sources(room):
            module = ".".join(["stepforge", room, *path.relative_to(ROOT / room).with_suffix("").parts])
            arrows[module.removesuffix(".__init__")] = set(imports(path, types=False))
        names = set(arrows)
        for module, found in arrows.items():
            homes = {name if name in names else name.rpartition(".")[0] for name in found}
            arrows[module] = homes & names - {module}
        while leaves := [module for module, found in arrows.items() if not found & arrows.keys()]:
            for module in leaves:
                del arrows[module]
        assert not arrows, f"imports in a circle: {sorted(arrows)}"


def test_runtime_imports_only_what_it_may():
    for path in sources("runtime"):
        relative = path.relative_to(ROOT / "runtime").as_posix()
        allowed = RUNTIME_IMPORTS.union(*(more for place, more in ALSO.items() if relative.startswith(place)))
        for name in imports(path):
            root = name.split(".")[0]
            assert root in allowed or root in sys.stdlib_module_names, f"{path} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_not_top_level(room):
    spec = importlib.util.find_spec(room)
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_generation_leaves_torch_alone(tmp_path):
    code = (
        "import sys, stepforge\n"
        "with stepforge.load('fake') as engine: engine.generate(stepforge.Request(prompt='x', steps=2))\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'openvino', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_files_and_folders_are_small():
    for room in ROOMS:
        for path in sources(room):
            name = path.relative_to(ROOT).as_posix()
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= BUDGET, f"{name} has {lines} lines"
        for folder in {path.parent for path in sources(room)}:
            entries = [e.name for e in folder.iterdir() if e.name not in PYTHONS]
            assert len(entries) <= ENTRIES, f"{folder.relative_to(ROOT)} has {len(entries)} entries"


def test_public_names_exist():
    import stepforge

    assert stepforge.__all__ == sorted(stepforge.__all__, key=lambda name: (name.strip("_")[0].islower(), name))
    for name in stepforge.__all__:
        assert hasattr(stepforge, name)


def test_tests_mirror_the_rooms():
    for room in ROOMS:
        for folder in (ROOT / "tests" / room).rglob("*/"):
            if folder.name not in ("__pycache__", "data"):
                relative = folder.relative_to(ROOT / "tests")
                assert (ROOT / relative).is_dir(), f"tests/{relative} mirrors no package"


def test_architecture_names_every_file():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for room in ROOMS:
        for path in sources(room):
            if path.name not in ("__init__.py", "__main__.py"):
                assert path.name in text, f"ARCHITECTURE.md does not mention {path.relative_to(ROOT)}"


@pytest.mark.long  # a process that imports torch, diffusers and Triton
def test_importing_does_nothing(tmp_path):
    """Every module imports in a bare folder and leaves it empty."""
    names = [
        ".".join(["stepforge", room, *path.relative_to(ROOT / room).with_suffix("").parts])
        for room in ROOMS
        for path in sources(room)
        if path.name not in ("__init__.py", "__main__.py")
    ]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def bound(path: Path) -> set[str]:
    """Names at the top level of a module, and the modules of a package."""
    names = {entry.stem for entry in path.parent.iterdir()} if path.name == "__init__.py" else set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # the face's names are keys of its table
    return names


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_scripts_import_what_there_is(folder):
    """Nothing else runs or type-checks all of them."""
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "stepforge":
                continue
            parts = node.module.split(".")
            place = ROOT.joinpath(*(parts[1:] or parts))
            module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            assert module.is_file(), f"{path.name} imports {node.module}"
            for alias in node.names:
                assert alias.name in bound(module), f"{path.name} imports {alias.name} from {node.module}"
