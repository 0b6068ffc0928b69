"""GEGLU against fp64; guidance and update against fp64 and the rows of real samplers."""

from __future__ import annotations

import pytest
import torch

from stepforge.kernels import bounds, gated, reference, update

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 66), (16, 512), (9, 1030)], ids=str)
def test_geglu(shape, dtype):
    h = (torch.randn(shape) * 3).to(dtype)
    exact, bound = bounds.geglu(h)
    assert bounds.excess(gated.geglu(h), exact, bound) <= 1.0


def test_geglu_is_exact_gelu():
    """The tanh form differs by up to 4.7e-4, five times what fp16 rounds at gates near 2."""
    gate = torch.linspace(-6, 6, 4001)
    h = torch.stack([torch.ones_like(gate), gate], dim=1)
    exact, bound = bounds.geglu(h)
    assert bounds.excess(gated.geglu(h, block_m=1024, block_n=2), exact, bound) <= 1.0
    approximate = torch.nn.functional.gelu(gate, approximate="tanh")[:, None]
    assert bounds.excess(approximate, exact, bound) > 100


def test_geglu_rows_may_lie_apart():
    store = torch.full((9, 100), torch.nan).half()
    store[:, :40] = torch.randn(9, 40)
    assert torch.equal(gated.geglu(store[:, :40]), gated.geglu(store[:, :40].contiguous()))


def test_geglu_empty():
    assert gated.geglu(torch.empty(0, 8).half()).shape == (0, 4)


def whole(*values):
    return torch.tensor(values, dtype=torch.int32)


def batch(images=2, ways=2, size=37, steps=3, num_x=2, num_p=3, dtype=HALF):
    """Image i at place i, its rows side by side."""
    window = num_x + num_p
    return {
        "prediction": torch.randn(images * ways, size).to(dtype),
        "guidance": torch.randn(images, steps, ways),
        "table": torch.randn(images, steps, window + 1),
        "scale_in": torch.rand(images, steps + 1) + 0.5,
        "step": torch.arange(images, dtype=torch.int32) % steps,
        "state": torch.randn(images, window, size),
        "z": torch.randn(images, size),
        "places": torch.arange(images, dtype=torch.int32),
        "sources": torch.arange(images * ways, dtype=torch.int32).view(images, ways),
    }


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
@pytest.mark.parametrize("rings", [(1, 1), (2, 3), (3, 2), (1, 5)], ids=str)
def test_update_equals_reference(rings, dtype):
    """Sums of at most 10 products in fp32, in one order: 16 roundings of the sum of sizes."""
    num_x, num_p = rings
    given = batch(num_x=num_x, num_p=num_p, dtype=dtype)
    wide = {name: v.double() if v.is_floating_point() else v for name, v in given.items()}
    exact, seen = reference.guide_update(**wide, num_x=num_x)
    sizes, _ = reference.guide_update(
        **{name: v.abs() if v.is_floating_point() else v for name, v in wide.items()}, num_x=num_x
    )
    sample = torch.full((2, 37), torch.nan).to(dtype)
    update.guide_update(**given, sample=sample, num_x=num_x, block=16)
    assert ((given["state"] - exact).abs() <= 16 * 2.0**-24 * sizes).all()
    assert torch.isfinite(sample).all()
    k = given["step"].tolist()
    slots = torch.stack([sizes[n, (k[n] + 1) % num_x] * wide["scale_in"][n, k[n] + 1] for n in range(2)])
    assert bounds.excess(sample, seen, bounds.rounded_to(dtype, seen, 20 * 2.0**-24 * slots)) <= 1.0


def test_coefficients_of_0_read_nothing():
    """Rows that a step does not use may hold anything: unguided rows, old latents, noise that was not drawn."""
    given = batch(images=1)
    given["step"][:] = 1
    given["guidance"][0, 1] = torch.tensor([1.0, 0.0])
    given["prediction"][1] = torch.nan
    given["table"][0, 1] = torch.tensor([0.0, 0.5, 0.0, 2.0, 0.0, 0.0])  # x_1 in place 1, p_1 in place 3
    given["state"][0, [0, 2, 4]] = torch.nan
    given["z"][:] = torch.nan
    x, p = given["state"][0, 1].clone(), given["prediction"][0].float()
    sample = torch.empty(1, 37).half()
    update.guide_update(**given, sample=sample, num_x=2)
    assert torch.equal(given["state"][0, 3], p)
    assert torch.equal(given["state"][0, 0], 0.5 * x + 2.0 * p)


def test_finished_images_are_left_alone():
    given = batch()
    given["step"][:] = torch.tensor([3, 0])
    before = given["state"].clone()
    sample = torch.full((2, 37), 7.0).half()
    update.guide_update(**given, sample=sample, num_x=2)
    assert torch.equal(given["state"][0], before[0])
    assert (sample[0] == 7).all()
    assert not torch.equal(given["state"][1], before[1])


def test_images_anywhere_in_the_pool():
    """Some places of many, one with one row and one with two: those move as alone, and the others stay."""
    given = batch(images=4)
    before = {name: given[name].clone() for name in ("state", "step")}
    given["guidance"][2, 2] = torch.tensor([1.0, 0.0])
    given["places"], given["sources"] = whole(3, 2), whole([1, 4], [0, 99])
    sample = torch.full((4, 37), 7.0).half()
    alone = {name: value[3:] for name, value in batch_of(given).items()} | {
        "prediction": given["prediction"][[1, 4]], "places": whole(0), "sources": whole([0, 1])}  # fmt: skip
    own = torch.zeros(1, 37).half()
    update.guide_update(**alone, sample=own, num_x=2)
    update.guide_update(**given, sample=sample, num_x=2)
    assert torch.equal(given["state"][:2], before["state"][:2])
    assert torch.equal(given["state"][3], alone["state"][0])
    assert torch.equal(sample[3], own[0])
    assert (sample[:2] == 7).all()
    assert torch.equal(given["state"][2, 2 + 2], given["prediction"][0].float())
    assert torch.equal(given["step"], before["step"])


def batch_of(given):
    names = ("guidance", "table", "scale_in", "step", "state", "z")
    return {name: given[name].clone() for name in names}


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
def test_exact_guidance_has_the_bits_of_a_pipeline(dtype):
    """diffusers' noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond), in the network's type; and the
    rows themselves where one ran."""
    given = batch(images=3, size=1000, dtype=dtype)
    given["step"][:] = 0
    given["guidance"][:, 0] = torch.tensor([[7.5, -6.5], [1.0, 0.0], [0.0, 1.0]])
    rows = given["prediction"].view(3, 2, 1000)
    pipeline = rows[0, 1] + 7.5 * (rows[0, 0] - rows[0, 1])
    sample = torch.empty(3, 1000).to(dtype)
    wide, _ = reference.guide_update(**given, num_x=2, exact=True)
    update.guide_update(**given, sample=sample, num_x=2, exact=True)
    for state in (given["state"], wide):
        for image, expected in enumerate((pipeline, rows[1, 0], rows[2, 1])):
            assert torch.equal(state[image, 2], expected.float())
    linear, _ = reference.guide_update(**batch_of(given), **{k: given[k] for k in ("prediction", "places", "sources")},
                                       num_x=2)  # fmt: skip
    assert not torch.equal(linear[0, 2], wide[0, 2])


def test_exact_guidance_is_of_two_rows():
    given = batch(ways=3)
    with pytest.raises(ValueError, match="two predictions, not 3"):
        update.guide_update(**given, sample=torch.empty(2, 37).half(), num_x=2, exact=True)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "unipc", "euler_a"])
def test_follows_the_engine(sampler):
    """A whole plan through the kernel gives the latents of the rows in fp64, noise and guidance included."""
    from stepforge.runtime.bundle.scheduler import SchedulerCard
    from stepforge.runtime.plan.sampling.sample import sample_steps

    rows, start = sample_steps(SchedulerCard(sampler=sampler), sampler=sampler, steps=6)
    num_x, num_p = max(len(row.keep) for row in rows), max(len(row.gain) for row in rows)
    table = torch.zeros(1, len(rows), num_x + num_p + 1)
    for k, row in enumerate(rows):
        for i, value in enumerate(row.keep):
            table[0, k, (k - i) % num_x] = value
        for j, value in enumerate(row.gain):
            table[0, k, num_x + (k - j) % num_p] = value
        table[0, k, -1] = row.noise
    weight = 4.5
    guidance = torch.tensor([[[weight, 1 - weight]] * len(rows)])
    scale_in = torch.tensor([[row.scale_in for row in rows] + [1.0]])
    state = torch.zeros(1, num_x + num_p, 20)
    state[0, 0] = start * torch.randn(20)
    latents, predictions = [state[0, 0].double()], []
    step = torch.zeros(1, dtype=torch.int32)
    sample = torch.empty(1, 20)
    for k, row in enumerate(rows):
        cond, uncond, z = torch.randn(3, 20)
        predictions.append((uncond + weight * (cond - uncond)).double())
        x = sum(c * latents[k - i] for i, c in enumerate(row.keep))
        x = x + sum(c * predictions[k - j] for j, c in enumerate(row.gain)) + row.noise * z.double()
        latents.append(x)
        prediction = torch.stack([cond, uncond])
        update.guide_update(
            prediction, guidance, table, scale_in, step, state, z[None], sample, whole(0), whole([0, 1]), num_x
        )
        step += 1
        own = state[0, (k + 1) % num_x].double()
        assert ((own - x).abs() <= 1e-5 * (1 + x.abs().max())).all()
        assert torch.allclose(sample[0].double(), own * scale_in[0, k + 1], rtol=1e-6)
