"""Bodies as plain values: JSON that means one thing, or a form whose names have brackets. Uploads are bytes in both."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from stepforge.runtime.checks import clipped, shown
from stepforge.runtime.files import strict_json
from stepforge.runtime.grammar import NUMBER
from stepforge.runtime.serve.http.errors import ApiError, bad

PIECE = 64 << 10  # bytes of a form that are parsed at a time, between which other calls run
MOST_FIELDS = 500
LONGEST_NAME = 200  # characters of a field's name
DEEPEST = 4  # brackets of a field's name
_PARTS = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
# Fields of forms whose values are text, however they look, at any depth; others may be numbers, true, false, null or JSON
TEXTS = frozenset(
    ("prompt", "negative", "negative_prompt", "model", "size", "quality", "background", "output_format", "style", "user",
     "response_format", "safety_identifier", "moderation", "name", "preprocessor", "sampler", "schedule", "guider", "reuse",
     "spacing", "experts", "preset", "prompt_syntax", "image", "mask", "image_url", "file_id", "mask_mode")
)  # fmt: skip


async def read_body(request: Request) -> dict[str, Any]:
    """Fields of a body, JSON or a form. Raises ApiError; ClientDisconnect."""
    if _kind(request) == "multipart/form-data":
        form = await _form(request.headers, await _whole(request))
        return await asyncio.to_thread(nested, form)
    return await read_json(request, "application/json or multipart/form-data")


async def read_json(request: Request, wanted: str = "application/json") -> dict[str, Any]:
    """Fields of a body. Raises ApiError; ClientDisconnect."""
    if (kind := _kind(request)) != "application/json":
        said = f"not {clipped(kind, 60)!r}" if kind else "and a Content-Type that says so"
        raise ApiError(415, f"give {wanted}, {said}", "unsupported_media_type")
    data = await _whole(request)
    try:
        values = await asyncio.to_thread(strict_json, data)
    except ValueError as error:
        raise bad(f"the body cannot be read: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise bad("the body is a JSON object with the fields of a request", code="invalid_json")
    return values


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _whole(request: Request) -> bytes:
    """The body's bytes; the door has bounded them."""
    pieces = [piece async for piece in request.stream()]
    return b"".join(pieces)


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 40  # nothing of a body is written to disk; the door bounds it


async def _form(headers: Headers, data: bytes) -> list[tuple[str, str | bytes]]:
    """Fields of a form in their order. Names of files are not looked at."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]
            await asyncio.sleep(0)

    parser = _InMemory(headers, pieces(), max_files=MOST_FIELDS, max_fields=MOST_FIELDS, max_part_size=len(data) + 1)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise bad(f"the form cannot be read: {clipped(error.message)}", code="invalid_form") from None
    except (KeyError, ValueError, LookupError) as error:  # a part without a name, an unknown charset
        raise bad(f"the form cannot be read: {clipped(error)}", code="invalid_form") from None
    found: list[tuple[str, str | bytes]] = []
    for name, value in form.multi_items():
        found.append((name, await value.read() if isinstance(value, UploadFile) else value))
    await form.close()
    return found


def nested(form: list[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Fields whose names have brackets as lists and dicts, as clients of OpenAI's library write them:

        adapters[style]=0.8              {"adapters": {"style": 0.8}}
        guidance[]=7  guidance[]=1       {"guidance": [7, 1]}
        controls[][name]=canny           {"controls": [{"name": "canny", "image": ...}]}
        controls[][image]=...            the same entry, until a name comes again
        controls[0][name]=canny          the same by numbers
        controls=[{"name": "canny"}]     or as JSON

    Raises ApiError for a name that is given twice.
    """
    found: dict[str, Any] = {}
    for name, value in form:
        match = _PARTS.fullmatch(name) if len(name) <= LONGEST_NAME else None
        inner = [] if match is None else match[2][1:-1].split("][") if match[2] else []
        if match is None or len(inner) > DEEPEST:
            raise bad(f"the form has a field {shown(name)}, whose name is not understood", code="invalid_form")
        path = [match[1], *inner]
        key = next((part for part in reversed(path) if part and not part.isdecimal()), path[0])
        _put(found, path, value if isinstance(value, bytes) else _typed(key, value), name)
    return {key: _lists(value) for key, value in found.items()}


def _put(found: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    """Set a value in dicts of dicts; keys of lists are "[0]", "[1]", ..."""
    twice = bad(f"{shown(name)} is given twice", code="invalid_form")
    at = found
    for place, part in enumerate(path):
        last = place == len(path) - 1
        key = part
        if place and (not part or part.isdecimal()):
            if len(part) > 4:
                raise bad(f"the number in {shown(name)} is too large", code="invalid_form")
            if part:
                key = f"[{int(part)}]"
            else:  # the entry that is being filled, or the next
                count = sum(1 for other in at if other.startswith("["))
                current = at.get(f"[{count - 1}]")
                follows = not last and isinstance(current, dict) and path[place + 1] not in current
                key = f"[{count - 1 if follows else count}]"
        if last:
            if key in at:
                raise twice
            at[key] = value
            return
        at = at.setdefault(key, {})
        if not isinstance(at, dict):
            raise twice


def _lists(value: Any) -> Any:
    """Dicts whose keys are all numbers in brackets as lists."""
    if not isinstance(value, dict):
        return value
    if value and all(key.startswith("[") for key in value):
        return [_lists(value[key]) for key in sorted(value, key=lambda key: int(key[1:-1]))]
    return {key: _lists(inner) for key, inner in value.items()}


def _typed(key: str, text: str) -> Any:
    """A field's text as what it says: `TEXTS` as they are, the rest as numbers and JSON where it reads as such."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad(f"{shown(key)} is not valid Unicode", param=clipped(key, 60)) from None
    if key in TEXTS:
        return text
    plain = text.strip()
    if plain in ("true", "false", "null") or NUMBER.fullmatch(plain) or plain[:1] in ("{", "["):
        try:
            return strict_json(plain.encode())
        except ValueError as error:
            if plain[:1] in ("{", "["):
                raise bad(f"{shown(key)} is not JSON: {error}", param=clipped(key, 60)) from None
    return text
