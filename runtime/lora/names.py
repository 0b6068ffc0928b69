"""Which module a key of a LoRA file means.

Kohya's names separate modules by "_", which also occurs inside their names, so names are never taken apart: every module
of the model is listed under each name that some trainer gives it, and a key either is in that list or is not.

    lora_unet_down_blocks_0_attentions_0_...   kohya, SD 1 and 2 (and LyCORIS)
    lora_unet_input_blocks_4_1_...             kohya, SDXL: sgm's names
    lora_te_, lora_te1_, lora_te2_text_model_  kohya, text encoders
    unet.down_blocks.0....                     diffusers;  text_encoder., text_encoder_2.
    down_blocks.0....processor.to_q_lora       diffusers before 0.17, with or without the component's prefix
    base_model.model.down_blocks.0....         PEFT: no component, found by the module's name
    lycoris_down_blocks_0_...                  LyCORIS's wrapper around any module
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from stepforge.runtime.bundle import TEXT_ENCODERS, ComponentId, Module
from stepforge.runtime.lora.ldm_names import ldm_names

LONGEST = 512  # characters of a name; the longest of a model have about 100
Place = tuple[ComponentId, str]  # network of the bundle, path of a module in it
FIRST, SECOND = TEXT_ENCODERS
PREFIXES: dict[
    str, tuple[ComponentId | None, ...]
] = {  # prefix of a key -> networks that it can mean; None: any denoiser
    "lora_unet_": (None,),
    "lora_te1_": (FIRST,),
    "lora_te2_": (SECOND,),
    "lora_te_": (FIRST,),
    "unet.": (None,),
    "text_encoder.": (FIRST,),
    "text_encoder_2.": (SECOND,),
    "model.diffusion_model.": (None,),
    "diffusion_model.": (None,),
    "base_model.model.": (None, FIRST, SECOND),
    "lycoris_": (None, FIRST, SECOND),
    "": (None, FIRST, SECOND),
}
OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Names:
    """The modules of one model under all their names. Trainers call every denoiser "unet": with several experts, the one
    whose shapes fit is meant."""

    def __init__(self, modules: Mapping[ComponentId, Iterable[Module]]) -> None:
        """modules: network of a bundle -> its modules."""
        self._places: dict[ComponentId, dict[str, Place | None]] = {}
        for component, entries in modules.items():
            table = self._places.setdefault(component, {})
            paths = [module.path for module in entries]
            original = ldm_names(paths) if component.role == "denoiser" else {}
            for path in paths:
                for name in _names(path, original.get(path), component):
                    for alias in (name, name.replace(".", "_")):
                        # two modules with one name: the name means neither
                        table[alias] = (
                            (component, path) if table.get(alias, (component, path)) == (component, path) else None
                        )
        self._denoisers = tuple(component for component in self._places if component.role == "denoiser")

    def find(self, name: str) -> list[Place]:
        """The modules that a key, cut before its ending, can mean; a name of several networks gives several."""
        if len(name) > LONGEST:
            return []
        for prefix, meant in PREFIXES.items():
            if not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            components = [c for m in meant for c in (self._denoisers if m is None else (m,))]
            places = [
                place
                for component in components
                for spelling in _spellings(rest)
                if (place := self._places.get(component, {}).get(spelling)) is not None
            ]
            if places:
                return list(dict.fromkeys(places))
        return []


def _names(path: str, original: str | None, component: ComponentId) -> Iterator[str]:
    yield path
    if original is not None:
        yield original
    if component.role == "text_encoder":
        yield f"text_model.{path}"  # transformers dropped this prefix in 5.6; files keep it


def _spellings(rest: str) -> Iterator[str]:
    yield rest
    yield rest.replace(".base_layer", "")
    if ".processor." in rest:  # an attention processor stands for its attention
        yield rest.replace(".processor.", ".")
        yield rest.replace(".processor.to_out", ".to_out.0")
    head, _, last = rest.rpartition(".")
    if last in OLD_PROJECTIONS:
        yield f"{head}.{OLD_PROJECTIONS[last]}"
