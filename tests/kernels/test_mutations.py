"""The checks must be able to fail: each of these mistakes in a body is caught by them."""

from __future__ import annotations

import functools

import pytest
import torch

from stepforge.kernels import bounds, conv, lowrank, norms, reference, sums, update, wide
from stepforge.kernels.dispatch.tiles import Tile
from stepforge.kernels.packing import block_table

pytestmark = pytest.mark.slow
TILE = Tile(16, 32, 32, warps=4, stages=2)
GUARD = 4096


def guarded(tensor):
    buffer = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype)
    inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def inputs(*, only_adapter=False):
    """Tails in every direction, two strengths, NaN around every input. only_adapter: W = 0, one rank, one input,
    so that the low-rank term is one product and its bound has no slack."""
    m, k, n, r = 19, 150, 41, 32
    given = {
        "x": torch.randn(m, k).half(),
        "w": (torch.randn(n, k) / 7).half() * (not only_adapter),
        "a": (torch.randn(2, 1, r, k) / 7).half(),
        "b": torch.randn(2, n, r).half(),
    }
    if only_adapter:
        given["x"][:, 1:] = 0
    given = {name: guarded(tensor) for name, tensor in given.items()}
    given["scale"] = torch.tensor([[[0.7371, -1.9113]], [[1.0, 0.3331]]])
    given["ranks"] = torch.tensor([1, 1] if only_adapter else [27, 27], dtype=torch.int32)
    given["table"] = None
    if not only_adapter:
        given["x"] = guarded(torch.randn(21, k).half())
        given["table"] = block_table([0, -1, 1], 7, 16)
        given["a"][:, :, 27:] = torch.nan
        given["b"][..., 27:] = torch.nan
    return given


def passes(path, *, only_adapter=False):
    """Whether the path is within its bound on the inputs above and leaves the memory around its output alone."""
    given = inputs(only_adapter=only_adapter)
    first = [given[name] for name in ("x", "w", "a", "b", "scale", "ranks")]
    outs = []

    def empty(like, shape):
        outs.append(torch.full((shape[0] * shape[1] + 2 * GUARD,), 77.0, dtype=like.dtype))
        return outs[-1][GUARD:-GUARD].view(shape)

    kept, lowrank.empty_out = lowrank.empty_out, empty
    try:
        if path == "onepass":
            result = lowrank.onepass(*first, tile=TILE, nt=2, table=given["table"])
        else:
            result = lowrank.split(*first, tile=TILE, parts=2, table=given["table"])
    finally:
        lowrank.empty_out = kept
    clean = all((out[:GUARD] == 77).all() and (out[-GUARD:] == 77).all() for out in outs)
    exact, bound = bounds.lowrank_linear(**given)
    return bool(clean) and bounds.excess(result, exact, bound) <= 1.0


@functools.cache
def unmutated(check, *arguments, **options):
    """Whether the body as it stands passes, once for all its mutants."""
    return check(*arguments, **options)


K_MASK = "x = loaded(x_rows + ks[None, :], row_ok[:, None] & (ks < K)[None, :], UPCAST)"
MUTATIONS = {
    "K of x not masked": ("onepass", K_MASK, K_MASK.replace(" & (ks < K)[None, :]", "")),
    "K of x not masked in the shrink": (
        "split",
        "xs = loaded(x_rows + ks[None, :], row_ok[:, None] & (ks < K)[None, :], UPCAST)",
        "xs = loaded(x_rows + ks[None, :], row_ok[:, None], UPCAST)",
    ),
    "columns of w not masked": (
        "split",
        "w = loaded(w_cols + ks[:, None], (ks < K)[:, None] & col_ok[None, :], UPCAST)",
        "w = loaded(w_cols + ks[:, None], col_ok[None, :], UPCAST)",
    ),
    "rank of a not masked": (
        "onepass",
        "al = loaded(a_cols + ks[:, None], k_ok[:, None] & rank_ok[None, :], UPCAST)",
        "al = loaded(a_cols + ks[:, None], k_ok[:, None], UPCAST)",
    ),
    "rank of b not masked": (
        "split",
        "bs = loaded(b_cols + offs_r[:, None], rank_ok[:, None] & col_ok[None, :], UPCAST)",
        "bs = loaded(b_cols + offs_r[:, None], col_ok[None, :], UPCAST)",
    ),
    "columns not masked in the store": (
        "onepass",
        "acc.to(out.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])",
        "acc.to(out.dtype.element_ty), mask=row_ok[:, None])",
    ),
    "last tile of K skipped": (
        "split",
        "for k in range(0, K, BLOCK_K):\n        ks",
        "for k in range(0, K - BLOCK_K, BLOCK_K):\n        ks",
    ),
    "last tile of K skipped in one pass": (
        "onepass",
        "for k in range(0, K, BLOCK_K):\n                    ks",
        "for k in range(0, K - BLOCK_K, BLOCK_K):\n                    ks",
    ),
    "second part of K skipped": (
        "split",
        "for i in tl.static_range(1, SPLIT):",
        "for i in tl.static_range(1, 1):",
    ),
    "strengths in another order": (
        "onepass",
        "strength = tl.load(scale + at * (R // 16) + offs_r // 16)\n                s",
        "strength = tl.load(scale + at * (R // 16) + (R - 1 - offs_r) // 16)\n                s",
    ),
    "no adapter taken for the first": (
        "split",
        "if adapter >= 0:\n            kind",
        "if adapter >= -1:\n            kind",
    ),
    "S of the first tile of columns only": (
        "onepass",
        "acc = tl.dot(s, bs, acc, input_precision=\"ieee\")\n            there",
        "acc += 0.0\n            there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MUTATIONS)
# a mutant reads memory that is not its own; what it finds there may overflow, or be infinite
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_caught(case, mutant):
    path, old, new = MUTATIONS[case]
    assert unmutated(passes, path)
    mutant(lowrank, old, new)
    assert not passes(path)


@pytest.mark.parametrize("path", ["onepass", "split"])
def test_strength_after_the_rounding_is_caught(path, mutant):
    """Three roundings where the bound allows one: the order of strength and rounding."""
    name = {"onepass": "s = rounded(total * strength[None, :], kind, UPCAST)"}.get(
        path, "low = rounded(total * strength[None, :], kind, UPCAST)"
    )
    late = name.split(" = ")[0] + " = rounded(total, kind, UPCAST) * strength[None, :].to(kind)"
    assert unmutated(passes, path, only_adapter=True)
    mutant(lowrank, f" {name}", f" {late}")
    assert not passes(path, only_adapter=True)


def norm_passes():
    """Tails in every direction, a large mean, a second source, the sum written."""
    torch.manual_seed(6)
    x, other, residual = (torch.randn(2, c, 9, 11) + 30 for c in (20, 10, 20))
    x, other, residual = (image.half().to(memory_format=torch.channels_last) for image in (x, other, residual))
    weight, bias, extra = torch.randn(30).half(), torch.randn(30).half(), torch.randn(20).half()
    shift = torch.randn(2, 30).half()
    given = {"other": other, "residual": residual, "shift": shift, "extra": extra, "keep": True}
    y, total = norms.group_norm(x, weight, bias, 6, 1e-5, **given, block=256, splits=3, whole=0)
    expected, kept = bounds.group_norm(x, weight, bias, 6, 1e-5, **given)
    return bounds.excess(y, *expected) <= 1.0 and bounds.excess(total, *kept) <= 1.0


NORM_MUTATIONS = {
    "squares about 0": ("apart = tl.where(ok, v - pivot, 0.0)", "apart = tl.where(ok, v + 30.0 * pivot, 0.0)"),
    "tail counted": ("apart = tl.where(ok, v - pivot, 0.0)", "apart = v - pivot"),
    "difference of the means forgotten": ("own, 0.0) + count * apart * apart", "own, 0.0)"),
    "parts' means not merged": ("squares + counts * apart * apart", "squares"),
    "extra left in": ("v -= tl.load(extra + cs[None, :]", "v -= 0.0 * tl.load(extra + cs[None, :]"),
    "shift of the first image": ("far = shift + image.to(tl.int64) * stride_shift + cs[None, :]\n            v += "
                                 "tl.load(far, mask=ok", "far = shift + cs[None, :]\n            v += tl.load(far, mask=ok"),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", ["squares about 0", *(pytest.param(case, marks=pytest.mark.long) for case in [*NORM_MUTATIONS][1:])]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_norm_mistake_caught(case, mutant):
    assert unmutated(norm_passes)
    mutant(norms, *NORM_MUTATIONS[case])
    assert not norm_passes()


def rows_pass():
    """LayerNorm of rows that lie apart, with a large mean, a shift before it, a tail of rows and of channels."""
    torch.manual_seed(7)
    x = torch.full((1100, 24), torch.nan).half()
    x[:, :20] = torch.randn(1100, 20) + 300
    weight, bias, pre = (guarded(torch.randn(20).half()) for _ in range(3))
    out = torch.full((1110, 24), 77.0).half()  # more rows than are asked for: a mutant writes there
    y = wide.layer_norm(x[:, :20], weight, bias, 1e-5, pre=pre, out=out[:1100, :20])
    exact, bound = bounds.layer_norm(x[:, :20], weight, bias, 1e-5, pre=pre)
    return bounds.excess(y, exact, bound) <= 1.0 and bool((out[:, 20:] == 77).all())


ROWS_MUTATIONS = {
    "channels beyond the row in the mean": ("mean = tl.sum(tl.where(ok, v, 0.0), axis=1) / C",
                                            "mean = tl.sum(v, axis=1) / BLOCK_C"),
    "tail in the variance": ("apart = tl.where(ok, v - mean[:, None], 0.0)", "apart = v - mean[:, None]"),
    "squares about 0": ("tl.sum(apart * apart, axis=1) / C + eps", "tl.sum(v * v, axis=1) / C - mean * mean + eps"),
    "pre forgotten": ("v += tl.load(pre + cs, mask=cs < C, other=0.0)", "v += 0.0 * tl.load(pre + cs, mask=cs < C, other=0.0)"),
    "rows dense on the way out": ("lanes[:, None] * stride_out", "lanes[:, None] * C"),
    "channels of the row not masked": ("tl.store(there, y.to(out.dtype.element_ty), mask=ok)",
                                       "tl.store(there, y.to(out.dtype.element_ty), mask=(first + lanes < M)[:, None])"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS_MUTATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_layer_norm_mistake_caught(case, mutant):
    assert unmutated(rows_pass)
    mutant(wide, *ROWS_MUTATIONS[case])
    assert not rows_pass()


def sums_pass():
    """Two images doubled, tails of pixels and of channels, NaN around every input."""
    torch.manual_seed(8)
    x, residual = (guarded(torch.randn(2, 5, 7, 24).half())[..., :20].permute(0, 3, 1, 2) for _ in range(2))
    shift = guarded(torch.randn(20).half())
    exact, bound = bounds.image_sum(x, residual, shift, scale=2)
    return bounds.excess(sums.image_sum(x, residual, shift, scale=2), exact, bound) <= 1.0


SUM_MUTATIONS = {
    "lines not repeated": ("line % (height * SCALE) // SCALE", "line % (height * SCALE) // 1"),
    "columns not repeated": ("* width + column // SCALE", "* width + column // 1"),
    "the first image for all": ("near = (image * height", "near = (0 * image * height"),
    "residual forgotten": ("v += tl.load(far", "v += 0.0 * tl.load(far"),
    "residual dense": ("* stride_residual", "* C"),
    "shift of the first channels": ("v += tl.load(shift + cs, mask=cs < C", "v += tl.load(shift + cs % 4, mask=cs < C"),
}  # fmt: skip


@pytest.mark.parametrize("case", SUM_MUTATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sum_mistake_caught(case, mutant):
    assert unmutated(sums_pass)
    mutant(sums, *SUM_MUTATIONS[case])
    assert not sums_pass()


def conv_passes():
    """A tail in each direction, a border, two adapters, none in the middle image."""
    torch.manual_seed(3)
    a, b = torch.randn(2, 16, 3, 3, 20).half() / 13, torch.randn(2, 24, 16).half()
    a[:, 12:], b[..., 12:] = torch.nan, torch.nan
    given = {
        "y": torch.randn(3, 5, 7, 24).half(),
        "x": guarded(torch.randn(3, 5, 7, 20).half()),
        "a": a,
        "b": b,
        "scale": torch.tensor([[[0.7]], [[-1.3]]]),
        "ranks": torch.tensor([12, 12], dtype=torch.int32),
        "table": block_table([0, -1, 1], 35, 16),
    }
    exact, bound = bounds.lowrank_conv(**given)
    return bounds.excess(conv.lowrank_conv(**given, tile=TILE), exact, bound) <= 1.0


CONV_MUTATIONS = {
    "left of the image not masked": (" & (z >= 0)", ""),
    "below the image not masked": (" & (y < height)", ""),
    "taps transposed": ("y = top + tap // SIDE", "y = top + tap % SIDE"),
    "last channels skipped": ("c_blocks = tl.cdiv(C, BLOCK_K)", "c_blocks = C // BLOCK_K + 0 * BLOCK_K"),
    "the first adapter for all": ("a + adapter.to(tl.int64) * R", "a + 0 * adapter.to(tl.int64) * R"),
}


@pytest.mark.parametrize("case", CONV_MUTATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_convolution_mistake_caught(case, mutant):
    assert unmutated(conv_passes)
    mutant(conv, *CONV_MUTATIONS[case])
    assert not conv_passes()


def update_passes(*, exact):
    """Two of four images at steps that wrap both rings, one of them on a single row; what they must not read is NaN."""
    torch.manual_seed(4)
    size, places = 37, torch.tensor([3, 1], dtype=torch.int32)
    given = {
        "prediction": guarded(torch.randn(5, size).half()),
        "guidance": torch.randn(4, 6, 2) + 3.0,
        "table": torch.randn(4, 6, 6),
        "scale_in": torch.rand(4, 7) + 0.5,
        "step": torch.tensor([0, 4, 0, 5], dtype=torch.int32),
        "state": guarded(torch.randn(4, 5, size)),
        "z": torch.randn(4, size),
        "places": places,
        "sources": torch.tensor([[4, 2], [1, 3]], dtype=torch.int32),
    }
    given["guidance"][1, 4] = torch.tensor([1.0, 0.0])
    given["prediction"][[0, 3]] = torch.nan
    given["z"][1], given["table"][1, 4, -1] = torch.nan, 0.0
    sample = guarded(torch.full((4, size), 7.0).half())
    expected, seen = reference.guide_update(**given, num_x=2, exact=exact)
    update.guide_update(**given, sample=sample, num_x=2, exact=exact, block=16)
    right = torch.allclose(given["state"], expected, rtol=1e-5, atol=1e-5)
    if exact:  # the guided predictions to the bit
        right = right and all(torch.equal(given["state"][p, 2:], expected[p, 2:]) for p in places)
    seen[[0, 2]] = 7.0
    return right and torch.allclose(sample, seen, rtol=2e-3, atol=2e-3)


UPDATE_MUTATIONS = {
    "places ignored": (False, "image = tl.load(places + n)", "image = n"),
    "rows in order": (False, "tl.load(sources + n * WAYS + j).to(tl.int64) * size", "(n * WAYS + j) * size"),
    "the other row's weight": (False, "weight = tl.load(weights + j)", "weight = tl.load(weights + WAYS - 1 - j)"),
    "step of another image": (False, "k = tl.load(step + image)", "k = tl.load(step + n)"),
    "over another prediction": (False, "(NUM_X + k % NUM_P) * size", "(NUM_X + (k + 1) % NUM_P) * size"),
    "the latent before": (False, "(k + 1) % NUM_X) * size", "k % NUM_X) * size"),
    "next scale": (False, "(steps + 1) + k + 1)", "(steps + 1) + k)"),
    "rows of weight 0 read": (False, "mask=offs < reach, other=0.0).to(tl.float32)\n            guided", "mask=mask, "
                              "other=0.0).to(tl.float32)\n            guided"),
    "one rounding of three": (True, "scaled = rounded_to(w * rounded_to(a - b, kind, UPCAST), kind, UPCAST)",
                              "scaled = w * (a - b)"),
    "guidance the wrong way": (True, "rounded_to(a - b, kind", "rounded_to(b - a, kind"),
}  # fmt: skip


@pytest.mark.parametrize("case", UPDATE_MUTATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_update_mistake_caught(case, mutant):
    exact, old, new = UPDATE_MUTATIONS[case]
    assert unmutated(update_passes, exact=exact)
    mutant(update, old, new)
    assert not update_passes(exact=exact)
