"""What the portal shows of queues, against RabbitMQ's real management plugin."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pika  # type: ignore[import-untyped]
import pytest
from demo.broker import PrivateBroker, free_port
from support.bus_harness import PASSWORD, PATIENCE, definitions, user

from deskfleet.portal.broker_stats import BrokerStats, QueueStats
from deskfleet.portal.settings import ManagementSettings
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.service import SystemClock

HELD, PUT = 5, 30


@pytest.fixture(scope="module")
def url_and_broker() -> Iterator[tuple[str, PrivateBroker]]:
    port, known = free_port(), definitions()
    known["users"] += [{**user("watcher", PASSWORD), "tags": ["monitoring"]}, user("nobody", PASSWORD)]
    known["permissions"] += [
        {"user": name, "vhost": "/", "configure": "^$", "write": "^$", "read": "^$"} for name in ("watcher", "nobody")
    ]
    settings = {"management.tcp.ip": "127.0.0.1", "management.tcp.port": port}
    with (
        TemporaryDirectory(prefix="dfmq") as made,
        PrivateBroker(Path(made), known, settings=settings, plugins=["rabbitmq_management"]) as broker,
    ):
        yield f"http://127.0.0.1:{port}", broker


def stats(url: str, login: str, password: str = PASSWORD) -> BrokerStats:
    return BrokerStats(ManagementSettings(url, login, Secret(password), ""), "/", SystemClock())


def test_rates_what_is_handed_out_and_the_age_of_the_first(url_and_broker: tuple[str, PrivateBroker]) -> None:
    url, broker = url_and_broker
    watcher = stats(url, "watcher")
    connection = pika.BlockingConnection(pika.URLParameters(broker.url("alice", PASSWORD)))
    channel = connection.channel()
    for name, kind in (("busy", "quorum"), ("idle", "quorum"), ("old", "classic")):
        channel.queue_declare(name, durable=True, arguments={"x-queue-type": kind})
    channel.basic_publish("", "old", b"x", pika.BasicProperties(timestamp=int(time.time()) - 600))
    deadline, said = time.monotonic() + PATIENCE, {}
    held = 0
    while True:
        for _ in range(PUT):
            channel.basic_publish("", "busy", b"x", pika.BasicProperties(timestamp=int(time.time())))
        while held < HELD:
            found, _, _ = channel.basic_get("busy")
            held += found is not None
        said = dict(watcher.queues())
        busy = said.get("busy", QueueStats())
        old = said.get("old", QueueStats())
        if busy.unacked == HELD and (busy.in_rate or 0) > 0 and busy.out_rate is not None and old.oldest_s:
            break
        assert time.monotonic() < deadline, said
        time.sleep(0.2)
    assert 590 < (old.oldest_s or 0) < 700
    assert said["idle"].unacked == 0 and said["idle"].oldest_s is None
    connection.close()


@pytest.mark.parametrize(("login", "password"), [("watcher", "wrong"), ("nobody", PASSWORD)])
def test_a_login_that_may_not_look_makes_the_figures_unknown(
    url_and_broker: tuple[str, PrivateBroker], login: str, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    url, _ = url_and_broker
    assert stats(url, login, password).queues() == {}
    assert "status 401" in caplog.text and password not in caplog.text
