"""The [portal] section: what is refused, and that everything wrong is said at once."""

from __future__ import annotations

from typing import Any

import pytest
from marshmallow import ValidationError
from support.portals import settings


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"auth": []}, "auth"),
        ({"auth": ["ldap", "nonsense"]}, "auth"),
        ({"public_url": "http://portal.example.org"}, "public_url"),
        ({"public_url": "https://portal.example.org/sub/../x"}, "public_url"),
        ({"public_url": "ftp://127.0.0.1"}, "public_url"),
        ({"public_url": "https://user:word@portal.example.org"}, "public_url"),
        ({"public_url": "http://127.0.0.1:99999"}, "public_url"),
        ({"console_url": "ws://console.example.org/console"}, "console_url"),
        ({"console_url": "https://console.example.org/console"}, "console_url"),
        ({"console_url": "wss://console.example.org/console?x=1"}, "console_url"),
        ({"secret_key": "short"}, "secret_key"),
        ({"ticket_keys": []}, "ticket_keys"),
        ({"ticket_keys": ["short"]}, "ticket_keys"),
        ({"ticket_keys": 7}, "ticket_keys"),
        ({"database": "mysql://x"}, "database"),
        ({"lifetime_default_s": 7200, "lifetime_max_s": 3600}, "lifetime_default_s"),
        ({"front_proxies": ["10.0.0.300"]}, "front_proxies"),
        ({"threads": "many"}, "threads"),
        ({"debug": True}, "debug"),
    ],
)
def test_a_fault_is_told_by_its_key(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(**changes)
    assert field in caught.value.messages


@pytest.mark.parametrize("left_out", ["auth", "secret_key", "ticket_keys", "broker_url", "database", "public_url"])
def test_nothing_that_guards_the_door_has_a_default(left_out: str) -> None:
    from deskfleet.portal.settings import PortalSchema

    complete = {
        "public_url": "https://portal.example.org",
        "console_url": "wss://console.example.org/console",
        "broker_url": "amqps://portal@broker/",
        "database": "sqlite:////var/lib/portal.db",
        "secret_key": "s" * 32,
        "ticket_keys": ["t" * 32],
        "auth": ["local"],
    }
    PortalSchema().load(complete)
    del complete[left_out]
    with pytest.raises(ValidationError) as caught:
        PortalSchema().load(complete)
    assert left_out in caught.value.messages


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        settings(auth=[], public_url="nonsense", ticket_keys=[], threads=0)
    assert {"auth", "public_url", "ticket_keys", "threads"} <= set(caught.value.messages)


def test_ticket_keys_may_come_from_a_file_with_one_a_line() -> None:
    keys = settings(ticket_keys="a" * 32 + "\n" + "b" * 32 + "\n").ticket_keys
    assert [key.reveal()[0] for key in keys] == ["a", "b"]


def test_secrets_do_not_show() -> None:
    shown = repr(settings(secret_key="visible-" * 5, ticket_keys=["visible-" * 5]))
    assert "visible-" not in shown and "amqp://" not in shown


def test_what_the_content_policy_needs() -> None:
    assert settings().console_origin == "ws://127.0.0.1:8090"
    secure = settings(public_url="https://p.example.org/", console_url="wss://c.example.org/console")
    assert (secure.console_origin, secure.public_url, secure.secure) == (
        "wss://c.example.org",
        "https://p.example.org",
        True,
    )


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"url": "http://mq.example.org:15672", "user": "u", "password": "p"}, "url"),
        ({"url": "https://u:p@mq.example.org", "user": "u", "password": "p"}, "url"),
        ({"url": "https://mq.example.org", "user": "", "password": "p"}, "user"),
        ({"url": "https://mq.example.org", "user": "u"}, "password"),
        ({"url": "https://mq.example.org", "user": "u", "password": "p", "ca": "/nonexistent"}, "ca"),
    ],
)
def test_a_management_api_is_asked_over_tls_by_name(section: dict[str, str], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(broker_management=section)
    assert set(caught.value.messages_dict["broker_management"]) == {field}
    allowed = {"url": "http://127.0.0.1:15672", "user": "u", "password": "p"}
    found = settings(broker_management=allowed).broker_management
    assert found and found.password.reveal() == "p"
