"""Tiny models, a ControlNet, stages of super-resolution, IF and a refiner, as folders and single files, with one thing
changed: JSON, headers, kinds of files, SentencePiece models.

What is accepted must also load. Weights whose header was not touched must keep their values, whatever else has changed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

from mutate import NAMES, STRANGE, flipped, json_text, mutated

ERRORS: tuple[type[Exception], ...] = ()  # set by start: importing the exporter takes ten seconds
QUICK, SOAK = 24, 2000
SECONDS = 30.0
ROOT = Path(__file__).resolve().parents[1]
COUNTS = (
    0,
    -1,
    1,
    2,
    3,
    1000,
    10**6,
    10**9,
    2**31,
    2**63,
    10**30,
    1.5,
    True,
    "x",
    None,
    [1],
    [10**9],
    [[2, 1], [3]],
    [],
)
TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "F4",
    "F8_E8M0",
    "C64",
    "",
    "f32",
    None,
    7,
)
MARKS = (
    "v_pred",
    "ztsnr",
    "global_step",
    "edm_mean",
    "edm_vpred.sigma_max",
    "model_ema.decay",
    "logit_scale",
    "scaled_fp8",
)
SAYS = ("modelspec.prediction_type", "modelspec.predict_key", "modelspec.encoder_layer", "format", "")


def helpers(path: str) -> Any:
    """The builders of tiny models that the tests have."""
    spec = importlib.util.spec_from_file_location(f"helpers_{len(path)}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(folder: Path) -> dict[str, Any]:
    """Two pristine models with one block a level, each as a folder and as a single file; and the expected UNets."""
    import torch
    from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel

    from stepforge.export.models import tokenizer
    from stepforge.runtime.errors import CheckpointError

    global ERRORS
    ERRORS = (CheckpointError,)
    build, single = helpers("conftest.py"), helpers("export/models/conftest.py")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    models: dict[str, Path] = {}
    for name, xl in (("sd1", False), ("sdxl", True)):
        model = folder / name
        vocabulary = build.save_tokenizer(model / "tokenizer")
        parts = {
            "unet": build.build_unet(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=32 if xl else 16,
                attention_head_dim=[1, 1] if xl else 8,
                block_out_channels=(32, 32),
                use_linear_projection=xl,
                **({"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 24 + 48} if xl else {}),
            ),
            "vae": build.build_vae(norm_num_groups=8),
            "text_encoder": build.build_text_encoder(vocabulary, 16, "quick_gelu", layers=2),
            "scheduler": DDIMScheduler(**build.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        }  # fmt: skip
        if xl:
            build.save_tokenizer(model / "tokenizer_2", pad="!")
            parts["text_encoder_2"] = build.build_text_encoder(vocabulary, 16, "gelu", layers=2, projection=24)
        kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
        build.save_pipeline(model, {"_class_name": kind}, parts)
        models[name] = model
        models[f"{name}.safetensors"] = single.original(model, folder / f"{name}.safetensors")
    net = ControlNetModel.from_unet(
        UNet2DConditionModel.from_pretrained(models["sd1"] / "unet"), conditioning_embedding_out_channels=(8, 16)
    )
    net.save_pretrained(folder / "control")
    models["control"] = folder / "control"
    models["control.safetensors"] = folder / "control.safetensors"
    shutil.copy(folder / "control/diffusion_pytorch_model.safetensors", models["control.safetensors"])
    assert tokenizer.FILES  # imported here, as transformers is, not in the first case
    further(build, folder, models)
    tokens = models["sd1"] / "tokenizer"
    unet = dict(UNet2DConditionModel.load_config(models["sd1"] / "unet"))
    base = {"models": models, "tokens": tokens, "unet": unet}
    expected = {name: networks(name, base)[0].state_dict() for name in models}
    files = {
        name: sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) if path.is_dir() else [""]
        for name, path in models.items()
    }
    return base | {"files": files, "expected": expected}


def further(build: Any, folder: Path, models: dict[str, Path]) -> None:
    """What the tests have beside base models; T5's tokenizer once as a SentencePiece model."""
    from transformers.convert_slow_tokenizer import import_protobuf

    from stepforge.export.models.pixel.feedforward import spandrel

    class Folders:
        def mktemp(self, _: str) -> Path:
            return Path(tempfile.mkdtemp(dir=folder))

    made, places = {}, Folders()
    for name, needed in (("sd1", ()), ("sdxl", ()), ("x4", ()), ("x2", ("sd1",)), ("if", ()), ("refiner", ("sdxl",))):
        fixture = getattr(build, f"tiny_{name}").__wrapped__
        made[name] = fixture(*(made[one] for one in needed), places)
    models |= {name: made[name] for name in ("x4", "x2", "if", "refiner")}
    models["base"] = made["sdxl"]  # base model of the refiner
    models |= {f"if-{name}": path for name, path in build.tiny_if_sr.__wrapped__(places).items()}
    pieces = import_protobuf().ModelProto()
    for token, number in json.loads((models["if"] / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]:
        if not token.startswith("<extra_id_"):
            pieces.pieces.add(piece=token, score=number)
    models["if-pieces"] = Path(shutil.copytree(models["if"], folder / "if-pieces"))
    shutil.rmtree(models["if-pieces"] / "tokenizer")
    (models["if-pieces"] / "tokenizer").mkdir()
    (models["if-pieces"] / "tokenizer/spiece.model").write_bytes(pieces.SerializeToString())
    spandrel()
    from safetensors.torch import save_file
    from spandrel.architectures.Compact import Compact

    models["compact.safetensors"] = folder / "compact.safetensors"
    save_file(Compact(num_feat=8, num_conv=2, upscale=2).state_dict(), models["compact.safetensors"])


def networks(name: str, base: dict[str, Any]) -> list[Any]:
    """All networks of a model, of a ControlNet for SD 1, of a stage, or of a refiner."""
    import torch

    from stepforge.export.expert_source import read_expert
    from stepforge.export.models.controlnet import load_control
    from stepforge.export.models.load import load
    from stepforge.export.models.pixel.feedforward import read_feed_forward
    from stepforge.export.models.upscaler import read_upscaler

    path = base["models"][name]
    if "control" in name:
        return [load_control(path, base["unet"], 2).network(torch.float32)]
    if "compact" in name:
        return [read_feed_forward(path).load(torch.float32).model]
    if name == "refiner":
        expert = read_expert(name, path, load(base["models"]["base"]), None)
        assert expert.text is not None
        return [expert.unet(torch.float32), expert.text.load(torch.float32)]
    stage = name.startswith("x") or name in ("if-ii", "if-plain")
    source = read_upscaler(path).source if stage else load(path, tokenizer=None if path.is_dir() else base["tokens"])
    assert all(line.isprintable() for line in (*source.assumed, *source.corrected))
    loaders = (source.unet, source.vae, *source.text_encoders)
    return [loader(torch.float32) for loader in loaders if loader is not None]


def case(rng: random.Random, base: dict[str, Any]) -> tuple[str, str, str, Any]:
    """(model, file in it or "", kind of change, content or name of a kind of file)."""
    name = rng.choice(sorted(base["models"]))
    file = rng.choice(base["files"][name])
    path = base["models"][name] / file if file else base["models"][name]
    if rng.random() < 0.15:
        kinds = ("fifo", "socket", "folder", "loop", "missing", "empty", "pickle", "pointer")
        return name, file, "kind", rng.choice(kinds)
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        if rng.random() < 0.2:
            return name, file, "bytes", flipped(data[:4096], rng) + data[4096:]
        if file and rng.random() < 0.2:
            index = {"metadata": {}, "weight_map": dict.fromkeys(header_of(data)[0], rng.choice((path.name, *NAMES)))}
            return name, file, "index", json_text(mutated(index, rng), rng)
        return name, file, "header", changed_header(data, rng)
    if path.suffix != ".json" or rng.random() < 0.1:
        return name, file, "bytes", flipped(data, rng)
    value = json.loads(data)
    if rng.random() < 0.4:  # numbers that say how much there is to build
        numbers = (
            [key for key, each in value.items() if isinstance(each, int | list)] if file != "model_index.json" else []
        )
        if numbers:
            value[rng.choice(numbers)] = rng.choice(COUNTS)
            return name, file, "json", json.dumps(value).encode()
    return name, file, "json", json_text(mutated(value, rng), rng)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def changed_header(data: bytes, rng: random.Random) -> bytes:
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    text = None
    match rng.randrange(10):
        case 0:
            header[one]["dtype"] = rng.choice(TYPES)
        case 1:
            header[one]["shape"] = rng.choice(
                (*STRANGE[:40], [2**40, 2**40], [0, 2**62], [1] * 100, header[other]["shape"])
            )
        case 2:
            header[one]["data_offsets"] = rng.choice(
                (*STRANGE[:40], header[other]["data_offsets"], [0, 2**64], [-1, 3])
            )
        case 3:
            header[rng.choice((*NAMES, one.replace("0", "999999999"), one + "x", "text_model." + one))] = header.pop(
                one
            )
        case 4:
            header[one], header[other] = header[other], header[one]
        case 5:
            header[rng.choice(MARKS)] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
        case 6:
            header["__metadata__"] = rng.choice(
                ({rng.choice(SAYS): rng.choice(("v", "", "flow", "é", "\n"))}, *STRANGE[:45])
            )
        case 7:
            text = json.dumps(header)
            text = text[:-1] + f', "{one}": ' + json.dumps(header[other]) + "}"
        case 8:
            text = json_text(header, rng).decode("latin-1")
        case _:
            header = mutated(header, rng)
    raw = json.dumps(header).encode(errors="surrogatepass") if text is None else text.encode("latin-1", "replace")
    length = rng.choice((len(raw),) * 12 + (0, 7, len(raw) + 1, 10**9, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + raw + body


def put(path: Path, kind: str, content: Any) -> None:
    """Make the change, in place of the file."""
    if kind == "index":
        (path.parent / f"{path.name}.index.json").write_bytes(content)
        path.rename(path.with_name("shard.safetensors"))
        return
    path.unlink()
    if kind != "kind":
        path.write_bytes(content)
    elif content == "fifo":
        os.mkfifo(path)
    elif content == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            here = os.open(path.parent, os.O_RDONLY)  # names of sockets have 107 bytes at most
            one.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
    elif content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path.name)
    elif content != "missing":
        data = {
            "empty": b"",
            "pickle": b"\x80\x02}.",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        }
        path.write_bytes(data[content])


def check(one: tuple[str, str, str, Any], base: dict[str, Any]) -> None:
    import torch

    name, file, kind, content = one
    model: Path = base["models"][name]
    path = model / file if file else model
    kept = path.read_bytes()
    try:
        put(path, kind, content)
        state = networks(name, base)[0].state_dict()
        if "unet" not in file and path.suffix != ".safetensors":
            assert all(torch.equal(state[key], value) for key, value in base["expected"][name].items())
    finally:
        for left in (path, path.parent / f"{path.name}.index.json", path.with_name("shard.safetensors")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.is_symlink() or left.exists():
                left.unlink()
        path.write_bytes(kept)
