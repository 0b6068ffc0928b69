"""What export refuses before it traces anything."""

import pytest

from stepforge.export.build import check_widths
from stepforge.export.models.load import load
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET
from stepforge.runtime.errors import CheckpointError

# the tiny SDXL's text encoders make 32 + 48 numbers a token and 40 of pooled text
REFUSED = {
    "another context": ({"cross_attention_dim": 64}, "make 32 \\+ 48 numbers a token, the UNet takes 64"),
    "a refiner's five sizes": (
        {"addition_time_embed_dim": 9},
        "takes 34 numbers of pooled text beside six sizes, .* make 40",
    ),
    "no room for text": ({"addition_time_embed_dim": 99}, "projection_class_embeddings_input_dim leaves -506"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_text_encoders_that_do_not_fit(tiny_sdxl, change, reason):
    networks = {key: make() for key, make in load(tiny_sdxl).empty.items()}
    check_widths(networks)
    networks[UNET].register_to_config(**change)
    with pytest.raises(CheckpointError, match=reason):
        check_widths(networks)


def test_one_text_encoder_of_two(tiny_sdxl):
    networks = {key: make() for key, make in load(tiny_sdxl).empty.items()}
    del networks[TEXT_ENCODERS[1]]
    with pytest.raises(CheckpointError, match="make 32 numbers a token, the UNet takes 80"):
        check_widths(networks)
