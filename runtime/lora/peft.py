"""What PEFT's adapter_config.json says of the arithmetic. Everything in it is checked; it comes with the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepforge.runtime.checks import real, shown
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.lora.patterns import MOST_WORK, Patterns

# Options that change the arithmetic or the base weights in ways that the tensors do not show, and their harmless values.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "use_bdlora": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
}
SWITCHES = ("use_rslora", "use_dora", "lora_bias")
# PiSSA, OLoRA, CorDA and LoftQ take their first weights out of the base model, which must then be changed as well.
TAKES_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
LARGEST_ALPHA = 1e6
LARGEST_RANK = 1 << 20


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The scale of each module, and the rank that it must have."""

    what: str  # file that says so
    alpha: float
    alphas: Patterns
    rank: int | None  # None: not said
    ranks: Patterns
    use_rslora: bool

    def scale(self, path: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732).

        Raises AdapterError if the tensors' rank is not the one that the settings give the module.
        """
        stated = self.ranks.find(path) or self.rank
        if stated is not None and stated != rank:
            raise AdapterError(f"{self.what} gives {brief(path)} rank {stated:g}, its tensors have rank {rank}")
        alpha = self.alphas.find(path)
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def check_work(self, letters: int) -> None:
        """Raise AdapterError if names of so many letters are too many for the patterns."""
        if (self.alphas.positions + self.ranks.positions) * letters > MOST_WORK:
            raise AdapterError(f"{self.what} has patterns that are too complex for {letters} letters of names")

    @classmethod
    def parse(cls, what: str, options: Mapping[str, Any]) -> PeftConfig:
        """Raises AdapterError for options whose arithmetic is not known here, and for patterns that are none."""
        for option, values in HARMLESS.items():
            if option in options and options[option] not in values:
                raise AdapterError(f"{what} has {option}={brief(options[option])}, which is not supported")
        for option in SWITCHES:
            if not isinstance(options.get(option), bool | None):
                raise AdapterError(f"{what} has {option}={brief(options[option])}; it is true or false")
        start = options.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(TAKES_FROM_BASE):
            raise AdapterError(
                f"{what} has init_lora_weights={brief(start)}, which changes the base model; convert it with PEFT"
            )
        alpha, rank = real(options.get("lora_alpha")), options.get("r")
        if alpha is None:
            raise AdapterError(f"{what} has no usable lora_alpha: {brief(options.get('lora_alpha'))}")
        return cls(
            what=what,
            alpha=_number(what, "lora_alpha", alpha),
            alphas=_patterns(what, "alpha_pattern", options),
            rank=None if rank is None else int(_rank(what, "r", rank)),
            ranks=_patterns(what, "rank_pattern", options),
            use_rslora=bool(options.get("use_rslora")),
        )


def _patterns(what: str, option: str, options: Mapping[str, Any]) -> Patterns:
    given = options.get(option) or {}
    if not isinstance(given, dict):
        raise AdapterError(f"{what} has no usable {option}: {brief(given)}")
    check = _rank if option == "rank_pattern" else _number
    try:
        return Patterns({key: check(what, option, value) for key, value in given.items()})
    except ValueError as error:
        raise AdapterError(f"{what} has an {option} that is not supported: {brief(error)}") from error


def _number(what: str, option: str, value: object) -> float:
    found = real(value)
    if found is None:
        raise AdapterError(f"{what} has no usable {option}: {brief(value)} is not a number")
    if not abs(found) < LARGEST_ALPHA:
        raise AdapterError(f"{what} has an alpha that is not below {LARGEST_ALPHA:.0e}")
    return found


def _rank(what: str, option: str, value: object) -> float:
    if type(value) is not int or not 1 <= value <= LARGEST_RANK:
        raise AdapterError(f"{what} has no usable {option}: {brief(value)} is not a rank")
    return value


def brief(value: object) -> str:
    """Any value as one short line, for messages: what a file says can be long, or hold control characters."""
    text = value if isinstance(value, str) else shown(value) if isinstance(value, list | dict) else str(value)
    return repr(text if len(text) <= 140 else f"{text[:60]}...{text[-60:]}")
