"""Plans of the demo model, built by TensorRT for RTX without a GPU: `make test-engines`."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from stepforge.export.build import BankOptions, export_bundle
from stepforge.export.engines import build as building
from stepforge.export.engines.build import Order, build_plans
from stepforge.export.graph.rewire import Variants
from stepforge.runtime.backends.tensorrt import plans, step
from stepforge.runtime.backends.tensorrt.library import BuildOptions, Library
from stepforge.runtime.backends.tensorrt.profiles import Use, profiles
from stepforge.runtime.bundle import UNET, ComponentId, read
from stepforge.runtime.cli.main import main
from stepforge.runtime.errors import BackendError

EMOJI = Path(__file__).resolve().parents[3] / "examples/emoji"
TARGETS = ("sm_86", "sm_89", "sm_120")
HINT = ComponentId("control_hint", "silhouette")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed: make test-engines"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """LoRA banks, a ControlNet, both reuse variants, and super-resolution. STEPFORGE_TEST_DEMO names one exported before."""
    if stated := os.environ.get("STEPFORGE_TEST_DEMO"):
        return read(stated)
    out = tmp_path_factory.mktemp("demo") / "emoji.bundle"
    return export_bundle(
        EMOJI / "model", out, name="emoji", precision="fp16", bank=BankOptions(6, 16), reuse=Variants(0, True),
        controls={"silhouette": EMOJI / "control/silhouette"}, upscalers={"sr": EMOJI / "sr"},
    )  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPFORGE_PLANS", str(tmp_path / "plans"))
    return tmp_path / "plans"


def order(bundle, precision="fp16", *, rows=("1..4",), size="64..128", **options):
    options = {"targets": TARGETS, **options}
    return Order("tensorrt-rtx", precision, Use.parse(bundle, rows, size), BuildOptions(**options))


def test_every_component_of_the_demo_builds(demo, place):
    """For three kinds of desktop GPUs, with dynamic rows and sizes: what the engine takes and computes in is what was meant."""
    told, parts = set(), {f"step/{name}" for name in step.NAMES}
    asked = order(demo)
    for built in build_plans(demo, asked, progress=lambda name, *_: told.add(name)):
        card, component = built.plan.card, built.component
        if component in parts:
            assert set(card.inputs.values()) | set(card.outputs.values()) <= {"float32", "int64"}
            continue
        entry = demo.components[component]
        precision = "fp32" if component.role == "text_encoder" else "fp16"
        low = {"fp32": "float32", "fp16": "float16"}[precision]
        assert built.is_new
        assert (card.precision, card.targets, card.gpu) == (precision, TARGETS, "")
        assert card.profiles == profiles(demo, component, asked.use)
        assert card.inputs == {t.name: low if ".lora_" in t.name else t.dtype for t in entry.inputs}
        assert card.outputs == {t.name: "float32" for t in entry.outputs}
        if entry.bank is not None and not component.variant:
            pairs = [name for name in card.inputs if ".lora_" in name]
            assert len([n for n in pairs if n.endswith(".lora_B")]) == len(entry.bank.targets)
        for kind in ("CONVOLUTION", "MATRIX_MULTIPLY", "SOFTMAX"):
            assert {key for key in card.layers if key.startswith(f"{kind} ")} <= {f"{kind} {low}"}, component
        assert {key for key in card.layers if key.startswith("NORMALIZATION")} <= {"NORMALIZATION float32"}, component
        assert len(built.plan.data()) == card.bytes > 1000
    assert told == {str(component) for component in demo.components} | parts
    assert not list(place.glob("*/.private-*"))
    again = list(build_plans(demo, asked))
    assert not any(built.is_new for built in again)
    machine = plans.Machine("tensorrt-rtx", Library("tensorrt-rtx").version, "sm_89", "any")
    assert plans.usable(demo, UNET, machine, "fp16")
    for other, why in (({"capability": "sm_90"}, "built for sm_86, sm_89, sm_120"), ({"version": "1.8.0"}, "built by")):
        with pytest.raises(BackendError, match=why):
            plans.usable(demo, UNET, replace(machine, **other), "fp16")


def run(arguments):
    """The command line's exit code."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_the_command(demo, place, capsys):
    arguments = [
        "build",
        str(demo.path),
        "--engine",
        "tensorrt-rtx",
        "--target",
        "sm_89",
        "--component",
        str(HINT),
        "--json",
    ]
    for is_new in (True, False):
        assert run([*arguments, "--precision", "bf16", "--rows", "1..2"]) in (0, None)
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["component"], found["is_new"], found["precision"]) == (str(HINT), is_new, "bf16")
    assert run(["info", str(demo.path)]) in (0, None)
    assert re.search(r"plan control/silhouette/hint: tensorrt-rtx \S+ bf16 for sm_89, up to", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("sm_90",)}, "does not build for sm_90: choose of sm_75, sm_80"),
        ({"version_compatible": True}, "has no version-compatible plans"),
        ({"hardware_compatible": True}, "takes targets in place of"),
        ({"strip_weights": True}, "builds plans without weights for one target at a time"),
        # 1.7.1 generates code for plans without weights on a GPU alone
        (
            {"strip_weights": True, "targets": ("sm_89",)},
            r"building control/silhouette/hint failed \(exit code 1\): .*cannot build",
        ),
        ({"targets": ()}, "there is no NVIDIA GPU to build for; give --target"),
    ],
)
def test_what_cannot_be_built_is_one_line(demo, place, options, message):
    if options == {"targets": ()} and building.first_gpu() is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=message) as caught:
        list(build_plans(demo, order(demo, **options), [HINT]))
    assert "\n" not in str(caught.value)
    assert not [path for path in place.glob("*/*") if not path.name.endswith(".lock")]


def test_no_parser_sees_a_graph_that_is_not_checked(demo, place, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(demo.path, folder)
    bundle = replace(demo, path=folder)
    graph = folder / demo.components[HINT].graph
    graph.write_bytes(graph.read_bytes().replace(b"Conv", b"Loop"))
    monkeypatch.setattr(building, "_run", lambda *_: pytest.fail("a worker was started"))
    with pytest.raises(BackendError, match="operator 'Loop' is none that bundles have"):
        list(build_plans(bundle, order(demo), [HINT]))


def test_builders_share_the_work_and_a_killed_one_leaves_nothing(demo, place, monkeypatch):
    asked, found = order(demo), []

    def work():
        found.extend(built.is_new for built in build_plans(demo, asked, [HINT]))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, False, True]
    [plan] = plans.plans(demo, HINT)
    file = plan.folder / plans.PLAN
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    assert [built.is_new for built in build_plans(demo, asked, [HINT])] == [True], "what is damaged is built anew"
    check_what_the_library_refuses(file.read_bytes())

    popen = subprocess.Popen

    def killed(*arguments, **options):
        child = popen(*arguments, **options)
        child.send_signal(signal.SIGKILL)
        return child

    monkeypatch.setattr(building.subprocess, "Popen", killed)
    with pytest.raises(BackendError, match=r"building control/silhouette/hint failed \(signal 9\)"):
        list(build_plans(demo, order(demo, "bf16"), [HINT]))
    assert not list(place.glob("*/.private-*"))


def check_what_the_library_refuses(plan):
    """Plans whose card was made to fit as well: the library gives no engine. Of the whole one it says nothing but that CUDA
    is missing."""
    module = Library("tensorrt-rtx").module

    class Logger(module.ILogger):
        def __init__(self):
            module.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, text):
            self.lines.append(text)

    logger = Logger()
    runtime = module.Runtime(logger)
    broken = bytearray(plan)
    broken[10] ^= 255
    for data in (bytes(broken), b"not a plan" * 99, plan[:99]):
        logger.lines.clear()
        assert runtime.deserialize_cuda_engine(data) is None
        assert any("Serialization" in line for line in logger.lines), logger.lines
    logger.lines.clear()
    engine = runtime.deserialize_cuda_engine(plan)
    assert not any("Serialization" in line for line in logger.lines), logger.lines
    assert (engine is None) == (building.first_gpu() is None)


def test_types_against_the_real_bindings(tmp_path):
    """mypy over what calls the package, with stubs of the package itself."""
    root = EMOJI.parents[1]
    code = "from mypy.stubgen import main; main()"
    package = "tensorrt_rtx_bindings"
    subprocess.run([sys.executable, "-c", code, "-q", "-p", package, "-o", str(tmp_path)], check=True)
    stub = tmp_path / package / "tensorrt_rtx.pyi"
    lines = stub.read_text("utf-8").splitlines()
    while True:  # stubgen copies signatures of docstrings, some of which are no Python
        try:
            ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            lines[error.lineno - 1] = re.sub(r"\(.*\)", "(*args, **kwargs)", lines[error.lineno - 1])
    stub.write_text("\n".join(lines), "utf-8")
    (tmp_path / "tensorrt_rtx.pyi").write_text(f"from {package}.tensorrt_rtx import *\n", "utf-8")
    source = (root / "runtime/backends/tensorrt/library.py").read_text("utf-8")
    assert complaints(source, tmp_path) == []
    for right, wrong in (("set_compute_capability", "set_capability"), ("parser.num_errors", "parser.errors")):
        assert len(complaints(source.replace(right, wrong), tmp_path)) == 1, wrong


def complaints(source, folder):
    """What mypy says of a module, with the stubs in `folder`; not what it says of these."""
    (folder / "checked.py").write_text(source, "utf-8")
    options = ["--follow-imports=silent", "--no-error-summary", "--config-file=", "--ignore-missing-imports"]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(folder / "cache"), str(folder / "checked.py")]
    environment = {**os.environ, "MYPYPATH": str(folder)}
    done = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line.startswith("checked.py") and ": error:" in line]
