"""From starting a process to the demo's first 20-step image on disk. `again`: with what the first run left in caches."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from suite.cases import Case, Record
from suite.items import Context
from suite.models import prepare_genai

TITLE = "Cold start to the first image"
DIFFUSERS = """
import sys, torch
from diffusers import StableDiffusionPipeline
options = {"safety_checker": None, "requires_safety_checker": False, "local_files_only": True,
           "torch_dtype": torch.float32}
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], **options)
pipe.set_progress_bar_config(disable=True)
pipe(sys.argv[2], num_inference_steps=20, guidance_scale=3.0, width=64, height=64).images[0].save(sys.argv[3])
"""
GENAI = """
import sys, openvino_genai
from PIL import Image
pipe = openvino_genai.Text2ImagePipeline(sys.argv[1], "CPU", INFERENCE_PRECISION_HINT="f32")
made = pipe.generate(sys.argv[2], width=64, height=64, num_inference_steps=20, guidance_scale=3.0)
Image.fromarray(made.data[0]).save(sys.argv[3])
"""


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    runners = (
        "diffusers",
        "openvino genai",
        "stepforge openvino",
        "stepforge openvino, again",
        "stepforge onnxruntime",
    )
    return [Case("cold_start", "demo", name) for name in runners]


def measure(case: Case, context: Context) -> Record:
    model = context.model("demo")
    prompt = context.workload(case).prompt
    name, _, again = case.runner.partition(", ")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/x.png"
        if name == "diffusers":
            command = [sys.executable, "-c", DIFFUSERS, str(model.folder), prompt, out]
        elif name == "openvino genai":
            command = [sys.executable, "-c", GENAI, str(prepare_genai(model)), prompt, out]
        else:
            command = [
                sys.executable, "-m", "stepforge.runtime", "generate", str(model.bundle()), prompt, "--guidance", "3",
                "--steps", "20", "--backend", name.split()[1], "--precision", case.precision, "--out", out, "--overwrite",
            ]  # fmt: skip
        seconds = []
        for index in range(context.runs + bool(again)):
            cache = "kept" if again else str(index)
            environment = {**os.environ, "STEPFORGE_CACHE": f"{folder}/{cache}"}
            started = time.perf_counter()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
    return Record(case, seconds[bool(again) :])
