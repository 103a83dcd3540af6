"""Logging as every process does it: one JSON object a line on stderr, secrets struck out, floods held back.

The standard library's logging stays the interface; configure() is called once, at the start of a process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from deskfleet.runtime.secret import HIDDEN, strike
from deskfleet.runtime.service import Clock, SystemClock

_LONGEST = 16_384
_BURST = 20
_WINDOW_SECONDS = 10.0
_MOST_TEMPLATES = 1_000

_sid: ContextVar[str] = ContextVar("sid", default="")
_host: ContextVar[str] = ContextVar("host", default="")

# Each begins at a literal, so that a long hostile line costs linear time.
_PATTERNS = (
    (
        re.compile(
            r"""((?:ticket|token|password|passwd|secret)["']?\s{0,8}(?:=|:(?=\s{0,8}["']))\s{0,8})"""
            r"""("[^"]*"?|'[^']*'?|[^&\s"',;)}\]]+)""",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(://[^/\s:@]*:)[^\s/]+@"), rf"\1{HIDDEN}@"),
    (
        re.compile(r"""((?:authorization|cookie)["']?\s{0,8}[:=]\s{0,8}["']?)[^"'\r\n]+""", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
)


def redact(text: str) -> str:
    """`text` without secrets: registered values, and whatever stands where a secret usually does."""
    text = strike(text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


@contextlib.contextmanager
def context(*, sid: str | None = None, host: str | None = None) -> Iterator[None]:
    """Name the session or host that every line logged inside is about. Follows asyncio tasks, not threads."""
    tokens = [(variable, variable.set(value)) for variable, value in ((_sid, sid), (_host, host)) if value is not None]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


class _JsonLine(logging.Formatter):
    """A record as one line of JSON. Control characters leave it escaped, so no input can forge a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - arguments that do not fit, or whose own repr fails
            message = f"{record.msg} [badly formatted, {len(record.args or ())} arguments]"
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": _clean(message),
        }
        for name, variable in (("sid", _sid), ("host", _host)):
            if variable.get():
                line[name] = _clean(variable.get())
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = _clean("".join(traceback.format_exception(*record.exc_info)), keep_end=True)
        return json.dumps(line)


def _clean(text: str, keep_end: bool = False) -> str:
    # Cut after striking out: half a secret would not be recognised. A traceback says the most at its end.
    text = redact(text)
    if len(text) <= _LONGEST:
        return text
    left_out = f"[{len(text) - _LONGEST} characters left out]"
    return f"{left_out}{text[-_LONGEST:]}" if keep_end else f"{text[:_LONGEST]}{left_out}"


@dataclass(slots=True)
class _Burst:
    record: logging.LogRecord
    began: float
    seen: int = 0


class _Handler(logging.StreamHandler[TextIO]):
    """Writes at most _BURST lines with one logger and template in _WINDOW_SECONDS; the rest become one line.

    That line comes with the next record after the window, or at the end of the process. emit() runs under the
    handler's lock.
    """

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        super().__init__(stream)
        self._clock = clock
        self._bursts: dict[tuple[str, str], _Burst] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = self._clock.monotonic()
        self._sum_up(now)
        key = (record.name, str(record.msg))
        burst = self._bursts.setdefault(key, _Burst(record, now))
        burst.seen += 1
        if burst.seen <= _BURST:
            super().emit(record)
        if len(self._bursts) > _MOST_TEMPLATES:
            self._finish(next(iter(self._bursts)))

    def _sum_up(self, now: float) -> None:
        # Bursts stand in the order in which they began.
        while self._bursts:
            key = next(iter(self._bursts))
            if now - self._bursts[key].began < _WINDOW_SECONDS:
                break
            self._finish(key)

    def _finish(self, key: tuple[str, str]) -> None:
        burst = self._bursts.pop(key)
        if burst.seen > _BURST:
            record = logging.makeLogRecord(
                burst.record.__dict__
                | {
                    "created": self._clock.wall(),
                    "msg": "held back %d more lines like: %s",
                    "args": (burst.seen - _BURST, str(burst.record.msg)),
                    "exc_info": None,
                }
            )
            super().emit(record)

    def close(self) -> None:
        with self.lock or contextlib.nullcontext():
            for key in list(self._bursts):
                self._finish(key)
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """The stream is gone. logging would print the record with its arguments, secrets included."""


def configure(level: str, service: str, stream: TextIO = sys.stderr, clock: Clock | None = None) -> None:
    """Send all logging of this process to `stream`. ValueError for an unknown level. May be called again."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown log level {level!r}; use debug, info, warning or error")
    handler = _Handler(stream, clock or SystemClock())
    handler.setFormatter(_JsonLine(service))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(number)
    # pika writes each failed connection six times over; the bus says it once, in plain words.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """What Python would print itself, secrets included."""
    if error is None or issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    logging.getLogger("deskfleet").critical("uncaught exception", exc_info=(kind, error, trace))
