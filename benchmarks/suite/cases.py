"""Workloads, cases and records: plain values, and where records are kept."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("kernels", "runtime", "export", "benchmarks/suite", "benchmarks/bench.py")
REFERENCE = "diffusers"  # runner that images and seconds are compared with


@dataclass(frozen=True, slots=True)
class Workload:
    """One image. Sampler is DDIM with the model's own betas, noise is torch's CPU generator's, for every runner."""

    prompt: str
    size: int
    steps: int
    guidance: float
    seed: int = 0
    adapters: tuple[tuple[str, float], ...] = ()  # (name, strength)
    control: float | None = None  # fraction of the steps in which the ControlNet runs
    guided: float = 1.0  # fraction of the steps that are guided; later ones run the conditional row alone


@dataclass(frozen=True, slots=True)
class Case:
    item: str
    model: str
    runner: str
    precision: str = "fp32"

    @property
    def key(self) -> str:
        return f"{self.item}/{self.model}/{self.runner}/{self.precision}"

    @property
    def file(self) -> str:
        return self.key.replace("/", "+").replace(" ", "_")


@dataclass(slots=True)
class Record:
    """seconds: of each counted run. peak: bytes resident of the case's process, libraries and mapped files counted."""

    case: Case
    seconds: list[float] = field(default_factory=list)
    load: float | None = None
    peak: int = 0
    weights: int = 0  # bytes of the networks in the precision that they run in
    refused: str = ""  # why there are no figures
    notes: dict[str, Any] = field(default_factory=dict)
    unit: str = "s"
    machine: str = ""
    commit: str = ""
    command: str = ""


class Store:
    """Records of one commit and profile, one JSON file a case, and the images that they drew beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def image(self, case: Case) -> Path:
        return self.folder / f"{case.file}.npy"

    def find(self, case: Case) -> Record | None:
        path = self.folder / f"{case.file}.json"
        if not path.exists():
            return None
        values = json.loads(path.read_text("utf-8"))
        return Record(**{**values, "case": Case(**values["case"])})

    def keep(self, record: Record) -> None:
        path = self.folder / f"{record.case.file}.json"
        path.with_suffix(".part").write_text(json.dumps(asdict(record), indent=1) + "\n", "utf-8")
        path.with_suffix(".part").rename(path)


def commit() -> str:
    """Short hash of the last commit that changed what is measured, with + where there are changes since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    return (git("log", "-1", "--format=%h", "--", *MEASURED) or "unknown") + ("+" if changed else "")
