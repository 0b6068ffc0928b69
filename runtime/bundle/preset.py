"""A named plan of a bundle: what `stepforge tune` found. It takes the place of a request's own values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """guidance, guider and reuse as in `Request`, the window as `start` and `end` of `Control`; None: the request's own."""

    guidance: float | str | tuple[float, ...] | None = None
    guider: str | None = None
    reuse: str | None = None
    control_start: float | None = None
    control_end: float | None = None
    found: Mapping[str, Any] = field(default_factory=dict)  # what was measured when it was chosen

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preset:
        """Raises ValueError for a field that is unknown or of another type; what its text means is the request's to check."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"a preset has no {unknown[0]!r}; it has {', '.join(known)}")
        values = dict(values)
        if isinstance(values.get("guidance"), list):
            values["guidance"] = tuple(values["guidance"])
        for name, value in values.items():
            if not _fits(name, value):
                raise ValueError(f"{name} of a preset is {value!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it: what is not None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.guidance, tuple):
            values["guidance"] = list(self.guidance)
        return {name: value for name, value in values.items() if value is not None and (value or name != "found")}


def _fits(name: str, value: object) -> bool:
    if name == "found":
        return isinstance(value, Mapping)
    if name in ("guider", "reuse"):
        return isinstance(value, str)
    if name == "guidance" and isinstance(value, str | tuple):
        return isinstance(value, str) or all(_is_number(one) for one in value)
    return _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
