"""Signals end a command in order: finished images stay, nothing half written does."""

import os
import signal

import pytest
from PIL import Image

from stepforge.runtime.cli.signals import Stopped, leave, on_signal

CASES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
NUMBERS = [getattr(signal, name) for name in CASES]


@pytest.mark.parametrize("name", CASES)
def test_a_signal_keeps_what_is_finished(name, start, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {number}" for number in range(150)))
    out = tmp_path / "out"
    options = ("-n", 30, "--width", 128, "--height", 128, "--sheet", tmp_path / "sheet.png")
    process = start("generate", "fake", "--prompts", tmp_path / "prompts.txt", "-o", out, *options)
    first = process.stdout.readline()
    process.send_signal(getattr(signal, name))
    rest, error = process.communicate(timeout=60)
    assert process.returncode == CASES[name]
    written = {first.strip(), *rest.split()}
    assert 1 <= len(written) < 150
    assert written == {str(path) for path in out.iterdir()}  # hidden files too
    for path in written:
        assert Image.open(path).convert("RGB").size == (128, 128)
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "out"}
    lines = error.splitlines()
    assert lines[0] == f"stepforge: {len(written)} of 150 images are written"
    assert len(lines) == 2


def test_the_first_signal_is_the_inner_blocks_and_the_second_the_outer_ones(request):
    caught = []

    def both():
        with on_signal(leave), on_signal(caught.append):
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGINT)

    # a shell's background jobs ignore SIGINT, nohup SIGHUP
    began = [signal.signal(number, signal.SIG_DFL) for number in NUMBERS]
    request.addfinalizer(lambda: [signal.signal(*pair) for pair in zip(NUMBERS, began, strict=True)])
    with pytest.raises(Stopped) as stopped:
        both()
    assert (stopped.value.code, stopped.value.text) == (130, "interrupted")
    assert caught == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in NUMBERS] == 3 * [signal.SIG_DFL]


def test_what_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with on_signal(leave):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
