"""The reference's pipeline: diffusers' own loaders over the model's files, in fp32, offline; the exporter's reading last.

A diffusers folder goes through `DiffusionPipeline.from_pretrained`. A single file goes through `from_single_file` with the
configs of the published model that diffusers takes for its kind (configs.py), or those of a folder that the user gives.
What diffusers' loader leaves open is read here anew and told as assumed; what it cannot load at all comes from the
exporter's `Source`, and then every setting is told as assumed.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import CLIPTokenizer

from stepforge.export.models.source import Source
from stepforge.export.models.weights import opened, read_header, variant_of
from stepforge.export.parity.configs import MODELS, PIPELINES, SD2_BASE_SIZE
from stepforge.export.parity.staging import (
    TOKENIZER,
    assumed_tokenizer,
    reason,
    stage_component,
    stage_model,
    staging,
    write_json,
)  # fmt: skip
from stepforge.runtime.errors import CheckpointError

UNET = "model.diffusion_model."
SD2_BASE_STEP = 875000  # global_step of stable-diffusion-2-base, by which diffusers' legacy loader tells epsilon
MARKS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "global_step")
FP32 = torch.float32
XL = ("xl_base", "xl_inpaint")  # diffusers' names of kinds


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline, which loader made it, and the settings that it has from stepforge, a line each."""

    pipeline: Any  # diffusers', of one of PIPELINES or IFPipeline
    loader: str  # "from_pretrained", "from_single_file" or "source"
    assumed: tuple[str, ...] = ()

    def assuming(self, *lines: str) -> Loaded:
        return replace(self, assumed=(*self.assumed, *lines))


def load_pipeline(
    model: Path,
    source: Source,
    *,
    tokenizer: Path | None = None,
    prediction_type: str | None = None,
    config: Path | None = None,
) -> Loaded:
    """The reference's pipeline for a model whose folder or file the exporter has examined and found without code.

    tokenizer, prediction_type: as for the export. config: a diffusers folder whose configs hold for a single file; its
    weights are not read. Raises CheckpointError if neither diffusers nor the exporter loads the model, or not with `config`.
    """
    if config is not None and model.is_dir():
        raise CheckpointError(f"{model} is a folder and has configs of its own; give a config for a single file")
    with quiet():
        try:
            if model.is_dir():
                loaded = _from_pretrained(model, source, prediction_type)
            else:
                loaded = _from_single_file(model, tokenizer, prediction_type, config)
            _check_complete(loaded.pipeline)
        except MemoryError:
            raise
        except Exception as error:  # diffusers and transformers raise whatever a strange file runs into
            if config is not None:
                raise CheckpointError(
                    f"{model} is not loaded by diffusers with the configs of {config}: {reason(error)}"
                ) from error
            if source.family == "if":
                raise CheckpointError(f"{model} is not loaded by diffusers: {reason(error)}") from error
            loaded = _from_source(model, source, error)
    loaded.pipeline.set_progress_bar_config(disable=True)
    if hasattr(loaded.pipeline, "watermark"):
        loaded.pipeline.watermark = None  # SDXL's, where the package of its own is installed; the engine draws none
    return loaded


def _from_pretrained(model: Path, source: Source, prediction_type: str | None) -> Loaded:
    loaded = Loaded(pretrained(model, source), "from_pretrained", assumed_tokenizer(model / "tokenizer"))
    return _given(loaded, prediction_type)


def pretrained(model: Path, source: Source) -> Any:
    """diffusers' pipeline of a folder that the exporter has examined. Raises whatever diffusers raises."""
    weights = list(source.provenance["sha256"])
    with staging() as place:
        stage_model(model, weights, place)
        return diffusers.DiffusionPipeline.from_pretrained(
            str(place),
            torch_dtype=FP32,
            use_safetensors=True,
            local_files_only=True,
            variant=variant_among(weights),
        )


def variant_among(files: Iterable[str]) -> str | None:
    """The variant of weights that a loader must be asked for; None: the plain ones."""
    return next((variant for file in files if (variant := variant_of([Path(file)]))), None)


def _from_single_file(model: Path, tokenizer: Path | None, prediction_type: str | None, config: Path | None) -> Loaded:
    header = read_header(model)
    shapes = header.shapes
    with opened(model) as file:
        marks = {key: file.get_tensor(key) for key in MARKS if key in shapes}
    with staging() as place:
        kind = "" if config is not None else _kind(shapes)
        if config is not None:
            stage_model(config, (), place)
        else:
            for name, values in MODELS[kind].items():
                write_json(place / name, values)
        index = json.loads((place / "model_index.json").read_text("utf-8"))
        if tokenizer is not None:
            _add_tokenizers(place, index, tokenizer)
        named = index.get("_class_name")
        if named not in PIPELINES:
            raise CheckpointError(f"{config} is of a {named!r:.80}")
        pipeline = getattr(diffusers, named).from_single_file(
            str(model.resolve()), config=str(place), local_files_only=True, torch_dtype=FP32
        )
    held = sum(_size(shape) for key, shape in shapes.items() if key.startswith(UNET))
    if held != (wanted := sum(parameter.numel() for parameter in pipeline.unet.parameters())):
        raise CheckpointError(f"the UNet has {held:,} weights, diffusers' config for it {wanted:,}")
    loaded = Loaded(pipeline, "from_single_file")
    if config is not None:
        return _given(loaded, prediction_type)
    loaded = _stated(loaded, kind, marks, header.metadata, prediction_type)
    if "inpaint" in kind:
        loaded = loaded.assuming(f"{type(loaded.pipeline.scheduler).__name__}, as the base model's")
    if kind == "v2" and loaded.pipeline.scheduler.config.prediction_type == "epsilon":
        loaded.pipeline.unet.register_to_config(sample_size=SD2_BASE_SIZE)
        loaded = loaded.assuming("image size 512x512, as SD 2's epsilon models; diffusers takes all for 768x768")
    return loaded


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What diffusers takes a checkpoint for. Raises CheckpointError unless its configs are known here."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind = infer_diffusers_model_type({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    if kind not in MODELS:
        raise CheckpointError(f"diffusers takes it for {kind!r}; configs are known of {', '.join(MODELS)}")
    return str(kind)


def _add_tokenizers(folder: Path, index: Mapping[str, Any], tokenizer: Path) -> None:
    """Vocabulary and merges of the given tokenizer, where the configs bring none; its settings are those of the configs."""
    for name in ("tokenizer", "tokenizer_2"):
        if name in index and not any((folder / name / file).exists() for file in TOKENIZER):
            (folder / name).mkdir(exist_ok=True)
            for file in TOKENIZER:
                if (tokenizer / file).is_file():
                    (folder / name / file).symlink_to((tokenizer / file).resolve())


def _given(loaded: Loaded, prediction_type: str | None) -> Loaded:
    if prediction_type is None:
        return loaded
    return _with_scheduler(loaded, f"prediction type {prediction_type}: it was given", prediction_type=prediction_type)


def _stated(
    loaded: Loaded, kind: str, marks: Mapping[str, torch.Tensor], metadata: Mapping[str, str], given: str | None
) -> Loaded:
    """The prediction type and noise schedule that a single file states where diffusers' loader does not look.

    Marks: ComfyUI's keys v_pred, ztsnr and edm_vpred.sigma_max; modelspec's prediction_type and predict_key.
    """
    numbers = {key: float(value) for key, value in marks.items() if value.numel() == 1}
    if kind in XL and (highest := numbers.get("edm_vpred.sigma_max")) is not None:
        loaded.pipeline.scheduler = diffusers.EDMEulerScheduler(
            sigma_min=numbers.get("edm_vpred.sigma_min", 0.002),
            sigma_max=highest,
            sigma_data=1.0,
            prediction_type=given or "v_prediction",
            sigma_schedule="exponential",
        )
        return loaded.assuming(
            "EDMEulerScheduler, as diffusers' documentation has it for CosXL: a mark in the file says so"
        )
    said = str(metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or "").lower()
    scheduler = loaded.pipeline.scheduler
    if given is not None:
        found, why = given, "it was given"
    elif "v_pred" in marks or said.startswith("v"):
        found, why = "v_prediction", "a mark in the file says so"
    elif said:
        found, why = "epsilon" if said.startswith("eps") else said, "its metadata say so"
    elif kind == "v2" and numbers.get("global_step") == SD2_BASE_STEP:
        found, why = "epsilon", f"global_step is {SD2_BASE_STEP}"
    else:
        found, why = scheduler.config.prediction_type, "nothing in the file states it"
    loaded = _with_scheduler(loaded, f"prediction type {found}: {why}", prediction_type=found)
    if "ztsnr" in marks and found == "v_prediction":
        if "rescale_betas_zero_snr" not in scheduler.config:  # PNDM; DDIM is what diffusers' documentation names
            loaded.pipeline.scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, prediction_type=found)
        spacing = {} if kind in XL else {"timestep_spacing": "trailing"}
        line = f"zero terminal SNR, {type(loaded.pipeline.scheduler).__name__}: a mark in the file says so"
        loaded = _with_scheduler(loaded, line, rescale_betas_zero_snr=True, **spacing)
    return loaded


def _with_scheduler(loaded: Loaded, line: str, **options: Any) -> Loaded:
    scheduler = loaded.pipeline.scheduler
    if any(key not in scheduler.config for key in options):
        raise CheckpointError(f"{type(scheduler).__name__} does not know {', '.join(options)}")
    loaded.pipeline.scheduler = type(scheduler).from_config(scheduler.config, **options)
    return loaded.assuming(line)


def _from_source(model: Path, source: Source, error: Exception) -> Loaded:
    """diffusers' pipeline over networks and settings of the exporter's reading, all of them told as assumed."""
    pipeline = source_pipeline(source)
    return Loaded(
        pipeline,
        "source",
        (f"diffusers does not load {model.name} ({reason(error)}): all settings are as stepforge reads them",
         *settings_of(pipeline, source), *source.assumed),
    )  # fmt: skip


def source_pipeline(source: Source) -> Any:
    """diffusers' own pipeline in fp32, from the source's networks."""
    tokenizers = [_tokenizer(folder, pad) for folder, pad in zip(source.tokenizers, source.pads, strict=True)]
    encoders = [loader(FP32) for loader in source.text_encoders]
    config = dict(source.scheduler)
    assert source.vae is not None
    parts = {
        "unet": source.unet(FP32),
        "vae": source.vae(FP32),
        "scheduler": getattr(diffusers, config["_class_name"]).from_config(config),
        "text_encoder": encoders[0],
        "tokenizer": tokenizers[0],
    }
    if source.family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizers[1],
            force_zeros_for_empty_prompt=source.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer(folder: Path, pad: str | None) -> Any:
    """A tokenizer that fills up with its end of text ("end"), with id 0 ("zero") or as its folder says (None)."""
    with staging() as place:
        stage_component(folder, (), place)
        tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
    if pad is not None:
        tokenizer.pad_token = tokenizer.eos_token if pad == "end" else tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def settings_of(pipeline: Any, source: Source) -> Iterator[str]:
    """The settings of a pipeline that weights do not show, a line each."""
    unet, scheduler = pipeline.unet.config, pipeline.scheduler
    yield f"family {source.family}"
    yield f"UNet: attention_head_dim {unet.attention_head_dim}, sample_size {unet.sample_size}"
    for number, name in enumerate(("text_encoder", "text_encoder_2")[: len(source.text_encoders)]):
        text = getattr(pipeline, name).config
        tokenizer = getattr(pipeline, ("tokenizer", "tokenizer_2")[number])
        yield (
            f"{name}: {text.num_hidden_layers} layers, {text.num_attention_heads} heads, {text.hidden_act}, "
            f"padded with {tokenizer.pad_token!r}"
        )
    yield f"VAE: scaling_factor {pipeline.vae.config.scaling_factor}"
    yield f"scheduler: {type(scheduler).__name__}, prediction type {scheduler.config.get('prediction_type', 'epsilon')}"
    if source.family == "sdxl":
        yield f"zeros for an empty negative prompt: {'yes' if source.force_zeros_for_empty_prompt else 'no'}"


def _check_complete(pipeline: Any) -> None:
    """Raises CheckpointError if a loader has left weights out, which it does without an error."""
    for name, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            check_complete(network, name)


def check_complete(network: torch.nn.Module, name: str) -> None:
    for key, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{name} lacks {key}")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without warnings and progress bars inside the block, in any thread."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = [logger.is_progress_bar_enabled() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level, bar in zip(loggers, levels, bars, strict=True):
            logger.set_verbosity(level)
            if bar:
                logger.enable_progress_bar()
