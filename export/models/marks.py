"""Noise schedule and prediction type of a single file: what its keys and metadata state, what is assumed where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepforge.export.models.weights import Header
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

V, EPSILON = "v_prediction", "epsilon"
SAID = {  # values in metadata: kohya's trainers and ComfyUI write "v" and "epsilon"
    "v": V, "v_prediction": V, "v-prediction": V, "v_pred": V, "epsilon": EPSILON, "eps": EPSILON, "sample": "sample",
}  # fmt: skip
STATED = ("modelspec.prediction_type", "modelspec.predict_key")  # kohya's trainers, ComfyUI
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # empty weights of these names, as ComfyUI and NoobAI's trainers write them
EDM_V = ("edm_vpred.sigma_max", "edm_vpred.sigma_min")
INPUT, MASKED = "model.diffusion_model.input_blocks.0.0.weight", 9  # its channels in an inpainting model
MOST_SIGMA = 1000.0  # what ComfyUI's editor of noise levels allows
SD2_BASE_STEP = 875000  # global_step of the epsilon checkpoints of SD 2.0, the only mark they carry
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULERS: dict[str, dict[str, Any]] = {  # what the model cards of the three families name
    "sd1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    "sd2": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
}
# For zero terminal SNR: diffusers' documentation names DDIM, trailing; the model card of NoobAI, SDXL's own scheduler.
ZERO_SNR: dict[str, dict[str, Any]] = {
    "sd1": SCHEDULERS["sd2"] | {"timestep_spacing": "trailing"},
    "sd2": SCHEDULERS["sd2"] | {"timestep_spacing": "trailing"},
    "sdxl": SCHEDULERS["sdxl"],
}


def read_marks(
    path: Path, header: Header, family: str, given: str | None, scalar: Callable[[str], float | None]
) -> tuple[dict[str, Any], list[str]]:
    """The scheduler's config, and what was assumed for it.

    given: prediction type that the user states, which overrides the file's. scalar: reads a weight of one number; None if
    there is none of the name, or it is another kind of weight.
    Raises CheckpointError for kinds of models that are not supported.
    """
    if EDM_V[0] in header.shapes or EDM_V[1] in header.shapes:
        config = _edm(path, family, given, scalar)
        return config, [
            "scheduler: EDMEulerScheduler with sigma_data 1, as CosXL's; the file states its noise levels only"
        ]
    assumed: list[str] = []
    prediction = given or _prediction(path, header, family, scalar, assumed)
    config = dict(SCHEDULERS[family])
    if ZERO_SNR_KEY in header.shapes:
        if prediction == V:
            config = ZERO_SNR[family] | {"rescale_betas_zero_snr": True}
        else:
            assumed.append(
                f"noise schedule: not rescaled to zero terminal SNR, although the file has the key {ZERO_SNR_KEY}, "
                f"because it predicts {prediction}"
            )
    assumed.append(f"scheduler: {config['_class_name']}, as the family's model card; a single file states none")
    assumed.append("betas: scaled_linear from 0.00085 to 0.012, as the family's model card; a single file states none")
    return config | BETAS | {"prediction_type": prediction}, assumed


def _edm(path: Path, family: str, given: str | None, scalar: Callable[[str], float | None]) -> dict[str, Any]:
    """Continuous noise levels of CosXL, as ComfyUI reads them: sigma_data 1, and the file's range, to 120 from 0.002."""
    highest, lowest = (scalar(key) for key in EDM_V)
    lowest = 0.002 if lowest is None else lowest
    if family != "sdxl" or highest is None or not 0 < lowest < highest <= MOST_SIGMA:
        raise CheckpointError(
            f"{path} is an EDM v-prediction checkpoint of {family} with noise levels from {lowest:g} to {highest}; supported: "
            f"SDXL's (CosXL), with levels above 0, to {MOST_SIGMA:g} at most"
        )
    return {
        "_class_name": "EDMEulerScheduler",
        "sigma_data": 1.0,
        "sigma_max": highest,
        "sigma_min": lowest,
        "sigma_schedule": "exponential",
        "prediction_type": given or V,
    }


def _prediction(
    path: Path, header: Header, family: str, scalar: Callable[[str], float | None], assumed: list[str]
) -> str:
    said = {key: header.metadata[key] for key in STATED if header.metadata.get(key)}
    for key, value in said.items():
        if value.lower() not in SAID:
            raise CheckpointError(
                f"{path} states {key}={printable(value, 60)!r}; known: {', '.join(SAID)}; if one of them holds, pass "
                "--prediction-type"
            )
    stated = {SAID[value.lower()] for value in said.values()}
    if V_KEY in header.shapes:  # ComfyUI's rule: the key decides
        if stated - {V}:
            assumed.append(f"prediction_type: {V}, by the key {V_KEY}, although the file's metadata states another")
        return V
    if len(stated) > 1:
        raise CheckpointError(f"{path} states two prediction types ({', '.join(sorted(said))}); pass --prediction-type")
    if stated:
        return stated.pop()
    silent = "because neither the file's keys nor its metadata state one"
    if family == "sd2":  # diffusers' rules
        if scalar("global_step") == SD2_BASE_STEP:
            return EPSILON
        if header.shapes.get(INPUT, ())[1:2] == (MASKED,):
            assumed.append(f"prediction_type: {EPSILON}, as SD 2's inpainting model, {silent}")
            return EPSILON
        assumed.append(f"prediction_type: {V}, {silent}; SD 2 base models need --prediction-type epsilon")
        return V
    assumed.append(f"prediction_type: {EPSILON}, {silent}")
    return EPSILON
