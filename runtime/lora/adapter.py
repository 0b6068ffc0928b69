"""A LoRA file as an `Adapter`: one `Layer` for each module that it changes, and a reason for each key that it does not.

Formats: PEFT (a folder, or its file with adapter_config.json beside it), diffusers old and new, kohya for SD 1, 2 and XL,
LyCORIS. Only safetensors is read. `names.py` says how modules are called, ENDINGS how their tensors are.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import ComponentId, Module
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.files import escaped
from stepforge.runtime.lora.file import Contents, Tensor, opened
from stepforge.runtime.lora.layers import BIASES, Layer, check
from stepforge.runtime.lora.names import Names, Place
from stepforge.runtime.lora.peft import PeftConfig, brief

log = logging.getLogger(__name__)

ENDINGS: dict[str, tuple[str, str]] = {  # ending of a key -> kind of layer, role of the tensor in it
    ".lora_down.weight": ("lora", "down"), ".lora_up.weight": ("lora", "up"), ".lora_mid.weight": ("lora", "mid"),
    ".lora_A.weight": ("lora", "down"), ".lora_B.weight": ("lora", "up"), ".lora_B.bias": ("lora", "up_bias"),
    ".lora.down.weight": ("lora", "down"), ".lora.up.weight": ("lora", "up"),
    ".lora_linear_layer.down.weight": ("lora", "down"), ".lora_linear_layer.up.weight": ("lora", "up"),
    "_lora.down.weight": ("lora", "down"), "_lora.up.weight": ("lora", "up"),
    ".lora_magnitude_vector": ("lora", "magnitude"), ".lora_magnitude_vector.weight": ("lora", "magnitude"),
    ".hada_w1_a": ("loha", "w1_a"), ".hada_w1_b": ("loha", "w1_b"), ".hada_t1": ("loha", "t1"),
    ".hada_w2_a": ("loha", "w2_a"), ".hada_w2_b": ("loha", "w2_b"), ".hada_t2": ("loha", "t2"),
    ".lokr_w1": ("lokr", "w1"), ".lokr_w1_a": ("lokr", "w1_a"), ".lokr_w1_b": ("lokr", "w1_b"),
    ".lokr_w2": ("lokr", "w2"), ".lokr_w2_a": ("lokr", "w2_a"), ".lokr_w2_b": ("lokr", "w2_b"),
    ".lokr_t2": ("lokr", "t2"),
    ".weight": ("ia3", "weight"), ".on_input": ("ia3", "on_input"),
    ".diff": ("full", "diff"), ".diff_b": ("full", "diff_b"), ".w_norm": ("full", "diff"), ".b_norm": ("full", "diff_b"),
    ".bias": ("bias", "bias"),
    ".alpha": ("", "alpha"), ".dora_scale": ("", "dora_scale"),
}  # fmt: skip
FOREIGN = {  # ending -> a method that is no sum of weights, or one that changes what is not a weight
    ".oft_blocks": "OFT", ".oft_diag": "OFT", ".rescale": "OFT", ".oft_r": "OFT", ".oft_r.weight": "OFT",
    ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA", ".b2.weight": "GLoRA", ".bm.weight": "GLoRA",
    ".lora_embedding_A": "LoRA of a token embedding", ".lora_embedding_B": "LoRA of a token embedding",
}  # fmt: skip
BY_LENGTH = sorted((*ENDINGS, *FOREIGN), key=len, reverse=True)
NEEDED: dict[str, tuple[tuple[set[str], ...], ...]] = {  # kind -> groups of alternatives, one of each must be there
    "lora": (({"down", "up"},),),
    "loha": (({"w1_a", "w1_b", "w2_a", "w2_b"},),),
    "lokr": (({"w1"}, {"w1_a", "w1_b"}), ({"w2"}, {"w2_a", "w2_b"})),
    "full": (({"diff"}, {"diff_b"}),),
    "ia3": (({"weight", "on_input"},),),
    "bias": (({"bias"},),),
}
EITHER = (  # roles that exclude each other
    ("w1", "w1_a"), ("w1", "w1_b"), ("w2", "w2_a"), ("w2", "w2_b"), ("w2", "t2"), ("magnitude", "dora_scale"),
)  # fmt: skip
SINGLE = ("alpha", "on_input")  # roles of one number
Roles = dict[str, tuple[str, Tensor]]  # role -> kind of layer, and its tensor
DECOMPOSED = ("lora", "loha", "lokr")  # kinds that have a form with magnitudes (DoRA)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a file changes of a model."""

    file: str
    sha256: str
    layers: Mapping[Place, Layer]
    names: Mapping[Place, str]  # as the file calls them
    refused: Mapping[str, str] = field(default_factory=dict)  # name in the file -> why nothing is done with it

    @property
    def components(self) -> list[ComponentId]:
        return sorted({component for component, _ in self.layers})

    def warn_of_refused(self) -> None:
        """Log that parts of the file are not used."""
        if self.refused:
            name, why = next(iter(self.refused.items()))
            total = len(self.refused) + len(self.layers)
            log.warning(
                "%s: %d of %d layers are not used, such as %s: %s; see `stepforge lora inspect`",
                self.file, len(self.refused), total, brief(name), escaped(why),
            )  # fmt: skip


def read_adapter(path: str | Path, modules: Mapping[ComponentId, Iterable[Module]]) -> Adapter:
    """Read a LoRA file for a model.

    modules: component of the bundle -> its modules. Raises AdapterError if the file is no safetensors, holds NaN, names
    a tensor twice, is made for another model (no module fits, or the shapes do not) or needs arithmetic that is unknown.
    """
    with opened(Path(path)) as contents:
        return resolve(contents, modules)


def survey(path: str | Path) -> dict[str, Layer | str]:
    """What a file holds under its own names, without a model: a layer, or why it is none. Raises AdapterError."""
    refused: dict[str, str] = {}
    found: dict[str, Layer | str] = {}
    with opened(Path(path)) as contents:
        for name, roles in _grouped(contents, refused).items():
            try:
                found[name] = _layer(name, roles, contents.configs)
            except ValueError as error:
                found[name] = str(error)
                continue
            for _, tensor in roles.values():
                tensor.check()
    if not found | refused:
        raise AdapterError(f"{contents.name} holds no tensors")
    return found | refused


def resolve(contents: Contents, modules: Mapping[ComponentId, Iterable[Module]]) -> Adapter:
    """The tensors of a file as layers of a model; those that fit no module are not read.

    Raises AdapterError, see `read_adapter`.
    """
    table = {(component, module.path): module for component, entries in modules.items() for module in entries}
    names = Names(modules)
    layers: dict[Place, Layer] = {}
    called: dict[Place, str] = {}
    refused: dict[str, str] = {}
    misfits: list[str] = []
    groups = _grouped(contents, refused)
    for name, roles in groups.items():
        places = names.find(name)
        if not places:  # before anything is computed from the name, which can be hostile
            refused[name] = "the model has no such module"
            continue
        try:
            layer = _layer(name, roles, contents.configs)
        except ValueError as error:
            refused[name] = str(error)
            continue
        reasons: dict[Place, str] = {}
        for place in places:
            try:
                _check_fit(layer, table[place])
            except ValueError as error:
                reasons[place] = str(error)
        fitting = [place for place in places if place not in reasons]
        if not fitting:
            misfits.append(f"{places[0][0]} {places[0][1]}: {reasons[places[0]]}")
        elif len(fitting) > 1:
            refused[name] = f"it could mean {' or '.join(str(component) for component, _ in fitting)}"
        elif fitting[0] in layers:
            raise AdapterError(
                f"{contents.name}: {brief(called[fitting[0]])} and {brief(name)} are the same module of the model"
            )
        else:
            layers[fitting[0]], called[fitting[0]] = layer, name
    if misfits:
        raise AdapterError(
            f"{contents.name} is made for another model: {misfits[0]}"
            + (f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else "")
        )
    if not layers:
        some = ", ".join(f"{brief(name)} ({why})" for name, why in list(refused.items())[:2]) or "it is empty"
        raise AdapterError(f"{contents.name} changes nothing in this model: {some}")
    read = {place: _read(layer, groups[called[place]]) for place, layer in layers.items()}
    return Adapter(contents.name, contents.sha256(), read, called, refused)


def _read(layer: Layer, roles: Roles) -> Layer:
    """The layer with its numbers."""
    magnitude = next((roles[role][1].load() for role in ("magnitude", "dora_scale") if role in roles), None)
    return replace(layer, tensors={role: roles[role][1].load() for role in layer.tensors}, magnitude=magnitude)


def _grouped(contents: Contents, refused: dict[str, str]) -> dict[str, Roles]:
    """Module name in the file -> role -> kind and tensor; what has no known ending goes to `refused`."""
    groups: dict[str, Roles] = defaultdict(dict)
    for key, tensor in contents.tensors.items():
        # PEFT's own name for it
        plain = key.replace(".default.", ".") if ".lora_" in key else key.removesuffix(".default")
        ending = next((ending for ending in BY_LENGTH if plain.endswith(ending)), None)
        if ending is None:
            refused[key] = "not a key of any known LoRA format"
        elif ending in FOREIGN:
            refused[plain.removesuffix(ending)] = f"{FOREIGN[ending]} is not supported"
        else:
            kind, role = ENDINGS[ending]
            name = plain.removesuffix(ending)
            if kind == "bias":
                name = name.removesuffix(".base_layer")  # module that has a LoRA pair as well
            if role in groups[name]:
                raise AdapterError(f"{contents.name} gives the {role} of {brief(name)} twice")
            groups[name][role] = kind, tensor
    for name in refused:
        groups.pop(name, None)
    for config in contents.configs.values():
        config.check_work(sum(map(len, groups)))
    return groups


def _layer(name: str, roles: Roles, configs: Mapping[str, PeftConfig]) -> Layer:
    """The layer in outline: its shapes, and the single numbers that say how it is meant.

    Raises ValueError if the tensors of a module do not make a layer.
    """
    kinds = {kind for kind, _ in roles.values()} - {""}
    tensors = {role: tensor.load() if role in SINGLE and math.prod(tensor.shape) == 1 else tensor.outline
               for role, (_, tensor) in roles.items()}  # fmt: skip
    for role, tensor in tensors.items():
        if not tensor.ndim and role not in SINGLE:
            raise ValueError(f"its {role} is a single number")
    if "weight" in tensors and "on_input" not in tensors:
        raise ValueError("a whole weight, not a change of one (PEFT's modules_to_save); not supported")
    if kinds == {"lora", "bias"}:  # PEFT's bias="all" or "lora_only"
        kinds = {"lora"}
    if len(kinds) != 1:
        raise ValueError("tensors of several kinds" if kinds else "a scale without anything to scale")
    kind = kinds.pop()
    for alternatives in NEEDED[kind]:
        if not any(needed <= tensors.keys() for needed in alternatives):
            raise ValueError(f"incomplete: it has {', '.join(sorted(tensors))}")
    if kind == "loha" and ("t1" in tensors) != ("t2" in tensors):
        raise ValueError("incomplete: it has one of t1 and t2")
    for one, other in EITHER:
        if one in tensors and other in tensors:
            raise ValueError(f"it has both {one} and {other}")
    if kind == "ia3" and tensors["on_input"].size != 1:
        raise ValueError(f"its on_input has {tensors['on_input'].size} numbers")
    rank = _rank(kind, tensors)
    alpha = tensors.pop("alpha", None)
    magnitude, by = tensors.pop("dora_scale", None), "lycoris"
    if "magnitude" in tensors:
        magnitude, by = tensors.pop("magnitude"), "peft"
    if magnitude is not None and kind not in DECOMPOSED:
        raise ValueError(f"{kind} with a magnitude (DoRA) is not supported")
    scale = 1.0
    prefix = next((prefix for prefix in configs if name.startswith(prefix)), None)
    if prefix is not None and kind == "lora":
        scale = configs[prefix].scale(name.removeprefix(prefix), rank or 1)
    elif alpha is not None and rank is not None:
        if alpha.size != 1:
            raise ValueError(f"its alpha has {alpha.size} numbers")
        value = float(alpha.reshape(-1)[0])
        scale = value / rank if value else 1.0  # trainers read alpha 0 as "the rank"
    return Layer(kind, rank, scale, tensors, magnitude, by)


def _rank(kind: str, tensors: Mapping[str, Float32]) -> int | None:
    """What alpha is divided by; None if nothing is. Raises ValueError for a tensor that has no axis to tell it by."""
    if kind == "lora":
        by = tensors["down"]
    elif kind == "loha":
        by = tensors.get("t1", tensors["w1_b"])
    elif kind == "lokr" and "w1_a" in tensors:
        by = tensors["w1_b"]
    elif kind == "lokr" and "w2_a" in tensors:
        by = tensors.get("t2", tensors["w2_b"])
    else:
        return None  # LoKr of two whole factors ignores alpha; full deltas have none
    if by.ndim < 2 or not by.shape[0]:
        raise ValueError(f"a factor of shape {list(by.shape)} has no rank")
    return int(by.shape[0])


def _check_fit(layer: Layer, module: Module) -> None:
    changes_bias = BIASES & layer.tensors.keys()
    if changes_bias and not module.bias:
        raise ValueError("it changes a bias that the module does not have")
    for role in changes_bias:
        if layer.tensors[role].size != module.shape[0]:
            raise ValueError(f"its {role} has {layer.tensors[role].size} numbers, the module {module.shape[0]}")
    if module.kind == "norm" and layer.kind not in ("full", "bias"):
        raise ValueError(f"{layer.kind} on a normalisation layer is not supported")
    if not all(tensor.size for tensor in layer.tensors.values()):
        raise ValueError("it has an empty tensor")
    check(layer, module.shape)
