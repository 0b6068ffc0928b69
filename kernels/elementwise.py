"""Launchers of GEGLU and of guidance with the sampler's update."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]

from stepforge.kernels import geglu_body, guide_body
from stepforge.kernels.launch import (
    FLOATS,
    Tensor,
    check_floats,
    check_packed,
    check_rows,
    check_shape,
    empty_out,
    require,
    upcast,
)


def geglu(h: Tensor, *, block_m: int = 8, block_n: int = 256) -> Tensor:
    """value · gelu(gate) of h [M, 2C] whose rows may lie apart. Returns [M, C]."""
    check_floats(h=h)
    check_rows("h", h)
    require(h.shape[1] % 2 == 0, f"h has {h.shape[1]} columns; values and gates need an even number")
    rows, width = h.shape[0], h.shape[1] // 2
    out = empty_out(h, (rows, width))
    if out.numel():
        grid = (triton.cdiv(rows, block_m), triton.cdiv(width, block_n))
        geglu_body.geglu[grid](
            h, out, rows, width, h.stride(0), BLOCK_M=block_m, BLOCK_N=block_n, enable_fp_fusion=True
        )
    return out.to(h.dtype)


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
        guide_body.guide_update[(triton.cdiv(size, block), moved)](
            prediction, guidance, table, scale_in, step, state, z, target, places, sources, size, steps,
            NUM_P=window - num_x, NUM_X=num_x, WAYS=ways, EXACT=exact, BLOCK=block, UPCAST=upcast(prediction.dtype),
            enable_fp_fusion=not exact,  # w·d + b in one rounding would be another result
        )  # fmt: skip
        if target is not sample:
            sample.copy_(target)
