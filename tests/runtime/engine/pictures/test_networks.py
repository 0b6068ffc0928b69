"""Feed-forward networks against spandrel's own call, and pictures in tiles, on every engine."""

from dataclasses import replace

import numpy as np
import pytest

from stepforge import Engine, Init, Request
from stepforge.runtime.backends import open_backend
from stepforge.runtime.bundle import Footprint, read
from stepforge.runtime.engine.pictures.networks import Pictures, Tiling, pad
from stepforge.runtime.errors import BundleError, CheckpointError, RequestError


def psnr(a, b):
    return -10 * np.log10(np.mean((np.asarray(a, np.float64) - b) ** 2) + 1e-30)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random networks of every layout: old and new names of ESRGAN, behind a pixel unshuffle, Compact, SPAN."""
    import torch
    from safetensors.torch import save_file

    from stepforge.export.models.pixel.feedforward import spandrel

    spandrel()
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.ESRGAN import ESRGAN
    from spandrel.architectures.SPAN import SPAN

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    old = ESRGAN(num_filters=8, num_blocks=1, scale=4)
    nets = {
        "unshuffled": ESRGAN(in_nc=12, num_filters=8, num_blocks=1, scale=4, shuffle_factor=2).state_dict(),
        "compact": Compact(num_feat=8, num_conv=1, upscale=2).state_dict(),
        "span": SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2).state_dict(),
    }
    names = {"model.0": "conv_first", "model.1.sub.1": "conv_body", "model.3": "conv_up1", "model.6": "conv_up2"}
    names |= {"model.8": "conv_hr", "model.10": "conv_last"}
    new = {}
    for key, value in old.state_dict().items():
        stem, _, leaf = key.rpartition(".")
        if ".RDB" in stem:
            stem = stem.replace("model.1.sub.", "body.").replace("RDB", "rdb").removesuffix(".0")
        new[f"{names.get(stem, stem)}.{leaf}"] = value
    nets["esrgan"] = new
    for name, state in nets.items():
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    save_file({"model.0.weight": torch.zeros(3)}, folder / "odd.safetensors")
    swin = {"layers.0.residual_group.blocks.0.norm1.weight": torch.zeros(3), "conv_first.weight": torch.zeros(3)}
    swin |= {"layers.0.residual_group.blocks.0.mlp.fc1.bias": torch.zeros(3)}
    swin |= {"layers.0.residual_group.blocks.0.attn.relative_position_index": torch.zeros(3)}
    save_file(swin, folder / "swin.safetensors")
    (folder / "net.pth").write_bytes(b"PK\x03\x04")
    return folder


@pytest.fixture(scope="module")
def bundle(files, tiny_sd1, tmp_path_factory):
    from stepforge.export.build import export_bundle

    stages = {name: files / f"{name}.safetensors" for name in ("esrgan", "unshuffled", "compact", "span")}
    return export_bundle(tiny_sd1, tmp_path_factory.mktemp("bundles") / "sr", upscalers=stages)


def test_networks_are_spandrels(files, bundle, backends):
    """A size that needs padding (17 x 22 for multiples of 4) and one that a mirror cannot fill (1 x 2)."""
    import torch

    from stepforge.export.models.pixel.feedforward import read_feed_forward

    bundle = read(bundle.path)
    for engine in backends:
        pictures = Pictures(bundle, open_backend(engine, bundle, precision="fp32"))
        for stage, card in bundle.stages.items():
            reference = read_feed_forward(files / f"{stage}.safetensors").load(torch.float32)
            for height, width in ((17, 22), (3, 2)):
                image = np.random.default_rng(height).random((3, height, width), np.float32)
                wanted = reference(torch.from_numpy(image[None]))[0].numpy()
                found = pictures.upscale(image, stage)
                assert found.shape == (3, height * card.scale, width * card.scale) == wanted.shape
                assert psnr(found, wanted) >= 60, (engine, stage)


def test_verify_covers_networks(files, bundle, tiny_sd1):
    from stepforge.export.parity.verify import verify

    paths = {name: files / f"{name}.safetensors" for name in bundle.stages}
    options = {"backends": ["onnxruntime"], "precisions": ["fp32"], "prompts": ["a cat"], "steps": 2, "store": False}
    verdict = verify(bundle.path, tiny_sd1, upscalers=paths, **options)
    checks = {(check["level"], check["name"]): check["passed"] for check in verdict["checks"]}
    for name in bundle.stages:
        assert checks["component", f"{name} network"]
        assert checks["image", f"stage {name}"]
    assert verdict["passed"]


def test_tiles_keep_the_budget_and_the_picture(bundle):
    """A receptive field of some 20 pixels, overlaps of 16: what differs from the whole is far below one 8-bit level."""
    bundle = read(bundle.path)
    backend = open_backend("onnxruntime", bundle, precision="fp32")
    key = next(key for key in bundle.components if key.role == "upscaler" and key.stage == "compact")
    footprint = bundle.components[key].footprint
    image = np.random.default_rng(0).random((3, 150, 90), np.float32)
    tiling = Tiling(int(footprint(70 * 60)))
    tile = tiling.tile(footprint, 150, 90, 1, "it")
    assert tile is not None
    assert footprint(tile.height * tile.width) <= tiling.memory
    whole, tiled = (Pictures(bundle, backend, which).upscale(image, "compact") for which in (Tiling(), tiling))
    assert psnr(tiled, whole) >= 60
    latents = np.random.default_rng(1).standard_normal((4, 48, 40)).astype(np.float32)
    for one in (Tiling(kind="diffusers"), Tiling(int(bundle.components[_decoder(bundle)].footprint(36**2)))):
        assert Pictures(bundle, backend, one).decode(latents).shape == (3, 96, 80)


def _decoder(bundle):
    return next(key for key in bundle.components if key.role == "vae_decoder")


def test_footprint_reads_no_weights(tiny_sd1_bundle, tmp_path):
    """Weights of 1 KB and more stand outside the graph: of a real VAE's, the affine of its norms too, which operators that
    shapes are computed by read."""
    import onnx

    from stepforge.export.graph.footprint import footprint

    bundle = read(tiny_sd1_bundle)
    entry = bundle.components[_decoder(bundle)]
    model = onnx.load(bundle.file(entry.graph), load_external_data=False)
    inside = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert {tensor.data_location for tensor in inside} > {onnx.TensorProto.EXTERNAL}
    for tensor in inside:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.dims and tensor.dims[0] >= 32:
            onnx.external_data_helper.set_external_data(tensor, "nowhere.data", 0, 4)
            tensor.ClearField("raw_data")
    onnx.save(model, tmp_path / "model.onnx")
    assert footprint(tmp_path / "model.onnx", None) == replace(entry.footprint, tile=0)


def test_budgets_and_settings_are_refused():
    with pytest.raises(RequestError, match="at least 1024000"):
        Tiling(1000).tile(Footprint(1000.0), 64, 64, 1, "the network")
    for options in ({"memory": 0}, {"memory": True}, {"memory": 1.5}, {"kind": "best"}):
        with pytest.raises(RequestError):
            Tiling(**options)
    from stepforge.runtime.backends.fake import fake_bundle

    fake = fake_bundle()
    if any(entry.footprint is None for key, entry in fake.components.items() if key.role == "vae_decoder"):
        with pytest.raises(BundleError, match="cannot be tiled"):
            Pictures(fake, open_backend("fake", fake), Tiling(1 << 30))


@pytest.mark.parametrize(
    ("network", "request_fields"),
    [
        ("vae_decoder", {}),
        ("vae_encoder", {"init": Init(image=np.zeros((64, 64, 3), np.uint8))}),
        ("sr/x4/vae_decoder", {"upscale": "x4"}),
        ("sr/x2/vae_encoder", {"upscale": ["nearest", "x2"]}),
        ("sr/nearest/upscaler", {"upscale": "nearest"}),
        ("sr/nearest/upscaler", {"upscale": {"name": "nearest", "image": np.zeros((64, 64, 3), np.uint8)}}),
    ],
)
def test_pictures_without_a_tile_are_refused_when_they_are_submitted(network, request_fields):
    """By each network on their way whose memory is bounded; with one byte a position they all pass."""
    from stepforge.runtime.backends.fake import fake_bundle

    fake = fake_bundle()
    request = Request(prompt="", width=64, height=64, steps=2, **request_fields)
    for size in (1.0, 1e9):
        parts = {
            key: replace(entry, footprint=Footprint(size if str(key) == network else 1.0))
            for key, entry in fake.components.items()
        }
        assert network in map(str, parts)
        bundle = replace(fake, components=parts)
        with Engine(bundle, open_backend("fake", bundle), tiling=Tiling(1 << 20)) as engine:
            if size == 1.0:
                engine.submit(request).cancel()
                continue
            with pytest.raises(RequestError, match=f"tile_memory is 1048576 bytes; {network} needs at least"):
                engine.submit(request)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("odd", "no super-resolution network"),
        ("swin", "SwinIR network"),
        ("net.pth", "pickle"),
        ("absent", "No such file"),
    ],
)
def test_other_files_are_refused_in_one_line(files, name, match):
    from stepforge.export.models.pixel.feedforward import read_feed_forward

    with pytest.raises(CheckpointError, match=match) as error:
        read_feed_forward(files / (name if "." in name else f"{name}.safetensors"))
    assert "\n" not in str(error.value)


def test_padding_is_spandrels():
    import torch

    from stepforge.export.models.pixel.feedforward import spandrel

    sizes = spandrel().SizeRequirements(minimum=8, multiple_of=4)
    from spandrel.__helpers.size_req import pad_tensor

    for height, width in ((3, 9), (8, 8), (1, 30)):
        image = np.random.default_rng(0).random((3, height, width), np.float32)
        _, wanted = pad_tensor(torch.from_numpy(image[None]), sizes)
        np.testing.assert_array_equal(pad(image, 4, 8), wanted[0].numpy())
