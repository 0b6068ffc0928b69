"""Sums of images that no norm reads, and nearest upsampling by two, which writes the sum that it reads."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import torch
import triton
import triton.language as tl
from torch import Tensor

from stepforge.kernels.launch import check_floats, check_shape, empty_out, require
from stepforge.kernels.norms import pixel_rows


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def image_sum_kernel(
    x, residual, shift, out, pixels, height, width, C, stride_x, stride_residual,
    SCALE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, RESIDUAL: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """out [B, SCALE·height, SCALE·width, C] from images of height·width pixels; a program writes BLOCK_P pixels."""
    at = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = at % (width * SCALE)
    line = at // (width * SCALE)
    image = line // (height * SCALE)
    near = (image * height + line % (height * SCALE) // SCALE) * width + column // SCALE
    ok = (at < pixels)[:, None] & (cs < C)[None, :]
    v = tl.load(x + near[:, None].to(tl.int64) * stride_x + cs[None, :], mask=ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        far = residual + near[:, None].to(tl.int64) * stride_residual + cs[None, :]
        v += tl.load(far, mask=ok, other=0.0).to(tl.float32)
    if SHIFT:
        v += tl.load(shift + cs, mask=cs < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at[:, None].to(tl.int64) * C + cs[None, :], v.to(out.dtype.element_ty), mask=ok)


def image_sum(x: Tensor, residual: Tensor | None = None, shift: Tensor | None = None, *, scale: int = 1) -> Tensor:
    """x + residual + shift, every pixel `scale` times in each direction; as in `reference.image_sum`."""
    check_floats(x=x, residual=residual, shift=shift)
    require(x.ndim == 4, f"x has shape {tuple(x.shape)}; it must be [B, C, H, W]")
    batch, channels, height, width = x.shape
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
    if shift is not None:
        check_shape("shift", shift, (channels,))
    shape = (batch, channels, height * scale, width * scale)
    out = torch.empty(shape, device=x.device, dtype=empty_out(x, ()).dtype, memory_format=torch.channels_last)
    if out.numel():
        pixels = batch * height * width * scale * scale
        block_c = min(64, triton.next_power_of_2(channels))
        image_sum_kernel[(triton.cdiv(pixels, 32), triton.cdiv(channels, block_c))](
            x, residual if residual is not None else x, shift if shift is not None else x, out, pixels, height, width,
            channels, pixel_rows("x", x), pixel_rows("residual", residual) if residual is not None else 0,
            SCALE=scale, BLOCK_P=32, BLOCK_C=block_c, RESIDUAL=residual is not None, SHIFT=shift is not None,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out.to(x.dtype)
