"""The broker's definitions for a demo fleet: the product's own rights, with passwords from the demo's keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from demo.keys import Keys
from deskfleet.runtime import rights
from deskfleet.runtime.rights import agent_login as login

__all__ = ["definitions", "login"]


def definitions(hosts: Iterable[str], keys: Keys) -> dict[str, Any]:
    """The document for these hosts; passwords come from `keys` as broker-LOGIN."""
    passwords = {name: keys.secret(f"broker-{name}") for name in ("scheduler", "portal", "proxy")}
    each = [rights.host(host, keys.secret(f"broker-{login(host)}")) for host in hosts]
    return rights.document(rights.services(passwords), *each)
