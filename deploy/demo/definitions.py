"""RabbitMQ's definitions document for a fleet: a login for each service, with no more rights than it needs.

The broker checks the sender of each message (user_id) and, on the topic exchange, its routing key, so one host's login
can neither read another host's commands nor report as that host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from demo.broker import permission, user
from demo.keys import Keys
from deskfleet.schemas import topology


def login(host: str) -> str:
    """The broker login of a host's agent."""
    return f"agent-{host}"


def definitions(hosts: Iterable[str], keys: Keys) -> dict[str, Any]:
    """The document for these hosts; passwords come from `keys` as broker-LOGIN."""
    hosts = list(hosts)
    core = r"^(commands|events|dead|scheduler\..*)$"
    permissions = [
        permission("scheduler", core, core, core),
        permission("portal", r"^answers\.", r"^(commands|answers\..*)$", r"^(answers\..*|events)$"),
        permission("proxy", r"^proxy\.", r"^proxy\.", r"^(proxy\..*|events)$"),
    ]
    topics = []
    for host in hosts:
        name = re.escape(host)
        permissions.append(permission(login(host), "^$", "^events$", rf"^host\.{name}$"))
        topics.append(
            {"user": login(host), "vhost": "/", "exchange": "events", "write": rf"^host\.{name}\.", "read": "^$"}
        )
    logins = ["scheduler", "portal", "proxy", *(login(host) for host in hosts)]
    declared = topology.EXCHANGES_ONLY
    for host in hosts:
        declared = declared + topology.for_host(host)
    return {
        "users": [user(name, keys.secret(f"broker-{name}")) for name in logins],
        "permissions": permissions,
        "topic_permissions": topics,
        "exchanges": [
            {"name": e.name, "vhost": "/", "type": e.kind, "durable": True, "auto_delete": False, "arguments": {}}
            for e in declared.exchanges
        ],
        "queues": [
            {"name": q.name, "vhost": "/", "durable": True, "auto_delete": False, "arguments": dict(q.arguments)}
            for q in declared.queues
        ],
        "bindings": [
            {
                "source": b.exchange,
                "vhost": "/",
                "destination": b.queue,
                "destination_type": "queue",
                "routing_key": b.key,
                "arguments": {},
            }
            for b in declared.bindings
        ],
    }
