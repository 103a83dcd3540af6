"""Who may do what on the broker, as RabbitMQ's definitions document: a login for each service and each host, with no
more rights than it needs.

The broker checks the sender of each message (user_id) and, on the topic exchange, its routing key, so one host's login
can neither read another host's commands nor report as that host. Pure.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from deskfleet.schemas import topology


def agent_login(host: str) -> str:
    """The broker login of a host's agent."""
    return f"agent-{host}"


def user(login: str, password: str, tags: Iterable[str] = ()) -> dict[str, Any]:
    """A user of a definitions document; the hash is RabbitMQ's `rabbit_password_hashing_sha256`: salt, and the SHA-256
    of salt and password."""
    salt = secrets.token_bytes(4)
    digest = hashlib.sha256(salt + password.encode()).digest()
    return {
        "name": login,
        "password_hash": base64.b64encode(salt + digest).decode(),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": ",".join(tags),
    }


def permission(login: str, configure: str, write: str, read: str, vhost: str = "/") -> dict[str, str]:
    """A permission of a definitions document; each value is a regular expression over queue and exchange names."""
    return {"user": login, "vhost": vhost, "configure": configure, "write": write, "read": read}


def services(passwords: Mapping[str, str], vhost: str = "/") -> dict[str, Any]:
    """The logins of scheduler, portal and proxy; `passwords` by these names."""
    core = r"^(commands|events|dead|consoles|viewers|scheduler\..*)$"
    own = r"^(answers|pictures|viewers)\."
    return {
        "users": [user(name, passwords[name]) for name in ("scheduler", "portal", "proxy")],
        "permissions": [
            permission("scheduler", core, core, core, vhost),
            permission("portal", own, rf"({own}|^(commands|consoles)$)", rf"({own}|^(events|viewers|dead)$)", vhost),
            permission("proxy", r"^proxy\.", r"^(proxy\..*|viewers)$", r"^(proxy\..*|events|consoles)$", vhost),
        ],
    }


def host(name: str, password: str, vhost: str = "/") -> dict[str, Any]:
    """One host: its login, its rights, and its two queues, which it may read and not declare."""
    login, escaped = agent_login(name), re.escape(name)
    declared = topology.EXCHANGES_ONLY + topology.for_host(name)
    return {
        "users": [user(login, password)],
        "permissions": [permission(login, "^$", "^events$", rf"^host\.{escaped}(\.look)?$", vhost)],
        "topic_permissions": [
            {"user": login, "vhost": vhost, "exchange": "events", "write": rf"^host\.{escaped}\.", "read": "^$"}
        ],
        "exchanges": [
            {"name": e.name, "vhost": vhost, "type": e.kind, "durable": True, "auto_delete": False, "arguments": {}}
            for e in declared.exchanges
        ],
        "queues": [
            {"name": q.name, "vhost": vhost, "durable": True, "auto_delete": False, "arguments": dict(q.arguments)}
            for q in declared.queues
        ],
        "bindings": [
            {
                "source": b.exchange,
                "vhost": vhost,
                "destination": b.queue,
                "destination_type": "queue",
                "routing_key": b.key,
                "arguments": {},
            }
            for b in declared.bindings
        ],
    }


def document(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Several parts as one definitions document; what stands in two of them is there once."""
    whole: dict[str, Any] = {}
    for part in parts:
        for section, entries in part.items():
            known = whole.setdefault(section, [])
            known += [entry for entry in entries if entry not in known]
    return whole
