"""Backends let go of their library in any order, and the process ends with 0."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import gc, os, signal, sys, threading
import numpy as np
from stepforge.runtime.backends import Banks, open_backend
from stepforge.runtime.bundle import UNET, VAE_DECODER, read

handled = []
signal.signal(signal.SIGTERM, lambda *_: handled.append(1))
call = {
    "sample": np.ones((1, 4, 8, 8), np.float32), "timestep": np.ones(1, np.float32),
    "encoder_hidden_states": np.ones((1, 77, 32), np.float32),
    "adapter": np.zeros(1, np.int64), "adapter_strength": np.zeros((1, 1, 1), np.float32),
}
"""
OPENED = """
bundle = read(sys.argv[1])
backend = open_backend(sys.argv[2], bundle, precision="fp32", threads=1)
dtype = backend.bank_dtype(UNET)
banks = Banks({t.name: np.zeros(t.shape, dtype) for t in bundle.components[UNET].inputs if ".lora_" in t.name},
              np.zeros(4, np.int64))
assert banks
denoiser, decoder = backend.open(UNET, banks), backend.open(VAE_DECODER)
results = [denoiser(call)["prediction"], decoder({"latents": call["sample"]})["pixels"]]
"""
SIGNAL = """
handled.clear()
os.kill(os.getpid(), signal.SIGTERM)
assert handled
"""
ENDINGS = {
    "the backend first": "del backend, bundle; gc.collect(); del banks; gc.collect(); del denoiser, decoder",
    "the graphs first": "del denoiser, decoder; gc.collect(); del banks, backend",
    "from another thread": "owners = [denoiser, decoder, backend]; del denoiser, decoder, backend\n"
    "thread = threading.Thread(target=owners.clear); thread.start(); thread.join()",
    "a second backend": "other = open_backend(sys.argv[2], bundle, precision='fp32', threads=1)\n"
    "del backend, denoiser, decoder; gc.collect(); del other",
    "opened twice": "again = backend.open(UNET, banks); again(call); del denoiser; again(call); del backend",
    "results live longest": "kept = [float(r.sum()) for r in results]; del denoiser, decoder, backend, banks; gc.collect()\n"
    "assert all(np.isfinite(r).all() for r in results)",
    "in a circle": "circle = [backend, denoiser, decoder]; circle.append(circle); del backend, denoiser, decoder, circle",
}


def run(code, bundle, backend):
    done = subprocess.run([sys.executable, "-c", code, str(bundle), backend], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_references_are_dropped_at_the_end(tiny_sd1_banks, backend):
    # the signal's handler runs on the thread's signal stack
    run(SCRIPT + OPENED + SIGNAL, tiny_sd1_banks, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param("openvino", marks=pytest.mark.long), "onnxruntime"])
def test_references_are_dropped_in_any_order(tiny_sd1_banks, backend):
    """One order after another, each in names of its own; sys.exit after the last."""
    orders = "".join(
        f"def order_{number}():\n{textwrap.indent(OPENED + ending, '    ')}\norder_{number}()\ngc.collect()\n{SIGNAL}"
        for number, ending in enumerate(ENDINGS.values())
    )
    run(f"{SCRIPT}{orders}{OPENED}{SIGNAL}sys.exit(0)", tiny_sd1_banks, backend)
