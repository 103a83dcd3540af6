"""Links by which others may open one's desktop, until they expire or are taken back.

A link holds a secret of 256 bits, of which only a hash is kept: it is shown once. A passphrase may be asked for
besides. Whoever opened a link has that in their browser's signed cookie, and each ticket is checked against the share
again, so a link that was taken back opens nothing more; what is open by it is cut (grants.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import RowMapping, delete, insert, select, update
from werkzeug.security import check_password_hash, generate_password_hash

from deskfleet.portal import tables
from deskfleet.portal.grants import Grants
from deskfleet.portal.store import Store, digest
from deskfleet.runtime.service import Clock

#: Links of one desktop that may be open at once.
MOST = 20
_KEEP_S = 30 * 24 * 3600.0
# Not scrypt: its 32 MiB a try would let anybody with a link fill the memory.
_HASH = "pbkdf2:sha256:600000"


class Audience(StrEnum):
    """Who may use a link: people who are signed in, or everybody who has it."""

    SIGNED_IN = "signed_in"
    ANYBODY = "anybody"


@dataclass(frozen=True, slots=True)
class Share:
    """A link as its owner sees it later. Times are UNIX seconds; `locked` means that a passphrase is asked for."""

    name: str
    sid: str
    owner: str
    audience: Audience
    locked: bool
    created_at: float
    expires_at: float
    revoked_at: float | None

    @property
    def grant(self) -> str:
        """What consoles are opened by."""
        return f"share-{self.name}"

    def good(self, now: float) -> bool:
        """Whether it opens anything."""
        return self.revoked_at is None and now < self.expires_at


class Shares:
    """The links of this portal's people."""

    def __init__(self, store: Store, grants: Grants, clock: Clock) -> None:
        self._store = store
        self._grants = grants
        self._clock = clock

    def make(self, sid: str, owner: str, audience: Audience, lifetime_s: float, passphrase: str) -> tuple[str, Share]:
        """A new link: its secret, to be shown once, and what is kept of it."""
        secret, now = secrets.token_urlsafe(32), self._clock.wall()
        row: dict[str, Any] = {
            "name": secrets.token_hex(8),
            "digest": digest(secret),
            "sid": sid,
            "owner": owner,
            "audience": audience.value,
            "passphrase": generate_password_hash(passphrase, _HASH) if passphrase else "",
            "created_at": now,
            "expires_at": now + lifetime_s,
            "revoked_at": None,
        }
        with self._store.writing() as connection:
            connection.execute(insert(tables.share).values(**row))
        return secret, _share(row)

    def find(self, secret: str) -> Share | None:
        """The share of a link, None when it opens nothing (any more)."""
        return self._good(tables.share.c.digest == digest(secret))

    def named(self, name: str) -> Share | None:
        """The share of this name, None when it opens nothing (any more)."""
        return self._good(tables.share.c.name == name)

    def _good(self, which: Any) -> Share | None:
        with self._store.reading() as connection:
            row = connection.execute(select(tables.share).where(which)).mappings().first()
        share = _share(row) if row else None
        return share if share and share.good(self._clock.wall()) else None

    def opens(self, share: Share, passphrase: str) -> bool:
        """Whether this is the share's passphrase. Slow on purpose."""
        query = select(tables.share.c.passphrase).where(tables.share.c.name == share.name)
        with self._store.reading() as connection:
            wanted = connection.scalar(query)
        return wanted == "" or (wanted is not None and check_password_hash(wanted, passphrase))

    def of(self, sid: str) -> list[Share]:
        """The links of a desktop that open it, oldest first."""
        query = select(tables.share).where(tables.share.c.sid == sid).order_by(tables.share.c.created_at)
        with self._store.reading() as connection:
            shares = [_share(row) for row in connection.execute(query).mappings()]
        return [share for share in shares if share.good(self._clock.wall())]

    def revoke(self, sid: str, name: str) -> bool:
        """Take a link back and cut what is open by it; False when this desktop has no such link."""
        share = tables.share.c
        mine = (share.sid == sid, share.name == name)
        with self._store.writing() as connection:
            found = connection.execute(select(tables.share).where(*mine)).mappings().first()
            if found is None:
                return False
            connection.execute(
                update(tables.share).where(*mine, share.revoked_at.is_(None)).values(revoked_at=self._clock.wall())
            )
        self._grants.revoke([_share(found).grant])
        return True

    def sweep(self) -> None:
        """Cut what is open by links whose time is over. Repeated every second."""
        share, now = tables.share.c, self._clock.wall()
        query = select(tables.share).where(share.revoked_at.is_(None), share.expires_at <= now)
        with self._store.reading() as connection:
            over = [_share(row) for row in connection.execute(query).mappings()]
        if over:
            with self._store.writing() as connection:
                connection.execute(
                    update(tables.share).where(share.name.in_([one.name for one in over])).values(revoked_at=now)
                )
            self._grants.revoke(one.grant for one in over)

    def prune(self) -> None:
        """Forget links of long ago."""
        with self._store.writing() as connection:
            connection.execute(delete(tables.share).where(tables.share.c.expires_at < self._clock.wall() - _KEEP_S))


def _share(row: RowMapping | Mapping[str, Any]) -> Share:
    return Share(
        row["name"],
        row["sid"],
        row["owner"],
        Audience(row["audience"]),
        row["passphrase"] != "",
        row["created_at"],
        row["expires_at"],
        row["revoked_at"],
    )
