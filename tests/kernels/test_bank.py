"""The shrink over LoRA banks, in Triton's interpreter, against its fp64 bound."""

import pytest
import torch

from stepforge.kernels import bank, bounds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "depth", "ranks"), [(1, 16, 4), (37, 150, 16), (70, 96, 48), (33, 64, 80)])
def test_shrink_is_within_its_bound(dtype, tokens, depth, ranks):
    """Tails in every direction, a slot of zeros, a strength of 0, slots that no row uses holding NaN."""
    rows, slots = 3, 4
    x, banked = torch.randn(rows, tokens, depth).to(dtype), (torch.randn(slots, depth, ranks) / 7).to(dtype)
    banked[0], banked[3] = 0, torch.nan
    adapter = torch.tensor([2, 0, 1], dtype=torch.int32)
    strength = torch.tensor([0.7371, 1.0, -1.9113])
    found = bank.bank_shrink(x, banked, adapter, strength)
    exact, bound = bounds.bank_shrink(x, banked, adapter, strength)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= bound).all()
    assert not found[1].any()
    assert not bank.bank_shrink(x, banked, adapter, torch.zeros(rows)).any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("t_ok[:, None] & (ks < K)[None, :]", "t_ok[:, None] & (ks < 2 * K)[None, :]"),
        ("(ks < K)[:, None] & r_ok[None, :]", "(ks < 2 * K)[:, None] & r_ok[None, :]"),
        ("total *= tl.load(strength + row)", "total *= tl.load(strength)"),
        ("slot = tl.load(adapter + row)", "slot = tl.load(adapter)"),
        ("+ at_t)[:, None] * R + at_r[None, :]", "+ at_t)[:, None] * K + at_r[None, :]"),
        ("mask=t_ok[:, None] & r_ok[None, :]", "mask=t_ok[:, None]"),
    ],
)
def test_mistakes_are_caught(mutant, old, new):
    """Each of these in the body is out of the bound, or reaches what lies beside the tensors."""
    mutant(bank, old, new)
    with pytest.raises((AssertionError, IndexError, ValueError, RuntimeError)):
        guarded_shrink()


def guarded_shrink():
    rows, tokens, depth, ranks, guard = 2, 19, 40, 24, 4096

    def guarded(tensor):
        buffer = torch.full((tensor.numel() + 2 * guard,), torch.nan, dtype=tensor.dtype)
        return buffer[guard : guard + tensor.numel()].view(tensor.shape).copy_(tensor)

    x, banked = guarded(torch.randn(rows, tokens, depth).half()), guarded((torch.randn(3, depth, ranks) / 7).half())
    adapter, strength = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0.7371, -1.9113])
    outs = []

    def empty(like, shape):
        outs.append(torch.full((rows * tokens * ranks + 2 * guard,), 77.0, dtype=like.dtype))
        return outs[-1][guard:-guard].view(shape)

    kept, bank.empty_out = bank.empty_out, empty
    try:
        found = bank.bank_shrink(x, banked, adapter, strength)
    finally:
        bank.empty_out = kept
    exact, bound = bounds.bank_shrink(x, banked, adapter, strength)
    assert ((found.double() - exact).abs() <= bound).all()
    assert (outs[0][:guard] == 77).all()
    assert (outs[0][-guard:] == 77).all()


def test_unmutated_kernel_leaves_its_surroundings_alone():
    guarded_shrink()


def test_what_it_does_not_take():
    x, banked = torch.zeros(2, 3, 16).half(), torch.zeros(3, 16, 4).half()
    adapter, strength = torch.zeros(2, dtype=torch.int32), torch.ones(2)
    for changed, why in (
        ({"bank": banked[:, :8]}, "bank has shape"),
        ({"adapter": adapter.long()}, "adapter is int32"),
        ({"strength": strength[:1]}, "strength has shape"),
        ({"bank": banked.float()}, "kernels take one of"),
    ):
        with pytest.raises(ValueError, match=why):
            bank.bank_shrink(**({"x": x, "bank": banked, "adapter": adapter, "strength": strength} | changed))
