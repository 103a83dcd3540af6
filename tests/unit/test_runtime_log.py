"""The log: one JSON line a record, no secret in any of them, no flood."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from support.bus_harness import TickingClock

from deskfleet.runtime.log import configure, context, redact
from deskfleet.runtime.secret import Secret

CANARY = "c4n4ry-ünd\"quoted'\\/?&"


class Log:
    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.clock = TickingClock()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines()]


@pytest.fixture
def log() -> Iterator[Log]:
    root = logging.getLogger()
    level, hooks = root.level, (sys.excepthook, threading.excepthook)
    made = Log()
    configure("info", "test", made.stream, made.clock)
    yield made
    for handler in [h for h in root.handlers if getattr(h, "stream", None) is made.stream]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)
    logging.getLogger("pika").setLevel(logging.NOTSET)


def test_a_line_says_when_who_and_what(log: Log) -> None:
    with context(sid="s-1"), context(host="h-1"):
        logging.getLogger("deskfleet.x").warning("disk at %d %%", 91)
    logging.getLogger("deskfleet.x").debug("not asked for")
    (line,) = log.lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "service": "test",
        "logger": "deskfleet.x",
        "message": "disk at 91 %",
        "sid": "s-1",
        "host": "h-1",
    }


def test_context_ends_with_its_block(log: Log) -> None:
    with context(sid="outer"):
        with context(sid="inner"):
            pass
        logging.getLogger("a").info("1")
    logging.getLogger("a").info("2")
    assert [line.get("sid") for line in log.lines()] == ["outer", None]


def test_no_input_can_forge_a_line(log: Log) -> None:
    logging.getLogger("a").info('name\r\n{"level": "info"}\x1b[2J\u2028\x85 %s', "\ud800")
    assert len(log.stream.getvalue().splitlines()) == 1
    assert log.stream.getvalue().isascii() and "\x1b" not in log.stream.getvalue()


def test_a_registered_secret_appears_nowhere(log: Log) -> None:
    secret = Secret(CANARY)
    logger = logging.getLogger("a")
    logger.info("plain %s, repr %r, hidden %s", CANARY, CANARY, secret)
    logger.info({"dict": CANARY})
    logger.info("json %s", json.dumps({"k": CANARY}))
    logger.info("url %s", "https://h/?x=" + quote(CANARY, safe=""))
    with context(sid=CANARY, host=CANARY):
        logger.info("context")
    try:
        raise ValueError(f"bad value {CANARY}")
    except ValueError:
        logger.exception("failed")
    assert len(log.lines()) == 6
    assert "c4n4ry" not in log.stream.getvalue()
    assert "ValueError: bad value ***" in log.lines()[-1]["exception"]


def test_a_badly_formatted_record_is_a_line_and_no_leak(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    Secret(CANARY)
    (handler,) = [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is log.stream]
    handler.handle(logging.makeLogRecord({"msg": "one %s", "args": (CANARY, CANARY), "levelname": "INFO"}))
    assert log.messages() == ["one %s [badly formatted, 2 arguments]"]
    assert "c4n4ry" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "GET /console?ticket=CANARY&x=1 HTTP/1.1",
        "GET /console?x=1&TICKET=CANARY",
        "token=CANARY",
        "access_token=CANARY; next",
        "{'token': 'CANARY with spaces', 'a': 1}",
        '{"password": "CANARY \\" more"}',
        "bind_password = 'CANARY'",
        "password='CANARY",
        "amqp://user:CANARY@broker:5672/",
        "cannot reach amqps://user:CANARY@CANARY@broker/vh",
        "postgresql+psycopg://deskfleet:CANARY@db/ledger",
        "Authorization: Bearer CANARY.CANARY",
        "{'Authorization': 'Basic CANARY'}",
        "authorization: Digest username=CANARY, response=CANARY",
        "Cookie: session=CANARY; other=CANARY",
        "Set-Cookie: CANARY",
        "client_secret=CANARY",
    ],
)
def test_what_stands_where_a_secret_stands_is_struck_out(text: str) -> None:
    assert "CANARY" not in redact(text).replace('" more"}', ""), redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    ["the token has expired", "host h1: 2 tokens", "http://host:8080/path", "password: must be set", "a=b&c=d"],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_a_long_hostile_line_is_cut_after_striking_out(log: Log) -> None:
    Secret("another-canary-value")
    logging.getLogger("a").info("%s", "x" * 16_380 + "another-canary-value" + "password=" * 50_000)
    (line,) = log.lines()
    assert len(line["message"]) < 17_000 and "anot" not in line["message"]
    assert "characters left out]" in line["message"]


def test_a_flood_becomes_one_line(log: Log) -> None:
    logger = logging.getLogger("a")
    for i in range(500):
        logger.info("lost %d", i)
    logger.info("something else")
    assert log.messages() == [f"lost {i}" for i in range(20)] + ["something else"]
    log.clock.now += 10
    logger.info("later")
    assert log.messages()[-2:] == ["held back 480 more lines like: lost %d", "later"]
    for i in range(21):
        logger.info("lost %d", i)
    assert log.messages()[-20:] == [f"lost {i}" for i in range(20)]


def test_twenty_lines_are_not_a_flood(log: Log) -> None:
    for _ in range(20):
        logging.getLogger("a").info("same")
        logging.getLogger("b").info("same")
    log.clock.now += 60
    logging.getLogger("a").info("later")
    assert len(log.lines()) == 41


def test_what_was_held_back_is_told_at_the_end(log: Log) -> None:
    for _ in range(25):
        logging.getLogger("a").info("password=%s", "CANARY")
    configure("info", "test", io.StringIO(), log.clock)
    assert log.messages()[-1] == "held back 5 more lines like: password=***"


def test_many_templates_take_bounded_memory_and_lose_nothing(log: Log) -> None:
    for i in range(1_200):
        for _ in range(21):
            logging.getLogger("a").info(f"template {i}")
    configure("info", "test", io.StringIO(), log.clock)
    assert sum(m.startswith("held back 1 more") for m in log.messages()) == 1_200


def test_uncaught_exceptions_are_logged_and_struck_out(log: Log) -> None:
    def fail() -> None:
        raise RuntimeError("token=CANARY")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    assert [line["level"] for line in log.lines()] == ["critical", "critical"]
    assert "CANARY" not in log.stream.getvalue() and "RuntimeError: token=***" in log.lines()[0]["exception"]


def test_a_closed_stream_harms_nobody(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    broken = io.StringIO()
    configure("info", "test", broken, log.clock)
    broken.close()
    logging.getLogger("a").info("password %s", "CANARY")
    assert "CANARY" not in capsys.readouterr().err
    for handler in [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is broken]:
        logging.getLogger().removeHandler(handler)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud'"):
        configure("loud", "test")
