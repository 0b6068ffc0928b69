"""Adapters by name over HTTP: listed for everybody, loaded and unloaded by admins, from one folder of the operator's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepforge.runtime.bundle import NAME
from stepforge.runtime.checks import shown
from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.lora.adapter import Adapter
from stepforge.runtime.lora.file import IN_FOLDERS
from stepforge.runtime.serve.http.errors import ApiError, bad
from stepforge.runtime.serve.http.keys import Caller
from stepforge.runtime.serve.http.models import Model
from stepforge.runtime.serve.http.settings import Settings

SUFFIX = ".safetensors"
MOST_FILES = 10_000  # looked at in the folder
FIELDS = ("file", "name", "model")


def available(folder: Path) -> dict[str, Path]:
    """What may be loaded, by its name in the folder: LoRA files, and PEFT's or diffusers' folders. Links out of it are not."""
    root = folder.resolve()
    found = {}
    try:
        for count, entry in enumerate(root.iterdir()):
            if count >= MOST_FILES:
                break
            weights = [entry / name for name in IN_FOLDERS] if entry.is_dir() else [entry]
            files = [file for file in weights if file.suffix == SUFFIX and file.is_file()]
            inside = all(place.resolve().is_relative_to(root) for place in (entry, *files))
            if files and inside and NAME.fullmatch(entry.name):
                found[entry.name] = entry
    except OSError as error:
        raise ApiError(500, "the folder of adapters cannot be read", "internal_error", kind="server_error") from error
    return dict(sorted(found.items()))


def listed(settings: Settings, caller: Caller, model: Model, engine: Engine) -> dict[str, Any]:
    """The loaded adapters of a model; for admins also what the folder holds."""
    entries = [card(model, name, adapter) for name, adapter in engine.adapters.list().items()]
    answer: dict[str, Any] = {"object": "list", "data": entries}
    if settings.adapter_folder is not None and caller.is_admin:
        answer["available"] = list(available(settings.adapter_folder))
    return answer


def card(model: Model, name: str, adapter: Adapter) -> dict[str, Any]:
    return {
        "id": name,
        "object": "adapter",
        "model": model.name,
        "file": Path(adapter.file).name,
        "sha256": adapter.sha256,
        "layers": len(adapter.layers),
        "refused": len(adapter.refused),  # keys of the file that fit no module
    }


def check_caller(settings: Settings, caller: Caller) -> None:
    """Raises ApiError for callers who may not change what is loaded."""
    if settings.adapter_folder is None:
        raise ApiError(403, "this server was started without --adapters", "adapters_disabled")
    if not caller.is_admin:
        raise ApiError(403, "adapters are loaded and unloaded with an admin's key", "admin_only")


def read_load(values: dict[str, Any]) -> tuple[str, str, str | None]:
    """File, name and model of a body. Raises ApiError."""
    if unknown := [name for name in values if name not in FIELDS]:
        raise bad(f"there is no field {shown(unknown[0])}; there is {', '.join(FIELDS)}", code="unknown_parameter")
    if "file" not in values:
        raise bad("give the file, a name in the server's folder", param="file", code="missing_required_parameter")
    file = values["file"]
    if not isinstance(file, str) or not NAME.fullmatch(file):
        raise bad(f"file is {shown(file)}; give a name in the server's folder", param="file")
    name = values.get("name", file.removesuffix(SUFFIX))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise bad(f"name is {shown(name)}; use letters, digits, ., - and _", param="name")
    model = values.get("model")
    if model is not None and not isinstance(model, str):
        raise bad(f"model is {shown(model)}; give its name", param="model")
    return file, name, model


def load(settings: Settings, model: Model, engine: Engine, file: str, name: str) -> dict[str, Any]:
    """Load a file of the folder into an engine. On a thread. Raises ApiError."""
    folder = settings.adapter_folder
    assert folder is not None
    files = available(folder)
    path = files.get(file) or files.get(file + SUFFIX)
    if path is None:
        raise ApiError(404, f"the server's folder of adapters has no {shown(file)}", "adapter_not_found", param="file")
    if len(engine.adapters.list()) >= settings.max_adapters:
        raise bad(f"{settings.max_adapters} adapters are loaded already; unload one", code="too_many_adapters")
    try:
        return card(model, name, engine.adapters.load(name, path))
    except AdapterError as error:
        text = str(error).replace(f"{folder.resolve()}/", "")  # no path of the server's
        raise bad(text, param="file", code="adapter_refused") from None


def unload(model: Model, engine: Engine, name: str) -> dict[str, Any]:
    """Requests that were sent with it are still drawn with it. Raises ApiError."""
    try:
        engine.adapters.unload(name)
    except AdapterError as error:
        raise ApiError(404, str(error), "adapter_not_found") from None
    return {"id": name, "object": "adapter", "model": model.name, "deleted": True}
