"""What PEFT's adapter_config.json says of the arithmetic. Everything in it is checked; it comes with the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepforge.runtime.errors import AdapterError

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
# PiSSA, OLoRA, CorDA and LoftQ take their first weights out of the base model, which must then be changed as well.
TAKES_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
LONGEST_PATTERN = 256  # characters
MOST_PATTERNS = 4096
LARGEST_ALPHA = 1e6
MOST_WORK = 1 << 16  # work of all patterns of a file together, see `_work`


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The scale of each module."""

    alpha: float
    patterns: tuple[tuple[re.Pattern[str], float], ...]  # the first that matches a module's path gives its alpha
    use_rslora: bool

    def scale(self, path: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732)."""
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.match(path)), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @classmethod
    def parse(cls, what: str, options: Mapping[str, Any]) -> PeftConfig:
        """Raises AdapterError for options whose arithmetic is not known here, and for patterns that could hang."""
        for option, values in HARMLESS.items():
            if option in options and options[option] not in values:
                raise AdapterError(f"{what} has {option}={brief(options[option])}, which is not supported")
        start = options.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(TAKES_FROM_BASE):
            raise AdapterError(
                f"{what} has init_lora_weights={brief(start)}, which changes the base model; convert it with PEFT"
            )
        try:
            alpha = float(options["lora_alpha"])
            patterns = {str(key): float(value) for key, value in (options.get("alpha_pattern") or {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise AdapterError(f"{what} has no usable lora_alpha or alpha_pattern: {brief(error)}") from error
        if not all(abs(value) < LARGEST_ALPHA for value in (alpha, *patterns.values())):
            raise AdapterError(f"{what} has an alpha that is not below {LARGEST_ALPHA:.0e}")
        if len(patterns) > MOST_PATTERNS or sum(map(_work, patterns)) > MOST_WORK:
            raise AdapterError(f"{what} has an alpha_pattern that is too complex")
        return cls(
            alpha=alpha,
            patterns=tuple((_pattern(what, key), value) for key, value in patterns.items()),
            use_rslora=bool(options.get("use_rslora")),
        )


def brief(value: object) -> str:
    """Any value as one short line, for messages: what a file says can be long, or hold control characters."""
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= 140 else f"{text[:60]}...{text[-60:]}")


def _work(text: str) -> int:
    """About how often matching a pattern can go back and try again, for each dot of a path.

    Every repeat can end anywhere and every choice doubles what there is to try; a repeated group can take for ever.
    """
    plain = re.sub(r"\\.", "_", text, flags=re.DOTALL)
    if len(text) > LONGEST_PATTERN or re.search(r"\)[*+{]|\(\?[^:]", plain):
        return MOST_WORK + 1
    repeats, choices = len(re.findall(r"[*+{]", plain)), len(re.findall(r"[?|]", plain))
    return 64**repeats << choices if repeats or choices else 0


def _pattern(what: str, text: str) -> re.Pattern[str]:
    """PEFT's own rule: the pattern matches the end of the path, from a dot on."""
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{what}: {brief(text)} is no regular expression: {error}") from error
