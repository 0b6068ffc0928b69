"""The API's description for /openapi.json."""

from __future__ import annotations

from typing import Any

from stepforge.runtime.bundle.scheduler import SAMPLER_NAMES, SCHEDULES, SPACINGS
from stepforge.runtime.imaging.encode import FORMATS
from stepforge.runtime.request.upscale import MAX_SEED
from stepforge.runtime.serve.http.images.fields import EDITS, GENERATIONS, MOST_PARTIALS, OURS, QUALITY
from stepforge.runtime.serve.http.images.pictures import MASK_MODES
from stepforge.runtime.serve.http.settings import Settings

TEXT, FLAG, NUMBER, OBJECT = ({"type": kind} for kind in ("string", "boolean", "number", "object"))
NUMBERS = {"type": "array", "items": NUMBER}
STATUSES = {
    400: "A value that is wrong; `param` names its field.",
    401: "No valid API key.",
    403: "Not allowed: another site, a Host that is not served, or an admin's key is needed.",
    404: "No such model, adapter or path.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "Neither JSON nor a form.",
    429: "As many requests wait as the server holds; Retry-After says when to come again.",
    500: "The request failed; the log knows why.",
    503: "The server starts or shuts down.",
    504: "The deadline has passed.",
}
ENVELOPE = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT, "type": TEXT, "code": TEXT, "param": {"type": ["string", "null"]},
            },
        }
    },
}  # fmt: skip
IMAGES = {
    "type": "object",
    "required": ["created", "data"],
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "items": {"type": "object", "required": ["b64_json"], "properties": {"b64_json": TEXT}},
        },
        "stepforge": OBJECT,
    },
}


def document(settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1."""
    generations = _operation("Draw images", _body(GENERATIONS, settings, edit=False), IMAGES, stream=True)
    edits = _operation("Change an image", _body(EDITS, settings, edit=True), IMAGES, stream=True)
    load = {"application/json": {"schema": _object({"file": TEXT, "name": TEXT, "model": TEXT}, ["file"])}}
    model = [{"name": "model", "in": "query", "schema": TEXT, "description": "A model's name; by default the first."}]
    name = [{"name": "name", "in": "path", "required": True, "schema": TEXT}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "stepforge", "version": "1"},
        "components": {
            "schemas": {"Error": ENVELOPE},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
        "paths": {
            "/v1/images/generations": {"post": generations},
            "/v1/images/edits": {"post": edits},
            "/v1/models": {"get": _operation("The models")},
            "/v1/models/{name}": {"get": _operation("One model"), "parameters": name},
            "/v1/adapters": {
                "get": {**_operation("The loaded adapters of a model"), "parameters": model},
                "post": _operation("Load an adapter; admins", load),
            },
            "/v1/adapters/{name}": {
                "delete": _operation("Unload an adapter; admins"),
                "parameters": [*name, *model],
            },
            "/health/live": {"get": {**_operation("The server answers"), "security": []}},
            "/health/ready": {"get": {**_operation("Requests are taken"), "security": []}},
            "/metrics": {"get": _operation("Prometheus metrics", answer=TEXT, media="text/plain")},
        },
    }


def _operation(
    summary: str,
    body: dict[str, Any] | None = None,
    answer: dict[str, Any] | None = None,
    *,
    stream: bool = False,
    media: str = "application/json",
) -> dict[str, Any]:
    content: dict[str, Any] = {media: {"schema": answer or OBJECT}}
    if stream:
        content["text/event-stream"] = {"schema": TEXT}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": summary,
        **({"requestBody": {"required": True, "content": body}} if body else {}),
        "responses": {
            "200": {"description": "Done", "content": content},
            **{str(status): {"description": text, "content": error} for status, text in STATUSES.items()},
        },
    }


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _body(fields: dict[str, str], settings: Settings, *, edit: bool) -> dict[str, Any]:
    """The same fields as JSON and as a form, where pictures are uploads."""
    types = _types(settings)
    names = {**fields, **OURS}
    required = ["prompt", "image"] if edit else ["prompt"]
    as_json = {name: {**types.get(name, {}), "description": text} for name, text in names.items()}
    as_form = {
        name: {"description": text, **({"type": "string", "format": "binary"} if name in ("image", "mask") else {})}
        for name, text in names.items()
        if name != "images"
    }
    return {
        "application/json": {"schema": _object(as_json, ["prompt"])},
        "multipart/form-data": {"schema": _object(as_form, required)},
    }


def _types(settings: Settings) -> dict[str, Any]:
    """Schemas by field; what is missing may be of several types."""

    def whole(low: int, high: int) -> dict[str, Any]:
        return {"type": "integer", "minimum": low, "maximum": high}

    prompt = {"type": "string", "maxLength": settings.max_prompt}
    picture = {"type": "string", "description": "A data URL."}
    control = {"type": "object", "required": ["name", "image"], "properties": {"name": TEXT, "image": picture}}
    return {
        **dict.fromkeys(("model", "user", "safety_identifier", "style", "guider", "reuse", "preset", "experts"), TEXT),
        **dict.fromkeys(("stream", "overlay", "progress"), FLAG),
        **dict.fromkeys(("eta", "strength", "deadline"), NUMBER),
        **dict.fromkeys(("timesteps", "sigmas"), NUMBERS),
        **dict.fromkeys(("width", "height"), whole(8, 4096)),
        "prompt": prompt,
        "negative_prompt": prompt,
        "n": whole(1, settings.max_images),
        "size": {"type": "string", "pattern": "^(auto|[1-9][0-9]*x[1-9][0-9]*)$"},
        "quality": {"enum": ["auto", *QUALITY]},
        "background": {"enum": ["auto", "opaque"]},
        "output_format": {"enum": list(FORMATS)},
        "output_compression": whole(0, 100),
        "response_format": {"enum": ["b64_json"]},
        "partial_images": whole(0, MOST_PARTIALS),
        "moderation": {"enum": ["auto", "low"]},
        "mask_mode": {"enum": list(MASK_MODES)},
        "steps": whole(1, settings.max_steps),
        "sampler": {"enum": list(SAMPLER_NAMES)},
        "schedule": {"enum": list(SCHEDULES)},
        "spacing": {"enum": list(SPACINGS)},
        "guidance": {"oneOf": [NUMBER, TEXT, NUMBERS]},
        "micro": OBJECT,
        "seed": whole(0, MAX_SEED),
        "prompt_syntax": {"enum": ["a1111", "plain"]},
        "adapters": {"type": "object", "additionalProperties": NUMBER},
        "adapter_schedule": {"oneOf": [NUMBER, NUMBERS]},
        "controls": {"type": "array", "items": control},
        "priority": whole(-10, 10),
        "image": picture,
        "mask": picture,
        "images": {"type": "array", "items": _object({"image_url": picture}, ["image_url"])},
    }
