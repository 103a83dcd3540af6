"""Logins that the server remembers, so that logging out ends them, and personal access tokens for programs."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Table,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from deskfleet.portal import tables
from deskfleet.portal.auth import Identity
from deskfleet.portal.grants import end, grant_of
from deskfleet.portal.scopes import Scope, loaded, stored
from deskfleet.portal.store import Store, digest
from deskfleet.runtime.service import Clock

#: So that people and scanners for leaked secrets see what it is.
TOKEN_PREFIX = "dft_"  # noqa: S105


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A personal access token as its owner sees it later; the token itself is shown once."""

    name: str
    user: str
    label: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float


def _columns(identity: Identity, now: float, lifetime_s: float) -> dict[str, Any]:
    return {
        "user": identity.user,
        "method": identity.method,
        "groups": json.dumps(identity.groups),
        "created_at": now,
        "expires_at": now + lifetime_s,
    }


def _identity(row: RowMapping) -> Identity:
    return Identity(row["user"], row["method"], tuple(json.loads(row["groups"])))


# Made once: each request of somebody who is logged in asks one of them.
_BY_DIGEST = {
    table.name: select(table).where(table.c.digest == bindparam("of_digest")) for table in (tables.login, tables.token)
}


def end_logins(connection: Connection, table: Table, which: ColumnElement[bool], now: float) -> int:
    """Remove logins or tokens, and end what they gave a right to; returns how many there were."""
    ended = list(connection.scalars(delete(table).where(which).returning(table.c.digest)))
    end(connection, [grant_of(found) for found in ended], now)
    return len(ended)


class Logins:
    """Who is logged in, and by which tokens programs may act for whom. Secrets are kept as hashes only.

    A login that nobody used for `idle_s` seconds has ended; 0 is never.
    """

    def __init__(self, store: Store, clock: Clock, idle_s: float = 0.0) -> None:
        self._store = store
        self._clock = clock
        self._idle_s = idle_s
        #: Who was found to be gone, and still has a token.
        self._gone: set[Identity] = set()

    def open(self, identity: Identity, lifetime_s: float) -> str:
        """Remember a login; returns the secret that goes into the cookie."""
        secret = secrets.token_urlsafe(32)
        row = _columns(identity, self._clock.wall(), lifetime_s)
        with self._store.writing() as connection:
            connection.execute(insert(tables.login).values(digest=digest(secret), used_at=row["created_at"], **row))
        return secret

    def find(self, secret: str, used: bool = True) -> Identity | None:
        """Whose login this is, as it was when it began; None when it has ended. `used`: somebody does something by it,
        so that it is not idle."""
        row = self._look_up(tables.login, secret)
        if row is None:
            return None
        now = self._clock.wall()
        # Not at every request: a write for each would make all pages wait for the disk.
        if used and self._idle_s and now - row["used_at"] > min(60.0, self._idle_s / 4):
            mine = tables.login.c.digest == row["digest"]
            with self._store.writing() as connection:
                connection.execute(update(tables.login).where(mine).values(used_at=now))
        return _identity(row)

    def close(self, secret: str) -> None:
        """End a login."""
        with self._store.writing() as connection:
            end_logins(connection, tables.login, tables.login.c.digest == digest(secret), self._clock.wall())

    def make_token(
        self, identity: Identity, label: str, lifetime_s: float, scopes: Collection[Scope]
    ) -> tuple[str, TokenInfo]:
        """A new personal access token: the secret, to be shown once, and what is kept about it."""
        secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
        row = _columns(identity, self._clock.wall(), lifetime_s)
        name = secrets.token_hex(4)
        with self._store.writing() as connection:
            new = insert(tables.token).values(
                digest=digest(secret), name=name, label=label, scopes=stored(scopes), **row
            )
            connection.execute(new)
        return secret, TokenInfo(
            name, identity.user, label, loaded(stored(scopes)), row["created_at"], row["expires_at"]
        )

    def find_token(self, secret: str) -> tuple[Identity, tuple[Scope, ...]] | None:
        """Whose token this is, and what it is good for; None when there is no such token any more."""
        row = self._look_up(tables.token, secret)
        return (_identity(row), loaded(row["scopes"])) if row else None

    def tokens_of(self, user: str) -> list[TokenInfo]:
        """A person's tokens, oldest first."""
        query = select(tables.token).where(tables.token.c.user == user).order_by(tables.token.c.created_at)
        with self._store.reading() as connection:
            return [
                TokenInfo(
                    row["name"],
                    row["user"],
                    row["label"],
                    loaded(row["scopes"]),
                    row["created_at"],
                    row["expires_at"],
                )
                for row in connection.execute(query).mappings()
            ]

    def drop_token(self, user: str, name: str) -> bool:
        """Remove a person's token; False when there is none of that name."""
        mine = and_(tables.token.c.user == user, tables.token.c.name == name)
        with self._store.writing() as connection:
            return end_logins(connection, tables.token, mine, self._clock.wall()) == 1

    def now(self) -> dict[str, int]:
        """Who is logged in, and how often."""
        now, login = self._clock.wall(), tables.login.c
        query = select(login.user, func.count()).where(login.expires_at > now).group_by(login.user)
        if self._idle_s:
            query = query.where(login.used_at > now - self._idle_s)
        with self._store.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def sweep(self) -> None:
        """End what has expired or is idle. Repeated every second."""
        now = self._clock.wall()
        over = {table: table.c.expires_at <= now for table in (tables.login, tables.token)}
        if self._idle_s:
            over[tables.login] = or_(over[tables.login], tables.login.c.used_at <= now - self._idle_s)
        for table, condition in over.items():
            with self._store.reading() as connection:  # mostly there is none, and nobody waits for the disk
                found = connection.execute(select(table.c.digest).where(condition).limit(1)).first()
            if found is not None:
                with self._store.writing() as connection:
                    end_logins(connection, table, condition, now)

    def end_gone(self, current: Callable[[Identity], Identity | None]) -> set[Identity]:
        """End the logins, and what is open by the tokens, of those whom `current` knows no more; returns who they are.

        The tokens are kept, and refused as long as their owner is: a directory that is set up wrongly for an hour
        should not cost a site its scripts.
        """
        gone = {who for who in self._holders() if current(who) is None}
        found, self._gone = gone - self._gone, gone
        for who in found:
            self._shut_out(who)
        return found

    def _holders(self) -> set[Identity]:
        with self._store.reading() as connection:
            return {
                _identity(row)
                for table in (tables.login, tables.token)
                for row in connection.execute(select(table.c.user, table.c.method, table.c.groups)).mappings()
            }

    def _shut_out(self, who: Identity) -> None:
        now = self._clock.wall()
        with self._store.writing() as connection:
            mine = and_(tables.login.c.user == who.user, tables.login.c.method == who.method)
            end_logins(connection, tables.login, mine, now)
            token = tables.token.c
            held = select(token.digest).where(token.user == who.user, token.method == who.method)
            end(connection, [grant_of(found) for found in connection.scalars(held)], now)

    def _look_up(self, table: Table, secret: str) -> RowMapping | None:
        now = self._clock.wall()
        with self._store.reading() as connection:
            row = connection.execute(_BY_DIGEST[table.name], {"of_digest": digest(secret)}).mappings().first()
        # A row from the future is one that a clock set back would revive.
        if row is None or row["expires_at"] <= now or row["created_at"] > now + 60:
            return None
        idle = table is tables.login and self._idle_s and row["used_at"] <= now - self._idle_s
        return None if idle else row
