"""schemathesis over the server's own OpenAPI description: what it says is what it does, whatever is sent."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ST = shutil.which("st", path=BIN)
pytestmark = pytest.mark.skipif(ST is None, reason="schemathesis is not installed; `make test-interop` installs it")

KEY = "0123456789abcdef0123"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method", "ignored_auth",
)  # fmt: skip
SECONDS = 120


def test_the_description_is_what_the_server_does(server, tmp_path):
    (tmp_path / "keys").write_text(f"{KEY} tester admin\n")
    (tmp_path / "adapters").mkdir()
    log, found = tmp_path / "log", tmp_path / "found.json"
    command = [BIN / "stepforge", "serve", "fake", "--port", "0", "--keys", tmp_path / "keys", "--max-steps", "6"]
    command += ["--adapters", tmp_path / "adapters", "--max-pixels", "65536", "--max-images", "2"]
    with server(command, log):
        port, until = None, time.monotonic() + 120
        while port is None:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            port = next((line["port"] for line in lines if line["message"] == "listening"), None)
        done = subprocess.run(
            [
                ST, "run", f"http://127.0.0.1:{port}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--seed", "0",
                "--phases", "coverage,fuzzing", "--checks", ",".join(CHECKS), "--max-examples", "100", "--no-color",
                "--continue-on-failure", "--max-time", str(SECONDS), "--report", "json", "--report-json-path", found,
            ],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    report = json.loads(found.read_text())
    assert report["operations"]["tested"] == report["operations"]["total"] >= 10
    assert report["test_cases"]["generated"] > 100
    assert '"traceback"' not in log.read_text()
