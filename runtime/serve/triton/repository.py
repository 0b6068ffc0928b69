"""A model repository for NVIDIA Triton Inference Server: a folder a model, for its Python backend."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable

NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
KINDS = ("unary", "decoupled", "both")
SUFFIX = "_stream"  # of the decoupled model's name
CODE = '''"""Written by `stepforge triton`; stepforge must be installed for the Python of Triton's backend."""

from stepforge.runtime.serve.triton.model import TritonPythonModel  # noqa: F401
'''
INPUTS = {  # name -> type and dimensions; all but the prompt are optional
    "prompt": ("TYPE_STRING", "1"),
    "negative": ("TYPE_STRING", "1"),
    "guidance": ("TYPE_STRING", "1"),
    "seed": ("TYPE_UINT64", "1"),
    "steps": ("TYPE_INT32", "1"),
    "width": ("TYPE_INT32", "1"),
    "height": ("TYPE_INT32", "1"),
    "request": ("TYPE_STRING", "1"),  # JSON with further fields of Request
    "pictures": ("TYPE_STRING", "-1"),  # files that the fields name by number
}
OUTPUTS = {
    "images": ("TYPE_UINT8", "-1, -1, -1, 3"),
    "files": ("TYPE_STRING", "-1"),  # PNG
    "seeds": ("TYPE_UINT64", "-1"),
    "about": ("TYPE_STRING", "-1"),  # JSON, as in a PNG
}

STEPS = {  # of decoupled models
    "progress": ("TYPE_INT32", "3"),  # image, step, steps
    "preview": ("TYPE_UINT8", "-1, -1, 3"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the models load. Paths are the server's, relative ones from the model's folder."""

    bundle: str
    backend: str = "auto"
    precision: str = "auto"
    threads: int = 0  # 0: as `load` has it
    max_rows: int = 8
    queue_limit: int = 64
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> file
    environment: str = ""  # Python for the backend: a folder or a packed archive, Triton's EXECUTION_ENV_PATH
    gpus: tuple[int, ...] = ()  # one instance on each; none: one on the CPU


def write_repository(out: Path, name: str, kind: str, settings: Settings, *, overwrite: bool = False) -> list[Path]:
    """Write one model, or two of which the second is decoupled; returns their folders.

    Each folder appears whole. Raises RequestError for names that Triton would not take and for models that are there.
    """
    if not NAME.fullmatch(name):
        raise RequestError(
            f"the model's name is {printable(repr(name), 60)}; give up to 100 of the signs A-Z a-z 0-9 _ -"
        )
    names = {"unary": {name: False}, "decoupled": {name: True}, "both": {name: False, name + SUFFIX: True}}[kind]
    if out.exists() and not out.is_dir():
        raise RequestError(f"{printable(out)} is not a folder")
    for model in names:
        if (out / model).exists() and not (overwrite and (out / model / "config.pbtxt").is_file()):
            raise RequestError(f"{printable(out / model)} is there already; --overwrite replaces a model")
    out.mkdir(parents=True, exist_ok=True)
    for model, decoupled in names.items():
        with tempfile.TemporaryDirectory(dir=out, prefix=".") as folder:
            fresh = Path(folder, model)
            (fresh / "1").mkdir(parents=True)
            (fresh / "1" / "model.py").write_text(CODE, encoding="utf-8")
            (fresh / "config.pbtxt").write_text(config(model, settings, decoupled=decoupled), encoding="utf-8")
            if (out / model).exists():
                shutil.rmtree(out / model)
            fresh.rename(out / model)
    return [out / model for model in names]


def config(name: str, settings: Settings, *, decoupled: bool) -> str:
    """The model's config.pbtxt.

    No batching by Triton (max_batch_size 0): the engine packs the steps of all requests that are on their way.
    """
    inputs = INPUTS | ({"progress_every": ("TYPE_INT32", "1")} if decoupled else {})
    outputs = OUTPUTS | (STEPS if decoupled else {})
    parameters = {
        "bundle": settings.bundle,
        "backend": settings.backend,
        "precision": settings.precision,
        "threads": str(settings.threads),
        "max_rows": str(settings.max_rows),
        "queue_limit": str(settings.queue_limit),
        "adapters": json.dumps(dict(settings.adapters)),
        **({"EXECUTION_ENV_PATH": settings.environment} if settings.environment else {}),
    }
    gpus = f", gpus: [{', '.join(map(str, settings.gpus))}]" if settings.gpus else ""
    lines = [
        f"name: {quoted(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        *(
            f"input {{ name: {quoted(one)}, data_type: {kind}, dims: [{dims}]{'' if one == 'prompt' else ', optional: true'} }}"
            for one, (kind, dims) in inputs.items()
        ),
        *(
            f"output {{ name: {quoted(one)}, data_type: {kind}, dims: [{dims}] }}"
            for one, (kind, dims) in outputs.items()
        ),
        f"instance_group {{ count: 1, kind: {'KIND_GPU' if settings.gpus else 'KIND_CPU'}{gpus} }}",
        *(["model_transaction_policy { decoupled: true }"] if decoupled else []),
        *(
            f"parameters {{ key: {quoted(one)}, value: {{ string_value: {quoted(value)} }} }}"
            for one, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A string of protobuf's text format."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
