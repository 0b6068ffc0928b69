"""Logs as JSON, one line each, on standard error. Of a request they hold no prompt, no key and no body."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

LOGGERS = ("stepforge", "uvicorn.error", "asyncio", "python_multipart")
LONGEST = 20_000  # characters of a traceback


class Json(logging.Formatter):
    """A record as a line of JSON; `extra={"facts": {...}}` adds to it. Control characters are escaped, so that no text of a
    client can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))[-LONGEST:]
        return json.dumps(line, default=str)


@contextmanager
def json_logs(level: int = logging.INFO) -> Iterator[None]:
    """Within the block the server's loggers write JSON and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json())
    before = {name: (logger.handlers, logger.level, logger.propagate) for name, logger in _loggers()}
    for _, logger in _loggers():
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    try:
        yield
    finally:
        for name, logger in _loggers():
            logger.handlers, logger.level, logger.propagate = before[name]


def _loggers() -> Iterator[tuple[str, logging.Logger]]:
    for name in LOGGERS:
        yield name, logging.getLogger(name)
