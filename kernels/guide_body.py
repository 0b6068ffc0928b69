"""Triton body of guidance and update, one launch for all images of a batch.

    p = Σ_j guidance[n, k, j] · prediction[n, j]
    x_{k+1} = Σ keep·x + Σ gain·p + noise·z

`table[n, k]` holds step k's keep, gain and noise in the ring order of stepforge.runtime.slot. k is read from the device,
so one captured graph replays every step. Coefficients of 0 read nothing: what their operand holds cannot leak.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["steps"])
def guide_update(
    prediction, guidance, table, scale_in, step, state, z, sample,
    size, steps,
    NUM_P: tl.constexpr, NUM_X: tl.constexpr, WAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """prediction [n, WAYS, size] any float; guidance [n, steps, WAYS], table [n, steps, NUM_X + NUM_P + 1] and
    scale_in [n, steps + 1] fp32; step int32 [n]; state [n, NUM_X + NUM_P, size] and z [n, size] fp32; sample [n, size].

    Writes p and x_{k+1} over the oldest of their rings, and sample = scale_in[k + 1] · x_{k+1}, what the network sees
    next. Images whose plan is done are left alone.
    """
    n = tl.program_id(1)
    k = tl.load(step + n)
    if k < steps:
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < size
        row = table + (n * steps + k) * (NUM_X + NUM_P + 1)
        ring = state + n.to(tl.int64) * (NUM_X + NUM_P) * size
        guided = tl.zeros([BLOCK], dtype=tl.float32)
        for j in tl.static_range(WAYS):
            weight = tl.load(guidance + (n * steps + k) * WAYS + j)
            reach = tl.where(weight != 0.0, size, 0)
            part = tl.load(prediction + (n.to(tl.int64) * WAYS + j) * size + offs, mask=offs < reach, other=0.0)
            guided += weight * part.to(tl.float32)
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
        latent += noise * tl.load(z + n.to(tl.int64) * size + offs, mask=offs < reach, other=0.0)
        tl.store(ring + ((k + 1) % NUM_X) * size + offs, latent, mask=mask)
        seen = latent * tl.load(scale_in + n * (steps + 1) + k + 1)
        tl.store(sample + n.to(tl.int64) * size + offs, seen.to(sample.dtype.element_ty), mask=mask)
