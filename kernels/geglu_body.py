"""Triton body of GEGLU: out = value · gelu(gate), gelu(g) = g·(1 + erf(g/√2))/2, the exact erf of diffusers' GEGLU."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def geglu(h, out, rows, width, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """h [rows, 2·width] with `stride` elements a row: values, then gates. One rounding, at the end."""
    first = tl.program_id(0) * BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (first + lanes < rows)[:, None] & (cols < width)[None, :]
    near = h + first.to(tl.int64) * stride + lanes[:, None] * stride + cols[None, :]
    value = tl.load(near, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(near + width, mask=mask, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    there = out + first.to(tl.int64) * width + lanes[:, None] * width + cols[None, :]
    tl.store(there, y.to(out.dtype.element_ty), mask=mask)
