"""Tiny random models in the exact layouts of Stable Diffusion 1, 2 and XL, and bundles exported from them."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    p for p in sys.path if Path(p or ".").resolve() != ROOT
]  # kernels/ must not shadow Hugging Face's kernels

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "a</w> a</w>"]  # enough for merges to happen
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def save_tokenizer(folder: Path, *, pad: str = EOS) -> int:
    """A CLIP tokenizer with a byte vocabulary and a few merges; returns its vocabulary size."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in MERGES),
        BOS,
        EOS,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", "utf-8")
    config = {"model_max_length": 77, "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **config}), "utf-8")
    return len(tokens)


def build_unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    common = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
    return UNet2DConditionModel(**{**common, **options})


def _seed_of(*what: Any) -> None:
    """Equal networks of several models have equal weights, so that they are traced once."""
    import torch

    torch.manual_seed(zlib.crc32(repr(what).encode()))


def build_text_encoder(vocabulary: int, width: int, act: str, *, layers: int = 3, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=1, hidden_act=act, projection_dim=projection or width,
        bos_token_id=vocabulary - 2, eos_token_id=2,
    )  # fmt: skip
    _seed_of("text_encoder", width, act, layers, projection)
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def build_vae(levels: int = 2, **options: Any) -> Any:
    """A latent is 2^(levels − 1) pixels wide."""
    from diffusers import AutoencoderKL

    _seed_of("vae", levels)
    return AutoencoderKL(
        block_out_channels=(32,) * (levels - 1) + (64,), layers_per_block=1, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **options,
    )  # fmt: skip


def save_t5_tokenizer(folder: Path) -> int:
    """A T5 tokenizer of letters and a few pieces; returns its vocabulary size."""
    from transformers import T5Tokenizer

    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz0123456789.,()!",
        "▁a",
        "▁ca",
        "t",
        "▁do",
        "at",
        "og",
    ]
    scores = [(piece, -float(i % 7)) for i, piece in enumerate(dict.fromkeys(pieces))]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    tokenizer = T5Tokenizer(vocab=scores + sentinels)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def build_pixel_unet(**options: Any) -> Any:
    """DeepFloyd IF's UNet of two levels."""
    text = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "encoder_hid_dim": 40, "encoder_hid_dim_type": "text_proj", "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4, "cross_attention_dim": 32, "cross_attention_norm": "group_norm",
    }  # fmt: skip
    common = {
        "out_channels": 6, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "act_fn": "gelu",
        "time_embedding_act_fn": "gelu", "attention_head_dim": 8, "resnet_time_scale_shift": "scale_shift",
        "resnet_skip_time_act": True, "resnet_out_scale_factor": 2**0.5, "mid_block_scale_factor": 2**0.5,
    }  # fmt: skip
    return build_unet(**{**common, **({} if "up_block_types" in options else text), **options})


def save_pipeline(folder: Path, index: dict[str, Any], parts: dict[str, Any], tokenizer: str = "CLIPTokenizer") -> Path:
    """What DiffusionPipeline.save_pretrained writes, without the five seconds of importing the pipelines."""
    import torch

    names = {}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            _seed_of(name)
            with torch.no_grad():  # fresh norms are 1 and fresh biases 0: two of them could be swapped unseen
                for parameter in part.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
        part.save_pretrained(folder / name)
        library = type(part).__module__.split(".")[0]
        names[name] = [library, type(part).__name__]
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            names[name] = ["transformers", tokenizer]
    (folder / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": "0.38.0", **names}), "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1: PNDM, epsilon, 32 x 32 pixels, latents 16 x 16."""
    import torch
    from diffusers import PNDMScheduler

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "tiny-sd1"
    vocabulary = save_tokenizer(folder / "tokenizer")
    return save_pipeline(
        folder,
        {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None], "requires_safety_checker": False},
        {
            "unet": build_unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=8,
            ),
            "vae": build_vae(),
            "text_encoder": build_text_encoder(vocabulary, 32, "quick_gelu"),
            "scheduler": PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        },
    )


@pytest.fixture(scope="session")
def tiny_sd1_inpaint(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1's inpainting layout: the UNet also reads a mask and the masked image."""
    import torch

    folder = tmp_path_factory.mktemp("models") / "tiny-sd1-inpaint"
    shutil.copytree(tiny_sd1, folder, ignore=shutil.ignore_patterns("unet"))
    torch.manual_seed(4)
    unet = build_unet(
        in_channels=9,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    unet.save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["_class_name"] = "StableDiffusionInpaintPipeline"
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_sd1_inpaint_bundle(tiny_sd1_inpaint: Path, request: pytest.FixtureRequest) -> Path:
    return _export(tiny_sd1_inpaint, request)


@pytest.fixture(scope="session")
def tiny_sd2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 2: DDIM, v-prediction, zero terminal SNR; OpenCLIP's activation, linear projections, one more layer unused."""
    import torch
    from diffusers import DDIMScheduler

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("models") / "tiny-sd2v"
    vocabulary = save_tokenizer(folder / "tokenizer", pad="!")
    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return save_pipeline(
        folder,
        {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None], "requires_safety_checker": False},
        {
            "unet": build_unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=[1, 1],
                use_linear_projection=True,
            ),
            "vae": build_vae(),
            "text_encoder": build_text_encoder(vocabulary, 32, "gelu"),
            "scheduler": scheduler,
        },
    )


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL: Euler, epsilon, two text encoders of unequal width, pooled text and size conditioning."""
    import torch
    from diffusers import EulerDiscreteScheduler

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    vocabulary = save_tokenizer(folder / "tokenizer")
    save_tokenizer(folder / "tokenizer_2", pad="!")
    return save_pipeline(
        folder,
        {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
        {
            "unet": build_unet(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=[1, 2],
                cross_attention_dim=32 + 48,
                attention_head_dim=[1, 1],
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=40 + 6 * 8,
            ),
            "vae": build_vae(scaling_factor=0.13025),
            "text_encoder": build_text_encoder(vocabulary, 32, "quick_gelu"),
            "text_encoder_2": build_text_encoder(vocabulary, 48, "gelu", projection=40),
            "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        },
    )


@pytest.fixture(scope="session")
def tiny_refiner(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's refiner: the base's second text encoder alone, an aesthetic score in place of the target size."""
    import torch

    torch.manual_seed(21)
    folder = tmp_path_factory.mktemp("models") / "tiny-refiner"
    unet = build_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1], cross_attention_dim=48, attention_head_dim=[1, 1],
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 5 * 8,
    )  # fmt: skip
    none = {name: [None, None] for name in ("text_encoder", "tokenizer")}
    index = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False, **none,
    }  # fmt: skip
    for name in ("text_encoder_2", "tokenizer_2"):
        shutil.copytree(tiny_sdxl / name, folder / name)
    return save_pipeline(folder, index, {"unet": unet})


@pytest.fixture(scope="session")
def tiny_x4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD x4 upscaler: 7 channels, noise levels as class labels, v-prediction, a VAE of factor 4, noise of its own."""
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler

    torch.manual_seed(14)
    folder = tmp_path_factory.mktemp("models") / "tiny-x4"
    vocabulary = save_tokenizer(folder / "tokenizer", pad="!")
    scheduler = DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return save_pipeline(
        folder,
        {"_class_name": "StableDiffusionUpscalePipeline", "max_noise_level": 350, "watermarker": [None, None]},
        {
            "unet": build_unet(
                block_out_channels=(32,),
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
                in_channels=7,
                num_class_embeds=1000,
                only_cross_attention=True,
                cross_attention_dim=32,
                attention_head_dim=8,
                use_linear_projection=True,
            ),
            "vae": build_vae(3, scaling_factor=0.08333),
            "text_encoder": build_text_encoder(vocabulary, 32, "gelu", layers=1),
            "scheduler": scheduler,
            "low_res_scheduler": DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear"),
        },
    )


@pytest.fixture(scope="session")
def tiny_x2(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x2 latent upscaler: the blocks of Katherine Crowson's UNet, Fourier time, text and pooled text, 5 channels out; the VAE
    of the base model."""
    import torch
    from diffusers import EulerDiscreteScheduler

    torch.manual_seed(15)
    folder = tmp_path_factory.mktemp("models") / "tiny-x2"
    vocabulary = save_tokenizer(folder / "tokenizer")
    save_pipeline(
        folder,
        {"_class_name": "StableDiffusionLatentUpscalePipeline"},
        {
            "unet": build_unet(
                block_out_channels=(32, 32),
                time_embedding_dim=32,
                down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
                up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
                mid_block_type=None,
                in_channels=8,
                out_channels=5,
                cross_attention_dim=32,
                attention_head_dim=8,
                norm_num_groups=None,
                act_fn="gelu",
                conv_in_kernel=1,
                conv_out_kernel=1,
                resnet_time_scale_shift="scale_shift",
                time_embedding_type="fourier",
                timestep_post_act="gelu",
                time_cond_proj_dim=128 + 32,
                only_cross_attention=False,
            ),
            "vae": build_vae(),
            "text_encoder": build_text_encoder(vocabulary, 32, "quick_gelu", layers=2),
            "scheduler": EulerDiscreteScheduler(**BETAS, prediction_type="sample"),
        },
    )
    shutil.copytree(tiny_sd1 / "vae", folder / "vae", dirs_exist_ok=True)
    return folder


IF_SCHEDULER = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True}
IF_SCHEDULER |= {"dynamic_thresholding_ratio": 0.95}


@pytest.fixture(scope="session")
def tiny_if(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepFloyd IF's stage I: pixels 16 x 16, T5, DDPM with thresholding and learned variance."""
    import torch
    from diffusers import DDPMScheduler
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(21)
    folder = tmp_path_factory.mktemp("models") / "tiny-if"
    vocabulary = save_t5_tokenizer(folder / "tokenizer")
    t5 = T5Config(
        vocab_size=vocabulary, d_model=40, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return save_pipeline(
        folder,
        {"_class_name": "IFPipeline", "safety_checker": [None, None], "requires_safety_checker": False},
        {
            "unet": build_pixel_unet(in_channels=3, sample_size=16),
            "text_encoder": T5EncoderModel(t5).eval(),
            "scheduler": DDPMScheduler(**IF_SCHEDULER, sample_max_value=1.5),
        },
        "T5Tokenizer",
    )


@pytest.fixture(scope="session")
def tiny_if_sr(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Super-resolution in the layout of IF's stage II, 16 to 32 pixels: "ii" reads the text of stage I, "plain" none, has
    the x2 upscaler's blocks without attention, and predicts v without a variance."""
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler

    found = {}
    no_text = {"text_encoder": [None, None], "tokenizer": [None, None], "watermarker": [None, None]}
    common = {"in_channels": 6, "class_embed_type": "timestep", "sample_size": 32}
    plain: dict[str, Any] = {
        "down_block_types": ("KDownBlock2D", "KDownBlock2D"), "up_block_types": ("KUpBlock2D", "KUpBlock2D"),
        "block_out_channels": (32, 32), "norm_num_groups": None, "mid_block_type": None, "out_channels": 3,
    }  # fmt: skip
    steps = {
        "ii": DDPMScheduler(**IF_SCHEDULER, sample_max_value=1.0),
        "plain": DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
        ),
    }
    for seed, (name, scheduler) in enumerate(steps.items()):
        torch.manual_seed(22 + seed)
        folder = tmp_path_factory.mktemp("models") / f"tiny-if-{name}"
        parts = {
            "unet": build_pixel_unet(**common, **(plain if name == "plain" else {})),
            "scheduler": scheduler,
            "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        }
        found[name] = save_pipeline(folder, {"_class_name": "IFSuperResolutionPipeline", **no_text}, parts)
    return found


def _controls(model: Path, folder: Path, **differing: dict[str, Any]) -> dict[str, Path]:
    """Random ControlNets of a model's UNet by name, as diffusers saves them; `differing`: further settings of each."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    found = {}
    for seed, (name, options) in enumerate(differing.items()):
        torch.manual_seed(seed + 5)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
        net.register_to_config(**options)
        with torch.no_grad():  # fresh zero convolutions are 0: nothing could be told from anything
            for parameter in net.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        net.save_pretrained(folder / name)
        found[name] = folder / name
    return found


@pytest.fixture(scope="session")
def tiny_sd1_controls(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _controls(tiny_sd1, tmp_path_factory.mktemp("sd1-controls"), a={}, b={})


@pytest.fixture(scope="session")
def tiny_sd2v_controls(tiny_sd2v: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _controls(tiny_sd2v, tmp_path_factory.mktemp("sd2v-controls"), a={})


@pytest.fixture(scope="session")
def tiny_sdxl_controls(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The second one's residuals are means over height and width, and it reads blue first."""
    pooled = {"global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"}
    return _controls(tiny_sdxl, tmp_path_factory.mktemp("sdxl-controls"), a={}, pooled=pooled)


def pytest_configure(config: pytest.Config) -> None:
    """One core for each process of pytest-xdist: thread pools of torch, OpenVINO and ONNX Runtime in several processes would
    wait for each other's cores."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish(session: pytest.Session) -> None:
    if "stepforge.export.graph.trace" in sys.modules:
        trace_once(session.config)
    # modules stay: an export collects garbage after each network, which takes a second with torch, diffusers and transformers
    gc.freeze()


@contextlib.contextmanager
def _made_once(out: Path) -> Iterator[Path | None]:
    """A place to make `out` in, which becomes `out`; None if it is there. One process makes it, the others wait."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f"{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            yield None
            return
        place = out.with_name(f"{out.name}.part")
        shutil.rmtree(place, ignore_errors=True)
        yield place
        place.rename(out)


@cache
def _code(*places: str) -> bytes:
    """Of files of this repository, and the libraries that an export traces with."""
    from stepforge.export.build import LIBRARIES

    digest = hashlib.sha256()
    for file in sorted(file for place in places for file in ROOT.glob(place)):
        digest.update(file.name.encode() + file.read_bytes())
    for library in LIBRARIES:
        digest.update(importlib.metadata.version(library).encode())
    return digest.digest()


def _settings(value: Any) -> Any:
    """A module's attribute, or a config, without addresses, paths and what begins with an underscore."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        named = {str(key): _settings(one) for key, one in value.items() if not str(key).startswith("_")}
        return sorted((key, one) for key, one in named.items() if key != "name_or_path")
    if isinstance(value, list | tuple):
        return [_settings(one) for one in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def _network_digest(traced: Any, opset: int) -> str:
    """Of a network before its export: modules, their settings, weights, and what is asked of the trace."""
    import torch

    digest = hashlib.sha256(_code("export/graph/*.py"))
    for name, module in traced.module.named_modules():
        plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        parts = (name, type(module).__qualname__, _settings(plain), _settings(getattr(module, "config", None)))
        digest.update(repr(parts).encode())
    for name, tensor in (*traced.module.named_parameters(), *traced.module.named_buffers()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    example = [(name, tensor.shape, tensor.dtype) for name, tensor in traced.example.items()]
    asked = (traced.inputs, traced.outputs, traced.multiple, traced.least, traced.derive, traced.probes, opset, example)
    digest.update(repr(asked).encode())
    return digest.hexdigest()[:20]


def trace_once(config: pytest.Config) -> None:
    """From now on this process and its neighbours trace each network once (5 to 30 s of processor time) and copy its graphs
    afterwards, also in later runs with the same exporter and libraries. The fixture `fresh_traces` is the way around."""
    from stepforge.export.graph import trace

    if hasattr(trace.write, "whole"):
        return
    whole, networks = trace.write, Path(config.cache.mkdir("networks"))

    def write(traced: Any, folder: Path, opset: int) -> None:
        known = networks / _network_digest(traced, opset)
        with _made_once(known) as place:
            if place is not None:
                whole(traced, place, opset)
        shutil.copytree(known, folder, dirs_exist_ok=True)

    write.whole = whole
    trace.write = write


@pytest.fixture(
    params=[("onnxruntime",), pytest.param(("openvino", "torch"), marks=pytest.mark.long)],
    ids=["onnxruntime", "others"],
)
def backends(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Backends on which a test compares: one in the whole suite, where the contract of all is tests/runtime/backends, and the
    others in the long lane."""
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture
def fresh_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are traced, whatever earlier tests have left."""
    from stepforge.export.graph import trace

    monkeypatch.setattr(trace, "write", getattr(trace.write, "whole", trace.write))


def _export(
    model: Path,
    request: pytest.FixtureRequest,
    controls: dict[str, Path] | None = None,
    upscalers: dict[str, Path] | None = None,
    **options: Any,
) -> Path:
    """Export a model, or copy what an earlier run or another process with the same model, exporter and libraries made of it.

    Remove .pytest_cache to export afresh. options: of `export_bundle`.
    """
    from stepforge.export.build import export_bundle

    trace_once(request.config)
    digest = hashlib.sha256(_code("export/**/*.py", "runtime/bundle/*.py"))
    digest.update(repr((sorted(controls or ()), sorted(upscalers or ()), sorted(options.items()))).encode())
    folders = (model, *(controls or {}).values(), *(upscalers or {}).values())
    weights = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    for file in sorted(weights):
        digest.update(file.name.encode() + file.read_bytes())
    cached = Path(request.config.cache.mkdir("bundles")) / digest.hexdigest()[:16] / model.name
    with _made_once(cached) as place:
        if place is not None:
            told: list[tuple[str, int, int]] = []
            export_bundle(
                model, place, controls=controls, upscalers=upscalers, progress=lambda *of: told.append(of), **options
            )
            assert told[-1][1] == told[-1][2]
    out = request.getfixturevalue("tmp_path_factory").mktemp("bundles") / model.name
    return Path(shutil.copytree(cached, out))


@pytest.fixture(scope="session")
def tiny_sd1_bundle(tiny_sd1: Path, request: pytest.FixtureRequest) -> Path:
    return _export(tiny_sd1, request)


@pytest.fixture(scope="session")
def tiny_stages_bundle(tiny_sd1: Path, tiny_x4: Path, tiny_x2: Path, request: pytest.FixtureRequest) -> Path:
    """SD 1 with the stages x4 and x2."""
    return _export(tiny_sd1, request, upscalers={"x4": tiny_x4, "x2": tiny_x2})


@pytest.fixture(scope="session")
def tiny_sd2v_bundle(tiny_sd2v: Path, request: pytest.FixtureRequest) -> Path:
    return _export(tiny_sd2v, request)


@pytest.fixture(scope="session")
def tiny_sdxl_bundle(tiny_sdxl: Path, request: pytest.FixtureRequest) -> Path:
    return _export(tiny_sdxl, request)


@pytest.fixture(scope="session")
def tiny_if_bundle(tiny_if: Path, tiny_if_sr: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """Stage I with the stages "ii" and "plain"."""
    return _export(tiny_if, request, upscalers=tiny_if_sr)


@pytest.fixture(scope="session")
def tiny_sd1_banks(tiny_sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stepforge.export.build import BankOptions, with_banks

    return with_banks(tiny_sd1_bundle, tmp_path_factory.mktemp("banks") / "tiny-sd1", BankOptions(3, 8)).path


@pytest.fixture(scope="session")
def tiny_sdxl_banks(tiny_sdxl_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stepforge.export.build import BankOptions, with_banks

    return with_banks(tiny_sdxl_bundle, tmp_path_factory.mktemp("banks") / "tiny-sdxl", BankOptions(2, 8)).path


@pytest.fixture(scope="session")
def tiny_sd1_control_bundle(tiny_sd1: Path, tiny_sd1_controls: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """Two ControlNets, DeepCache of branch 0, T-GATE and LoRA banks."""
    from stepforge.export.build import BankOptions
    from stepforge.export.graph.rewire import Variants

    return _export(tiny_sd1, request, tiny_sd1_controls, reuse=Variants(0, True), bank=BankOptions(3, 8))


@pytest.fixture(scope="session")
def tiny_sdxl_control_bundle(
    tiny_sdxl: Path, tiny_sdxl_controls: dict[str, Path], request: pytest.FixtureRequest
) -> Path:
    from stepforge.export.graph.rewire import Variants

    return _export(tiny_sdxl, request, tiny_sdxl_controls, reuse=Variants(0, True))


@pytest.fixture(scope="session")
def tiny_fp16(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Plain bundles in fp16, by family: sd1, sd2v, sdxl."""
    return cache(lambda family: _export(request.getfixturevalue(f"tiny_{family}"), request, precision="fp16"))


@pytest.fixture(scope="session")
def tiny_full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Bundles with LoRA banks, ControlNets, DeepCache of branch 0 and T-GATE, by family and precision."""
    from stepforge.export.build import BankOptions, with_banks
    from stepforge.export.graph.rewire import Variants

    @cache
    def full(family: str, precision: str) -> Path:
        if (family, precision) == ("sd1", "fp32"):
            return Path(request.getfixturevalue("tiny_sd1_control_bundle"))
        if (family, precision) == ("sdxl", "fp32"):
            plain = request.getfixturevalue("tiny_sdxl_control_bundle")
            return with_banks(plain, tmp_path_factory.mktemp("banks") / "tiny-sdxl", BankOptions(3, 8)).path
        control = {"a": request.getfixturevalue(f"tiny_{family}_controls")["a"]}
        options: dict[str, Any] = {"precision": precision, "reuse": Variants(0, True), "bank": BankOptions(3, 8)}
        return _export(request.getfixturevalue(f"tiny_{family}"), request, control, **options)

    return full
