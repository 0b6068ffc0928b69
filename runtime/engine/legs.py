"""The legs of a request: which models its images pass, in which sizes, and what each hands to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from stepforge.runtime.bundle import VAE_ENCODER, Bundle, ModelCard, Size
from stepforge.runtime.checks import shown
from stepforge.runtime.engine.state import Leg
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import MAX_SIDE, image_size
from stepforge.runtime.plan import Plan
from stepforge.runtime.plan.compile import check_text
from stepforge.runtime.plan.stages import compile_stage
from stepforge.runtime.request import Request

MAX_MADE = 4 * MAX_SIDE  # pixels a side of what stages make: the largest image that is read, through x4


def legs_of(request: Request, bundle: Bundle, base: Callable[[], Plan]) -> list[Leg]:
    """The base model and the request's stages; the stages alone where the first one is given an image.

    base: makes the base model's plan. Raises RequestError for a stage or a size that cannot be run.
    """
    given = request.upscale[0].image if request.upscale else None
    legs: list[Leg] = []
    if request.init is not None and given is not None:
        raise RequestError(
            "init is an image for the base model, which is not run on an image for a stage; give one of them"
        )
    if given is None:
        model = bundle.card
        if bundle.reads_mask and (request.init is None or request.init.mask is None):
            raise RequestError(f"{model.name} is an inpainting model; give an init image and a mask")
        size = model.size(request.width, request.height) if request.init is None else _init_size(request, bundle)
        plan = base()
        check_text(plan, model)
        legs.append(Leg(plan, size))
        last: ModelCard | None = model
    else:
        if request.controls or request.adapters:
            raise RequestError("the base model is not run on a given image; leave controls and adapters out")
        size, last = Size(*image_size(given)), None
    for upscale in request.upscale:
        plan = compile_stage(upscale, bundle)
        card = bundle.stages[upscale.name]
        reads_latents = card.kind == "x2" and last is not None and _same_latents(last, card.model)
        size = Size(size.width * card.scale, size.height * card.scale)
        what = f"stage {shown(upscale.name)}"
        if max(size.width, size.height) > MAX_MADE:
            raise RequestError(f"{what} would make {size.width}x{size.height}; a side has at most {MAX_MADE} pixels")
        if card.model is not None:
            check_text(plan, card.model)
            try:
                card.model.size(size.width, size.height)
            except RequestError as error:
                raise RequestError(f"{what} would make {size.width}x{size.height}: {error}") from error
        if (
            card.kind == "x2"
            and not reads_latents
            and replace(VAE_ENCODER, stage=upscale.name) not in bundle.components
        ):
            raise RequestError(
                f"{what} reads latents of its own VAE, and the bundle has no encoder to make them of pictures"
            )
        legs.append(Leg(plan, size, upscale.name, card=card, upscale=upscale, reads_latents=reads_latents))
        last = card.model
    return legs


def _init_size(request: Request, bundle: Bundle) -> Size:
    """Size of the picture that an image is turned into: as asked, or the image's own, down to the model's multiple."""
    init, card = request.init, bundle.card
    assert init is not None
    if VAE_ENCODER not in bundle.components:
        raise RequestError(
            "the bundle has no VAE encoder, which an init image needs; export it again from a model that has one"
        )
    width, height = (side // card.size_multiple * card.size_multiple for side in image_size(init.image))
    if not (width and height) and None in (request.width, request.height):
        raise RequestError(f"the init image is smaller than {card.size_multiple} pixels; give width and height")
    return card.size(request.width or width, request.height or height)


def _same_latents(made: ModelCard, read: ModelCard | None) -> bool:
    """Whether a stage can read the latents that a model makes: SD's, of one scale; SDXL's are another space."""
    return read is not None and all(
        getattr(made, name) == getattr(read, name) for name in ("latent_channels", "vae_scale", "scaling_factor")
    )
