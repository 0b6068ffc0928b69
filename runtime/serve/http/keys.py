"""API keys: a file of them, compared by their hashes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 20  # of a file
LONGEST = 512  # characters of a key
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ROLES = ("user", "admin")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request; name stands in logs."""

    name: str
    is_admin: bool


ANYONE = Caller("anyone", True)  # of a server without keys
NOBODY = Caller("nobody", False)  # who has shown none, where one is needed


class Keys:
    """The keys of a file, one a line: `KEY`, or `sha256:` and its 64 hexadecimal digits; then, if wanted, a name for the log
    and the role `admin`, which may load and unload adapters. Empty lines and lines that begin with # say nothing.

    Raises RequestError for a file that cannot be read or holds no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._callers = _read(path)

    def reload(self) -> None:
        """Read the file again; a file that is refused leaves the keys as they are."""
        try:
            self._callers = _read(self._path)
        except RequestError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("%d API keys are read again", len(self._callers))

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller | None:
        """Whose key `Authorization: Bearer KEY` or `api-key: KEY` holds. Every key is compared, in constant time."""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else headers.get(b"api-key", b"")
        digest = hashlib.sha256(key[: 4 * LONGEST]).digest()
        found = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found if key else None


def _read(path: Path) -> dict[bytes, Caller]:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise RequestError(f"{printable(path)} is larger than {MOST_BYTES >> 20} MiB; it holds one API key a line")
        lines = data.decode().splitlines()
    except OSError as error:
        raise RequestError(f"cannot read the API keys {printable(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"cannot read the API keys {printable(path)}: it is not UTF-8 text") from error
    callers: dict[bytes, Caller] = {}
    for number, line in enumerate(lines, 1):
        if not (words := line.split()) or words[0].startswith("#"):
            continue
        digest, caller = _parse(words, f"{printable(path)}, line {number}", len(callers) + 1)
        if digest in callers:
            raise RequestError(f"{printable(path)}, line {number}: the key is given twice")
        callers[digest] = caller
    if not callers:
        raise RequestError(f"{printable(path)} holds no API key; write one a line")
    return callers


def _parse(words: list[str], where: str, number: int) -> tuple[bytes, Caller]:
    """A line's hash and caller. No message echoes a key."""
    key, *rest = words
    name, role = (*rest, *(f"key-{number}", "user")[len(rest) :])[:2] if len(rest) <= 2 else ("", "")
    if role not in ROLES or not _NAME.fullmatch(name):
        raise RequestError(f"{where}: write KEY, then a name and a role, which is one of {', '.join(ROLES)}")
    if hashed := _HASHED.fullmatch(key):
        return bytes.fromhex(hashed[1]), Caller(name, role == "admin")
    if not (16 <= len(key) <= LONGEST and key.isascii() and key.isprintable()):
        raise RequestError(f"{where}: a key has 16 to {LONGEST} printable ASCII characters")
    return hashlib.sha256(key.encode()).digest(), Caller(name, role == "admin")
