"""What SECURITY.md says is never done, seen by the interpreter's audit events; and that the page names tests that exist."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WATCH = """
import sys
forbidden = ("socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "os.system",
             "subprocess.Popen", "os.exec")
def watch(event, args):
    code = event == "open" and args[1] != "w" and str(args[0]).startswith(FOLDER) and str(args[0]).endswith((".py", ".pyc"))
    if event in forbidden or code:
        print("FORBIDDEN", event, args, file=sys.stderr, flush=True)
        import os
        os._exit(9)
"""


def watched(code: str, folder: Path) -> None:
    """Run code in a process that ends at once when it does what is never done."""
    done = subprocess.run(
        [sys.executable, "-c", f"FOLDER = {str(folder)!r}\n{WATCH}\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_watch_sees(tmp_path):
    for deed in (
        "import pickle; pickle.loads(pickle.dumps(print))",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
    ):
        with pytest.raises(AssertionError, match="FORBIDDEN"):
            watched(f"sys.addaudithook(watch)\n{deed}", tmp_path)


def test_commands_use_no_network_and_no_pickle(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "x.py").write_text("raise SystemExit(7)")
    watched(
        f"""
from stepforge.runtime.cli.main import run
import stepforge.runtime.engine.engine
sys.addaudithook(watch)
assert run(["generate", "fake", "x", "-n", "1", "--width", "64", "--height", "64", "-o", {str(tmp_path / "a.png")!r}]) == 0
assert run(["lora", "inspect", {str(tmp_path)!r}]) == 1
assert run(["plan", "fake"]) == 0
""",
        tmp_path,
    )


def test_onnxruntime_uploads_nothing():
    """Its threads would not show in the interpreter's events. The variable counts when the library is first imported."""
    code = "import os, stepforge.runtime.backends.onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    plain = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for given, found in ((plain, "1"), ({**plain, "ORT_DISABLE_TELEMETRY": "0"}, "0")):
        assert subprocess.check_output([sys.executable, "-c", code], env=given, text=True).strip() == found


def test_openvino_reports_nothing(tmp_path):
    """Its report is sent by a process of its own, which an audit hook of this one does not see; that it is made, it does."""
    code = """
import sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(("os.fork", "socket.", "subprocess.")) else None)
import stepforge.runtime.backends.openvino, openvino
print(seen, callable(openvino.convert_model))
"""
    at_home = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # no CI variable, where it would not report
    told = subprocess.check_output([sys.executable, "-c", code], env=at_home, text=True)
    assert told.split() == ["[]", "True"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.long  # a process with torch; export/models/test_hostile.py has the refusals, the test above the watch
def test_models_are_read_without_network_and_pickle(tiny_sd1, tmp_path):
    """A pickle beside the weights is left alone; alone, or with code in the folder, the model is refused."""
    model = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    (model / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(print))
    watched(
        f"""
import torch, diffusers, transformers
from pathlib import Path
from stepforge.export.models.load import load
from stepforge.runtime.errors import CheckpointError
sys.addaudithook(watch)
model = Path({str(model)!r})
source = load(model)
source.unet(torch.float32)
def refused():
    try:
        load(model).unet(torch.float32)
    except CheckpointError:
        return True
(model / "x.py").write_text("raise SystemExit(7)")
assert refused()
(model / "x.py").unlink()
(model / "unet/diffusion_pytorch_model.safetensors").unlink()
assert refused()
""",
        model,
    )


def test_the_page_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[^`]+)`", text))
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name
    for row in text.split("## Trusted")[0].splitlines():
        if row.startswith("| ") and "held by" not in row:
            assert "`tests/" in row, row
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
