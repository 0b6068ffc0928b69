"""Models that the suite draws with, and what is made of them, each when it is first asked for and kept under `--work`.

demo    examples/emoji: trained weights, 64x64
sd15    shapes of Stable Diffusion 1.5, random weights: 4.3 GB, and as much for its bundle
sdxl    shapes of Stable Diffusion XL, random weights, in fp16: 7 GB, and as much for its bundle
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from suite.cases import ROOT, Workload

EMOJI = ROOT / "examples/emoji"
ADAPTERS = {
    "poster": EMOJI / "adapters/poster/pytorch_lora_weights.safetensors",
    "thermal": EMOJI / "adapters/thermal",
    "subject": EMOJI / "adapters/subject.safetensors",
}
HINT = EMOJI / "control/hints/heart.png"
BANKS = ("--lora-slots", "6", "--lora-rank", "16")
DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
RANK = 16  # rank of the adapters, whose numbers are random


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    work: Path

    @property
    def folder(self) -> Path:
        """diffusers' folder."""
        return EMOJI / "model" if self.name == "demo" else self.work / self.name / "model"

    @property
    def control(self) -> Path:
        return EMOJI / "control/silhouette" if self.name == "demo" else self.work / self.name / "control"

    @property
    def control_name(self) -> str:
        return "silhouette" if self.name == "demo" else "net"

    def adapter(self, name: str) -> Path:
        return ADAPTERS[name] if self.name == "demo" else self.work / self.name / f"{name}.safetensors"

    def bundle(self, kind: str = "plain") -> Path:
        """plain; full: with banks, a ControlNet and, of the demo, its super-resolution; merged: an adapter in the weights."""
        return self.work / self.name / f"{kind}.bundle"

    def weights(self, *, control: bool = False) -> int:
        """Bytes of all networks' weights in fp32, the ControlNet's among them or not."""
        wide = 2 if self.name == "sdxl" else 1
        folders = [self.folder, *([self.control] if control else [])]
        return wide * sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors"))

    def workload(self, *, quick: bool) -> Workload:
        if self.name == "demo":
            return Workload("cat face on a blue background", 64, 20, 3.0)
        size = {"sd15": 256, "sdxl": 512}[self.name]
        return Workload("a photograph of a cat sitting on a wooden table", size, 2 if quick else 20, 7.5)


def ready(bundle: Path) -> bool:
    return (bundle / "bundle.json").exists()


def prepare_model(model: Model) -> None:
    """Random weights, unless they are there; the demo's are in the repository."""
    if model.name == "demo" or (model.folder / "model_index.json").exists():
        return
    import random_models
    import torch

    partial = model.folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    family, dtype = {"sd15": ("sd1", torch.float32), "sdxl": ("sdxl", torch.float16)}[model.name]
    random_models.save(partial, family, dtype=dtype)
    partial.rename(model.folder)


def prepare_control(model: Model) -> None:
    """A ControlNet of random numbers, and an adapter for every layer of the transformers."""
    if model.name == "demo":
        return
    import torch
    from bench_lora import write_adapter
    from diffusers import ControlNetModel, UNet2DConditionModel

    if not (model.control / "config.json").exists():
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(
            UNet2DConditionModel.from_pretrained(model.folder / "unet", local_files_only=True)
        )
        with torch.no_grad():  # fresh ones are zero
            ends = (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out)
            for layer in ends:
                layer.weight.normal_(std=0.01)
        net.save_pretrained(model.control)
    for seed, name in enumerate(("poster", "thermal", "subject")):
        if not model.adapter(name).exists():
            write_adapter(model.bundle(), model.adapter(name), RANK, "transformer", seed)


def export_command(model: Model, kind: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "stepforge.runtime",
        "export",
        model.folder,
        "-o",
        model.bundle(kind),
        "--name",
        model.name,
    ]
    if kind == "full":
        command += [*BANKS, "--control", f"{model.control_name}={model.control}"]
        command += ["--lora-targets", "transformer"] if model.name != "demo" else []
    if kind == "merged":
        command += ["--lora", f"{model.adapter('poster')}:1.0"]
    if model.name == "sdxl":
        command += ["--precision", "fp16"]
    return [*map(str, command), "--overwrite"]


def prepare_genai(model: Model) -> Path:
    """What OpenVINO GenAI reads, made of our plain bundle: the same graphs over the same weights files, configurations, and
    a tokenizer by its own converter. Its files are called .xml; OpenVINO tells an ONNX graph by its content."""
    folder = model.work / model.name / "genai"
    if (folder / "model_index.json").exists():
        return folder
    import onnx
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import CLIPTokenizerFast

    bundle = model.bundle()
    shutil.rmtree(folder, ignore_errors=True)
    places = {"unet": "denoiser/unet", "text_encoder": "text_encoder", "vae_decoder": "vae_decoder"}
    for name, place in places.items():
        (folder / name).mkdir(parents=True)
        graph = onnx.load(str(bundle / place / "model.onnx"), load_external_data=False)
        if name == "unet":
            whole_steps(graph)
        onnx.save(graph, str(folder / name / "openvino_model.xml"))
        for data in (bundle / place).glob("*.data"):
            (folder / name / data.name).hardlink_to(data)
        (folder / name / "openvino_model.bin").touch()
    for name, source in {"unet": "unet", "text_encoder": "text_encoder", "vae_decoder": "vae"}.items():
        config = json.loads((model.folder / source / "config.json").read_text())
        config |= {"scaling_factor": 1.0} if name == "vae_decoder" else {}  # our decoder's graph has it
        (folder / name / "config.json").write_text(json.dumps(stated(config)))
    scheduler = json.loads((model.folder / "scheduler/scheduler_config.json").read_text())
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(stated(scheduler | DDIM)))
    own = CLIPTokenizerFast.from_pretrained(model.folder / "tokenizer", local_files_only=True)
    openvino.save_model(convert_tokenizer(own), str(folder / "tokenizer/openvino_tokenizer.xml"))
    index = json.loads((model.folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(stated(index)))
    return folder


def stated(values: dict[str, object]) -> dict[str, object]:
    """Without what is null, or a pair of nulls, which GenAI does not read."""
    return {key: value for key, value in values.items() if value is not None and value != [None, None]}


def whole_steps(graph: object) -> None:
    """One int64 timestep for all rows, as GenAI gives it, in the place of a float for each row; only the prediction is left."""
    from onnx import TensorProto, helper

    own = graph.graph  # type: ignore[attr-defined]
    given = next(value for value in own.input if value.name == "timestep")
    own.input.remove(given)
    own.input.append(helper.make_tensor_value_info("timestep", TensorProto.INT64, [1]))
    for node in own.node:
        for place, name in enumerate(node.input):
            if name == "timestep":
                node.input[place] = "timestep_of_rows"
    new = [
        helper.make_node("Cast", ["timestep"], ["timestep_float"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["sample"], ["rows_of_sample"], start=0, end=1),
        helper.make_node("Expand", ["timestep_float", "rows_of_sample"], ["timestep_of_rows"]),
    ]
    for place, node in enumerate(new):
        own.node.insert(place, node)
    del own.output[1:]


def disk_needed(name: str) -> int:
    """Bytes of a model and its plain bundle."""
    return {"demo": 1 << 27, "sd15": 9 << 30, "sdxl": 14 << 30}[name]


def run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
