"""A bundle written by hand: its graphs are no graphs."""

from dataclasses import replace
from pathlib import Path

import pytest

from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import (
    MANIFEST,
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    Bundle,
    Component,
    Tensor,
    sha256,
    write_manifest,
)

IMAGE = ("rows", 4, "height", "width")
SIGNATURES = {  # inputs and outputs
    "text_encoder": (
        (Tensor("input_ids", "int64", ("rows", 77)),),
        (Tensor("hidden_states", "float32", ("rows", 77, 16)),),
    ),
    "denoiser": (
        (
            Tensor("sample", "float32", IMAGE),
            Tensor("timestep", "float32", ("rows",)),
            Tensor("encoder_hidden_states", "float32", ("rows", "tokens", 16)),
        ),
        (Tensor("prediction", "float32", IMAGE),),
    ),
    "vae_decoder": (
        (Tensor("latents", "float32", IMAGE),),
        (Tensor("pixels", "float32", ("rows", 3, "8*height", "8*width")),),
    ),
}


@pytest.fixture(scope="session")
def signatures() -> dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Inputs and outputs of the fake model's networks by role."""
    return SIGNATURES


@pytest.fixture
def hand_written_bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    for name in (
        *(f"{folder}/model.onnx" for folder in ("denoiser/unet", "text_encoder", "vae_decoder")),
        "denoiser/unet/model.onnx.data",
        "tokenizer/tokenizer.json",
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() * 10)
    write_bundle(folder)
    return folder


def write_bundle(folder: Path) -> Bundle:
    fake = fake_bundle()
    card = fake.card
    encoder = replace(card.text_encoders[0], tokenizer="tokenizer/tokenizer.json")
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    bundle = Bundle(
        path=folder,
        card=replace(card, text_encoders=(encoder,)),
        scheduler=fake.scheduler,
        components={
            key: Component(f"{key.folder}/model.onnx", *SIGNATURES[key.role])
            for key in (TEXT_ENCODERS[0], UNET, VAE_DECODER)
        },
        precision="fp32",
        versions={"torch": "2"},
        source={"kind": "test"},
        files={name: ((folder / name).stat().st_size, sha256(folder / name)) for name in names},
    )
    write_manifest(bundle)
    return bundle
