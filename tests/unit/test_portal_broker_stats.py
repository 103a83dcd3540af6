"""Figures of queues from the broker's management API: fresh, or unknown."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from support.bus_harness import TickingClock

from deskfleet.portal.broker_stats import BrokerStats, QueueStats, parse
from deskfleet.portal.settings import ManagementSettings
from deskfleet.runtime.secret import Secret

SETTINGS = ManagementSettings("https://mq.example.org:15671/", "watcher", Secret("pass word"), "/etc/ca.pem")
ANSWER = [
    {
        "name": "scheduler.commands",
        "messages_unacknowledged": 2,
        "head_message_timestamp": 1_700_000_000,
        "message_stats": {"publish_details": {"rate": 1.5}, "deliver_get_details": {"rate": 0.0}},
    },
    {"name": "dead", "messages_unacknowledged": 0, "head_message_timestamp": None},
]


class Api:
    """A management API that says what it is told to."""

    def __init__(self, content: Any = ANSWER, status: int = 200) -> None:
        self.content, self.status = content, status
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def get(self, url: str, **options: Any) -> requests.Response:
        self.calls.append((url, options))
        if isinstance(self.content, Exception):
            raise self.content
        answer = requests.Response()
        answer.status_code = self.status
        answer._content = self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()
        return answer


def test_figures_are_read_as_they_stand() -> None:
    assert parse(ANSWER, 1_700_000_060.0) == {
        "scheduler.commands": QueueStats(2, 1.5, 0.0, 60.0),
        "dead": QueueStats(0, None, None, None),
    }


@pytest.mark.parametrize("value", ["7", True, -1, None, [], 1e300, float("nan")])
def test_nonsense_is_unknown(value: Any) -> None:
    entry = {"name": "q", "messages_unacknowledged": value, "head_message_timestamp": value}
    entry["message_stats"] = {"publish_details": {"rate": value}, "deliver_get_details": value}
    assert parse([entry, value, {"name": value}], 1.0) == {"q": QueueStats()} | (
        {value: QueueStats()} if isinstance(value, str) else {}
    )


def test_it_is_asked_with_its_login_over_tls_that_is_verified_and_follows_nobody() -> None:
    api = Api()
    BrokerStats(SETTINGS, "a/b", TickingClock(), api.get).queues()
    ((url, options),) = api.calls
    assert url == "https://mq.example.org:15671/api/queues/a%2Fb"
    assert options["auth"] == ("watcher", "pass word") and options["verify"] == "/etc/ca.pem"
    assert options["allow_redirects"] is False and max(options["timeout"]) <= 2


def test_many_pages_cost_one_question_every_two_seconds() -> None:
    api, clock = Api(), TickingClock()
    stats = BrokerStats(SETTINGS, "/", clock, api.get)
    for _ in range(5):
        assert "dead" in stats.queues()
    assert len(api.calls) == 1
    clock.now += 2
    stats.queues()
    assert len(api.calls) == 2


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (requests.ConnectTimeout(), 200),
        (requests.exceptions.SSLError(), 200),
        (OSError("no such file"), 200),
        ({"error": "not_authorised"}, 401),
        (ANSWER, 302),
        (b"<html>", 200),
        ({}, 200),
    ],
)
def test_an_api_that_fails_makes_figures_unknown_at_once_and_is_left_in_peace(content: Any, status: int) -> None:
    api, clock = Api(), TickingClock()
    stats = BrokerStats(SETTINGS, "/", clock, api.get)
    assert stats.queues()
    api.content, api.status = content, status
    clock.now += 2
    assert stats.queues() == {}
    clock.now += 9
    assert stats.queues() == {} and len(api.calls) == 2
    api.content, api.status = ANSWER, 200
    clock.now += 2
    assert stats.queues()
