"""Text to image, guided, by everybody: the same noise, sampler, steps, size and weights."""

from __future__ import annotations

from collections.abc import Sequence

from suite.cases import Case, Record
from suite.items import OURS, PEERS, Context, draw_and_time

TITLE = "Text to image"
BF16 = ("diffusers", "openvino", "openvino genai", "stepforge openvino")


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    found = []
    for model in ("demo", "sd15") if quick else ("demo", "sd15", "sdxl"):
        runners = [*PEERS, *OURS]
        if not quick:  # minutes of compilation
            runners.insert(1, "diffusers torch.compile")
        if model == "sd15" and not quick:  # it knows published shapes alone, and pip compiles it
            runners.insert(len(runners) - 2, "stable-diffusion.cpp")
        if model == "sd15" and quick:  # half a minute each
            runners = [name for name in runners if "onnxruntime" not in name]
        if model == "sdxl":  # two text encoders: beyond the plain loops
            runners = [name for name in runners if name not in ("openvino", "onnxruntime", "openvino genai")]
        found += [Case("txt2img", model, name) for name in runners]
        if "bf16" in precisions:
            found += [Case("txt2img", model, name, "bf16") for name in runners if name in BF16]
    return found


def measure(case: Case, context: Context) -> Record:
    return draw_and_time(case, context, [context.workload(case)])
