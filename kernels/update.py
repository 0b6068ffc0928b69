"""Triton body of guidance and update, one launch for all images of a batch.

    p = Σ_j guidance[image, k, j] · prediction[sources[n, j]]
    x_{k+1} = Σ keep·x + Σ gain·p + noise·z

`table[image, k]` holds step k's keep, gain and noise in the ring order of engine.state. image = places[n] and k =
step[image] are read from the device, so one captured graph replays every step of any images. Coefficients of 0 read
nothing: what their operand holds cannot leak.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import torch
import triton
import triton.language as tl
from torch import Tensor

from stepforge.kernels.launch import FLOATS, check_floats, check_packed, check_shape, require, upcast
from stepforge.kernels.lowrank import rounded


@triton.jit
def rounded_to(value, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 through `dtype` and back."""
    if UPCAST:
        return rounded(value, dtype, UPCAST)
    else:
        return value.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["steps"])
def guide_update_kernel(
    prediction, guidance, table, scale_in, step, state, z, sample, places, sources,
    size, steps,
    NUM_P: tl.constexpr, NUM_X: tl.constexpr, WAYS: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """prediction [R, size] any float; places [n] and sources [n, WAYS] int32; guidance [P, steps, WAYS], table
    [P, steps, NUM_X + NUM_P + 1] and scale_in [P, steps + 1] fp32; step int32 [P]; state [P, NUM_X + NUM_P, size] and
    z [P, size] fp32; sample [P, size]. EXACT: b + w·(a − b) with every result rounded, for two ways.

    Writes p and x_{k+1} over the oldest of their rings, and sample = scale_in[k + 1] · x_{k+1}, what the network sees
    next. Images whose plan is done are left alone.
    """
    n = tl.program_id(1)
    image = tl.load(places + n)
    k = tl.load(step + image)
    if k < steps:
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < size
        at = image.to(tl.int64)
        weights = guidance + (at * steps + k) * WAYS
        row = table + (at * steps + k) * (NUM_X + NUM_P + 1)
        ring = state + at * (NUM_X + NUM_P) * size
        guided = tl.zeros([BLOCK], dtype=tl.float32)
        for j in tl.static_range(WAYS):
            weight = tl.load(weights + j)
            reach = tl.where(weight != 0.0, size, 0)
            source = tl.load(sources + n * WAYS + j).to(tl.int64) * size
            part = tl.load(prediction + source + offs, mask=offs < reach, other=0.0).to(tl.float32)
            guided += weight * part
        if EXACT:
            w = tl.load(weights)
            reach = tl.where((w != 0.0) & (tl.load(weights + 1) != 0.0), size, 0)
            cond = tl.load(sources + n * WAYS).to(tl.int64) * size
            uncond = tl.load(sources + n * WAYS + 1).to(tl.int64) * size
            a = tl.load(prediction + cond + offs, mask=offs < reach, other=0.0).to(tl.float32)
            b = tl.load(prediction + uncond + offs, mask=offs < reach, other=0.0).to(tl.float32)
            kind: tl.constexpr = tl.bfloat16 if UPCAST else prediction.dtype.element_ty
            scaled = rounded_to(w * rounded_to(a - b, kind, UPCAST), kind, UPCAST)
            guided = tl.where(offs < reach, rounded_to(b + scaled, kind, UPCAST), guided)
        tl.store(ring + (NUM_X + k % NUM_P) * size + offs, guided, mask=mask)
        latent = tl.zeros([BLOCK], dtype=tl.float32)
        for i in tl.static_range(NUM_X):
            keep = tl.load(row + i)
            reach = tl.where(keep != 0.0, size, 0)
            latent += keep * tl.load(ring + i * size + offs, mask=offs < reach, other=0.0)
        for j in tl.static_range(NUM_P):
            gain = tl.load(row + NUM_X + j)
            reach = tl.where(gain != 0.0, size, 0)
            old = tl.load(ring + (NUM_X + j) * size + offs, mask=offs < reach, other=0.0)
            latent += gain * tl.where(j == k % NUM_P, guided, old)
        noise = tl.load(row + NUM_X + NUM_P)
        reach = tl.where(noise != 0.0, size, 0)
        latent += noise * tl.load(z + at * size + offs, mask=offs < reach, other=0.0)
        tl.store(ring + ((k + 1) % NUM_X) * size + offs, latent, mask=mask)
        seen = latent * tl.load(scale_in + at * (steps + 1) + k + 1)
        tl.store(sample + at * size + offs, seen.to(sample.dtype.element_ty), mask=mask)


def guide_update(
    prediction: Tensor, guidance: Tensor, table: Tensor, scale_in: Tensor, step: Tensor, state: Tensor, z: Tensor,
    sample: Tensor, places: Tensor, sources: Tensor, num_x: int, *, exact: bool = False, block: int = 1024,
) -> None:  # fmt: skip
    """One step of the images at `places`, in place on `state` and `sample`; shapes as in `reference.guide_update`.

    `step` is read, not advanced: add 1 to it after the launch, inside the same graph. A place may stand there once.
    """
    images, window, size = state.shape
    moved, ways = sources.shape
    steps = table.shape[1]
    require(prediction.dtype in FLOATS and sample.dtype in FLOATS, "prediction and sample must be floats")
    require(0 < num_x < window, f"num_x is {num_x} of {window} rows; both rings need one at least")
    require(not exact or ways == 2, f"exact guidance is of two predictions, not {ways}")
    check_floats(guidance=guidance, table=table, scale_in=scale_in, state=state, z=z)
    integers = (step, places, sources)
    require(state.dtype == torch.float32, f"state must be float32, not {state.dtype}")
    require(all(index.dtype == torch.int32 for index in integers), "step, places and sources must be int32")
    check_shape("prediction", prediction, (prediction.shape[0], size))
    check_shape("guidance", guidance, (images, steps, ways))
    check_shape("table", table, (images, steps, window + 1))
    check_shape("scale_in", scale_in, (images, steps + 1))
    check_shape("step", step, (images,))
    check_shape("places", places, (moved,))
    check_shape("z", z, (images, size))
    check_shape("sample", sample, (images, size))
    check_packed(
        prediction=prediction, guidance=guidance, table=table, scale_in=scale_in, step=step, state=state, z=z,
        sample=sample, places=places, sources=sources,
    )  # fmt: skip
    if moved and size:
        # the interpreter cannot round to bf16: it writes fp32, and torch rounds
        target = sample.float() if upcast(sample.dtype) else sample
        guide_update_kernel[(triton.cdiv(size, block), moved)](
            prediction, guidance, table, scale_in, step, state, z, target, places, sources, size, steps,
            NUM_P=window - num_x, NUM_X=num_x, WAYS=ways, EXACT=exact, BLOCK=block, UPCAST=upcast(prediction.dtype),
            enable_fp_fusion=not exact,  # w·d + b in one rounding would be another result
        )  # fmt: skip
        if target is not sample:
            sample.copy_(target)
