"""Proving who somebody is: a chain of methods, asked in order until one says yes.

A method that can't be reached is not a method that says no, and neither is ever a yes.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

log = logging.getLogger(__name__)

LONGEST_NAME = 320
LONGEST_PASSWORD = 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """A person: `user` is the method's canonical id, never what was typed."""

    user: str
    method: str
    groups: tuple[str, ...] = ()
    admin: bool = False


@dataclass(frozen=True, slots=True)
class WrongPassword:
    """The method knows that this is not the password, or knows nobody of this name."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The method could not be asked; `detail` is for the log."""

    detail: str


Answer = Identity | WrongPassword | Unavailable


class Method(Protocol):
    """One way to prove who one is. MUST come back within seconds, MUST NOT log or keep the password."""

    name: str

    def check(self, user: str, password: str) -> Answer:
        """Judge a name and a password; both have passed `plausible`."""
        ...

    def current(self, identity: Identity) -> Identity | None:
        """What somebody who logged in earlier is now; None when the account is gone or disabled."""
        ...


def plausible(user: str, password: str) -> bool:
    """Whether a login is worth asking anybody about.

    An empty password is refused here, before any method sees it: a directory may answer an anonymous bind with yes
    (RFC 4513, 5.1.2). Blank includes characters without a width of their own.
    """
    if not 0 < len(user) <= LONGEST_NAME or not 0 < len(password) <= LONGEST_PASSWORD:
        return False
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn") for letter in user + password):
        return False
    return user == user.strip() and not all(unicodedata.category(letter)[0] in "ZC" for letter in password)


class Chain:
    """The methods of one installation, and who is an administrator: by exact canonical id, or because the method says
    so."""

    def __init__(self, methods: Sequence[Method], admins: frozenset[str]) -> None:
        self._methods = tuple(methods)
        self._admins = admins

    def check(self, user: str, password: str) -> Answer:
        """The first yes; else Unavailable when any method could not be asked; else WrongPassword."""
        if not plausible(user, password):
            return WrongPassword()
        away: list[str] = []
        for method in self._methods:
            answer = self._ask(method, user, password)
            if isinstance(answer, Identity):
                return self._rank(answer)
            if isinstance(answer, Unavailable):
                away.append(f"{method.name}: {answer.detail}")
        return Unavailable("; ".join(away)) if away else WrongPassword()

    def current(self, identity: Identity) -> Identity | None:
        """Who an earlier login is now; None when it counts no more."""
        for method in self._methods:
            if method.name == identity.method:
                now = method.current(identity)
                return self._rank(now) if now else None
        return None

    def _rank(self, identity: Identity) -> Identity:
        return replace(identity, admin=identity.admin or identity.user in self._admins)

    def _ask(self, method: Method, user: str, password: str) -> Answer:
        try:
            return method.check(user, password)
        except Exception:
            log.exception("the login method %s failed", method.name)
            return Unavailable("it failed; see the log")
