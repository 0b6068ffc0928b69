"""A named plan of a bundle: what `stepforge tune` found. It takes the place of a request's own values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from stepforge.runtime.bundle.typed import Between, parse


@dataclass(frozen=True, slots=True)
class Preset:
    """guidance, guider and reuse as in `Request`, the window as `start` and `end` of `Control`; None: the request's own."""

    guidance: float | str | Annotated[tuple[float, ...], Between(1, 10_000)] | None = None
    guider: str | None = None
    reuse: str | None = None
    control_start: float | None = None
    control_end: float | None = None
    found: Mapping[str, Any] = field(default_factory=dict)  # what was measured when it was chosen

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preset:
        """Raises ValueError for a field that is unknown or of another type; what its text means is the request's to check."""
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        missing: dict[str, Any] = {f.name: None for f in fields(cls)} | {"found": {}}
        return parse(cls, missing | given, "preset")

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it: what is not None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.guidance, tuple):
            values["guidance"] = list(self.guidance)
        return {name: value for name, value in values.items() if value is not None and (value or name != "found")}
