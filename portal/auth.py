"""Proving who somebody is: a chain of methods, asked in order until one says yes.

A method that can't be reached is not a method that says no, and neither is ever a yes. Behind one that can't be reached
only the portal's own accounts are asked, which are there for rescue.
"""

from __future__ import annotations

import logging
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from deskfleet.portal.room import Room

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


class Vouching(Protocol):
    """One way to prove who one is."""

    name: str

    def current(self, identity: Identity) -> Identity | None:
        """What somebody who logged in earlier is now; None when the account is gone or disabled."""
        ...


class Method(Vouching, Protocol):
    """One by name and password. MUST come back within seconds, MUST NOT log or keep the password.

    `distant` is whether it asks another machine, so that it may be away or slow.
    """

    distant: bool

    def check(self, user: str, password: str) -> Answer:
        """Judge a name and a password; both have passed `plausible`."""
        ...


@dataclass(frozen=True, slots=True)
class Realm:
    """Whose names a method knows. `own` stands behind its names (alice@example.org); with an empty one names stay as
    they are, and mean the same people as the local accounts of these names. `others` are the realms of other methods.
    """

    own: str
    others: frozenset[str] = frozenset()

    def user_of(self, name: str) -> str | None:
        """The canonical id for a name that the method vouches for; None when it belongs to another realm."""
        name = normal(name)
        inner, at, domain = name.rpartition("@")
        if not self.own:
            return None if at and domain.lower() in self.others else name
        if at and inner and domain.lower() == self.own:
            name = inner
        return f"{name}@{self.own}"


@dataclass(frozen=True, slots=True)
class Rights:
    """What a method's groups mean: `admins` are the groups of administrators, `allowed` those whose members may log in;
    without any, everybody may."""

    admins: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()

    def judge(self, user: str, method: str, groups: Iterable[str]) -> Identity | None:
        """The person with these groups; None when they may not log in."""
        mine = tuple(sorted({normal(group) for group in groups}))
        if self.allowed and not self.allowed & set(mine):
            return None
        return Identity(user, method, mine, bool(self.admins & set(mine)))


def normal(name: str) -> str:
    """The same name may be written with composed or decomposed accents; case stays."""
    return unicodedata.normalize("NFC", name)


def plausible_name(user: str) -> bool:
    """Whether this can be anybody's name: some visible characters, nothing that controls anything."""
    return 0 < len(user) <= LONGEST_NAME and user == user.strip() and not _unprintable(user)


def plausible(user: str, password: str) -> bool:
    """Whether a login is worth asking anybody about.

    An empty password is refused here, before any method sees it: a directory may answer an anonymous bind with yes
    (RFC 4513, 5.1.2). Blank includes characters without a width of their own.
    """
    if not plausible_name(user) or not 0 < len(password) <= LONGEST_PASSWORD or _unprintable(password):
        return False
    return not all(unicodedata.category(letter)[0] in "ZC" for letter in password)


def _unprintable(text: str) -> bool:
    return any(unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn") for letter in text)


class Chain:
    """The methods of one installation, and who is an administrator: by exact canonical id, or because the method says
    so. `others` are the methods that need no password. In `room` is who waits for other machines, so that one that
    hangs does not take every thread; `count` is told each method's answers.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        admins: frozenset[str],
        others: Sequence[Vouching] = (),
        count: Callable[[str, str], None] | None = None,
        room: Room | None = None,
    ) -> None:
        self._methods = tuple(methods)
        self._admins = admins
        self._all: dict[str, Vouching] = {method.name: method for method in (*methods, *others)}
        self._count = count or (lambda *_: None)
        self._room = room or Room(8, time.monotonic)

    @property
    def passwords(self) -> bool:
        """Whether there is a method that takes a name and a password."""
        return bool(self._methods)

    def check(self, user: str, password: str) -> Answer:
        """The first yes; else Unavailable when any method could not be asked; else WrongPassword."""
        if not plausible(user, password):
            return WrongPassword()
        away: list[str] = []
        for method in self._methods:
            if away and method.distant:
                continue
            answer = self._ask(method, user, password)
            self._count(method.name, _RESULTS[type(answer)])
            if isinstance(answer, Identity):
                return self.ranked(answer)
            if isinstance(answer, Unavailable):
                log.warning("the login method %s can't be asked: %s", method.name, answer.detail)
                away.append(f"{method.name}: {answer.detail}")
        return Unavailable("; ".join(away)) if away else WrongPassword()

    def current(self, identity: Identity) -> Identity | None:
        """Who an earlier login is now; None when it counts no more."""
        method = self._all.get(identity.method)
        now = method.current(identity) if method else None
        return self.ranked(now) if now else None

    def ranked(self, identity: Identity) -> Identity:
        """The person with an administrator's rights when the settings name them."""
        return replace(identity, admin=identity.admin or identity.user in self._admins)

    def _ask(self, method: Method, user: str, password: str) -> Answer:
        with self._room.place() if method.distant else nullcontext(True) as found:
            if not found:
                return Unavailable("too many others are being asked about")
            try:
                return method.check(user, password)
            except Exception:
                log.exception("the login method %s failed", method.name)
                return Unavailable("it failed; see the log")


_RESULTS: dict[type[Answer], str] = {Identity: "right", WrongPassword: "wrong", Unavailable: "unavailable"}
