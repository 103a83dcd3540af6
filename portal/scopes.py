"""What an access token is good for. A login by a person is not bound by scopes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum


class Scope(StrEnum):
    """What a token may do, within what its owner may. A `:read` scope changes nothing."""

    DESKTOPS_READ = "desktops:read"
    DESKTOPS = "desktops"
    FLEET_READ = "fleet:read"
    FLEET = "fleet"


#: What each is enough for. Who may stop anybody's desktop may stop their own.
_ENOUGH_FOR = {
    Scope.DESKTOPS_READ: {Scope.DESKTOPS_READ},
    Scope.DESKTOPS: {Scope.DESKTOPS_READ, Scope.DESKTOPS},
    Scope.FLEET_READ: {Scope.DESKTOPS_READ, Scope.FLEET_READ},
    Scope.FLEET: set(Scope),
}


def allows(held: Iterable[Scope], needed: Scope) -> bool:
    """Whether a token with these scopes is good for what needs `needed`."""
    return any(needed in _ENOUGH_FOR[scope] for scope in held)


def needed(access: str, changes: bool) -> Scope | None:
    """What a call of this access (public, person, admin) takes; None when nothing."""
    if access == "admin":
        return Scope.FLEET if changes else Scope.FLEET_READ
    if changes:
        return Scope.DESKTOPS
    return Scope.DESKTOPS_READ if access == "person" else None


def stored(scopes: Collection[Scope]) -> str:
    """As the database keeps them."""
    return " ".join(scope.value for scope in Scope if scope in scopes)


def loaded(text: str) -> tuple[Scope, ...]:
    """From the database."""
    return tuple(Scope(name) for name in text.split())
