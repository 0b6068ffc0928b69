"""Shapes that plans are built for: from the declared use to every input of every component."""

import pytest

from stepforge.runtime.backends.tensorrt.profiles import Range, Use, profiles
from stepforge.runtime.bundle import UNET, VAE_DECODER, VAE_ENCODER, ComponentId, read
from stepforge.runtime.errors import BackendError


def test_profiles_of_every_component(tiny_sd1_control_bundle):
    """Rows and sides as declared; without a ControlNet residuals of one row, with one those that it gives."""
    bundle = read(tiny_sd1_control_bundle)
    use = Use.parse(bundle, ("1..2", "3..8"), "64..128")
    found = {key: profiles(bundle, key, use) for key in bundle.components}
    for key, shapes in found.items():
        dynamic = {t.name for t in bundle.components[key].inputs if any(isinstance(s, str) for s in t.shape)}
        assert all(profile.keys() == dynamic for profile in shapes), key
        for profile in shapes:
            assert all(s.holds(s.low) and s.holds(s.best) and s.holds(s.high) for s in profile.values())
    bare, full, _, wide = found[UNET]
    assert bare["sample"] == full["sample"]
    assert (full["sample"].low, full["sample"].best, full["sample"].high) == (
        (1, 4, 32, 32),
        (2, 4, 32, 32),
        (2, 4, 64, 64),
    )
    assert wide["sample"].high == (8, 4, 64, 64)
    assert wide["encoder_hidden_states"].high == (8, 4 * 77, 32)
    assert bare["residual_0"].high == (1, 32, 1, 1) == full["residual_0"].low
    assert full["residual_0"].high == (2, 32, 64, 64)
    assert wide["residual_4"].best == (8, 64, 16, 16)
    assert len(found[VAE_DECODER]) == 2
    assert found[VAE_DECODER][1]["latents"].high == (8, 4, 64, 64)
    assert found[VAE_ENCODER][1]["pixels"].high == (8, 3, 128, 128)
    net = sorted(bundle.controls)[0]
    assert found[ComponentId("control_hint", net)][0]["image"].best == (2, 3, 64, 64)
    kept = ComponentId("denoiser", "unet", "deepcache")
    assert found[kept][-1]["deep"].high[0] == 8  # as OpenVINO infers it from the whole network
    tgate = found[ComponentId("denoiser", "unet", "tgate")][-1]
    assert {shape.high[0] for name, shape in tgate.items() if name.startswith("text_")} == {8}


def test_sizes_of_stages(tiny_stages_bundle):
    bundle = read(tiny_stages_bundle)
    use = Use.parse(bundle, ("1..2",), None)
    for stage, scale in (("x4", 4), ("x2", 2)):
        model = bundle.stages[stage].model
        side = bundle.card.width * (scale if stage == "x4" else 4 * scale) // model.vae_scale
        denoiser = next(key for key in bundle.components if key.stage == stage and key.role == "denoiser")
        assert profiles(bundle, denoiser, use)[0]["sample"].high[2:] == (side, side)


@pytest.mark.parametrize("text", ["", "0", "8..1", "1..", "1..100", "x", "1..2..3", "1000000000"])
def test_ranges_that_make_no_sense(text):
    with pytest.raises(
        BackendError, match=r"--rows .* is not understood; give LOW\.\.HIGH or one number, from 1 to 64"
    ):
        Range.parse("--rows", text, 64)


def test_sizes_that_the_model_cannot_run(tiny_sd1_bundle):
    with pytest.raises(BackendError, match="--size 65 is no multiple of"):
        Use.parse(read(tiny_sd1_bundle), ("1",), "65")
