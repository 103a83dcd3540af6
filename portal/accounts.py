"""Accounts that live in the portal's own database: for a demo, for a small group, and for rescue."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

from sqlalchemy import and_, bindparam, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from werkzeug.security import check_password_hash, generate_password_hash

from deskfleet.portal import tables
from deskfleet.portal.auth import LONGEST_NAME, Answer, Identity, Unavailable, WrongPassword, normal, plausible
from deskfleet.portal.logins import end_logins
from deskfleet.portal.store import Store
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DeskfleetError

_SHORTEST_PASSWORD = 8
#: How passwords are kept: scrypt (RFC 7914) of cost 2**15.
HASHING = "scrypt:32768:8:1"
# That takes 32 MiB a check: a class that logs in at once must not fill the memory.
_AT_ONCE = 4
# What is checked when there is no such account, so that the answer takes as long as for one that exists.
# Made once: each request of somebody who is logged in asks it.
_ACCOUNT = select(tables.account).where(tables.account.c.user == bindparam("of_user"))
_NOBODY = generate_password_hash("nobody", HASHING)


class AccountError(DeskfleetError):
    """Raised when an account can't be made or changed as asked; the text says why."""


@dataclass(frozen=True, slots=True)
class Account:
    """A local account without its password."""

    user: str
    admin: bool
    groups: tuple[str, ...]
    disabled: bool
    created_at: float


class Accounts:
    """The local accounts, and the login method "local" on them. A change ends the account's logins and tokens."""

    name = "local"
    distant = False

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._room = threading.BoundedSemaphore(_AT_ONCE)

    def check(self, user: str, password: str) -> Answer:
        """See auth.Method."""
        try:
            with self._store.reading() as connection:
                query = select(tables.account).where(tables.account.c.user == normal(user))
                row = connection.execute(query).mappings().first()
        except DBAPIError as error:
            return Unavailable(type(error.orig).__name__)
        with self._room:
            right = check_password_hash(row["password"] if row else _NOBODY, password)
        if row is None or not right or row["disabled"]:
            return WrongPassword()
        return Identity(row["user"], self.name, tuple(json.loads(row["groups"])), bool(row["admin"]))

    def current(self, identity: Identity) -> Identity | None:
        """See auth.Method."""
        account = self.find(identity.user)
        if account is None or account.disabled:
            return None
        return Identity(account.user, self.name, account.groups, account.admin)

    def find(self, user: str) -> Account | None:
        """One account by its exact name."""
        with self._store.reading() as connection:
            row = connection.execute(_ACCOUNT, {"of_user": user}).mappings().first()
        if row is None:
            return None
        return Account(
            row["user"], bool(row["admin"]), tuple(json.loads(row["groups"])), bool(row["disabled"]), row["created_at"]
        )

    def all(self) -> list[Account]:
        """Every account by name."""
        with self._store.reading() as connection:
            names = list(connection.scalars(select(tables.account.c.user).order_by(tables.account.c.user)))
        return [account for name in names if (account := self.find(name))]

    def add(self, user: str, password: str, admin: bool = False, groups: tuple[str, ...] = ()) -> str:
        """Make an account and return its canonical name.

        Raises:
            AccountError: the name is taken or not usable, or the password too short.
        """
        name = normal(user)
        _check_password(name, password)
        row = {
            "user": name,
            "password": generate_password_hash(password, HASHING),
            "admin": admin,
            "groups": json.dumps(groups),
            "disabled": False,
            "created_at": self._clock.wall(),
        }
        try:
            with self._store.writing() as connection:
                connection.execute(insert(tables.account).values(row))
        except IntegrityError:
            raise AccountError(f"there is an account {name!r} already") from None
        return name

    def set_password(self, user: str, password: str) -> None:
        """Replace a password. Raises AccountError."""
        _check_password(user, password)
        self._change(user, password=generate_password_hash(password, HASHING))

    def set_disabled(self, user: str, disabled: bool) -> None:
        """Shut an account, or open it again. Raises AccountError."""
        self._change(user, disabled=disabled)

    def _change(self, user: str, **values: object) -> None:
        name = normal(user)
        with self._store.writing() as connection:
            query = update(tables.account).where(tables.account.c.user == name).values(values)
            if connection.execute(query).rowcount != 1:
                raise AccountError(f"there is no account {name!r}")
            for table in (tables.login, tables.token):
                mine = and_(table.c.user == name, table.c.method == self.name)
                end_logins(connection, table, mine, self._clock.wall())


def _check_password(user: str, password: str) -> None:
    if not plausible(user, "x" * _SHORTEST_PASSWORD):
        raise AccountError(
            f"the name must have 1 to {LONGEST_NAME} characters, none of them invisible, no blank at either end"
        )
    if len(password) < _SHORTEST_PASSWORD or not plausible(user, password):
        raise AccountError(f"the password must have at least {_SHORTEST_PASSWORD} visible characters")
