"""Log in by a code that is sent by mail, for people without an account.

There is no link that logs in, so nothing is used up or given away by whatever opens mails before their reader. A code
works once, for ten minutes, in the browser that asked for it. Everything but the mail itself happens for every address,
so that nobody learns which ones may be used.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import smtplib
from collections.abc import Callable
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate
from enum import Enum, auto
from functools import partial
from urllib.parse import urlsplit

from babel.support import NullTranslations
from sqlalchemy import delete, func, insert, select, update

from deskfleet.portal import tables
from deskfleet.portal.auth import Identity
from deskfleet.portal.auth_settings import EmailSettings
from deskfleet.portal.languages import catalogue, language
from deskfleet.portal.mail import Send
from deskfleet.portal.settings import address_of
from deskfleet.portal.store import Store, digest
from deskfleet.runtime.service import Clock

log = logging.getLogger(__name__)

LIFETIME_S = 600
_DIGITS = 8
_MOST_TRIES = 5
_HOUR_S = 3600.0
# After a mail that could not be sent, everybody is told so for this long.
_TROUBLE_S = 60.0


class Fault(Enum):
    """Why a code logs nobody in."""

    WRONG = auto()
    EXPIRED = auto()
    USED_UP = auto()


class EmailCodes:
    """The login method "email". `later` runs an action on a thread that may take its time; False when too many wait."""

    name = "email"

    def __init__(
        self,
        store: Store,
        clock: Clock,
        settings: EmailSettings,
        key: str,
        send: Send,
        sender: str,
        title: str,
        public_url: str,
        later: Callable[[Callable[[], None]], bool],
    ) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings
        self._key = key.encode()
        self._send = send
        self._sender = sender
        self._title = title
        self._public_url = public_url
        self._later = later
        self._trouble_until = 0.0

    @property
    def in_trouble(self) -> bool:
        """Whether mails can't be sent at the moment, whatever the address."""
        return self._clock.monotonic() < self._trouble_until

    @property
    def domains(self) -> tuple[str, ...]:
        """Whose addresses may be used."""
        return self._settings.domains

    def canonical(self, typed: str) -> str | None:
        """The one address that was typed, in small letters; None when it is none."""
        address = address_of(typed, "") if "@" in typed else None
        # What would be read as something else is refused, not mended: a list, a name before the address, a route.
        return typed.lower() if address is not None and address.lower() == typed.lower() else None

    def ask(self, address: str, known: bool) -> str:
        """Make a code, and send it when the address may be used. Returns the secret for the browser that asked.

        `known` is whether that browser has logged in by this address before: what strangers used up leaves it as much.
        """
        secret, code = secrets.token_urlsafe(32), "".join(secrets.choice("0123456789") for _ in range(_DIGITS))
        now = self._clock.wall()
        row = digest(secret)
        with self._store.writing() as connection:
            recent = select(func.count()).where(tables.code.c.mailed, tables.code.c.created_at > now - _HOUR_S)
            to_all = connection.scalar(recent) or 0
            to_one = connection.scalar(recent.where(tables.code.c.address == address)) or 0
            room_for_one = to_one < self._settings.mails_per_hour * (2 if known else 1)
            room = room_for_one and to_all < self._settings.all_mails_per_hour
            mailed = room and self._allowed(address)
            connection.execute(
                insert(tables.code).values(
                    digest=row,
                    address=address,
                    code=self._seal(row, address, code),
                    mailed=mailed,
                    tries=0,
                    created_at=now,
                    expires_at=now + LIFETIME_S,
                )
            )
        if not room:
            log.warning("no code was sent: as many mails as the settings allow went out in the last hour")
        if mailed and not self._later(partial(self._mail, catalogue(language()), address, code)):
            self._trouble_until = self._clock.monotonic() + _TROUBLE_S
        return secret

    def redeem(self, secret: str, typed: str) -> Identity | Fault:
        """Whom a code logs in. It is spent by that; a wrong one costs one of five tries."""
        row, now = digest(secret), self._clock.wall()
        mine = tables.code.c.digest == row
        with self._store.writing() as connection:
            good = mine & (tables.code.c.tries < _MOST_TRIES)
            # Counted before it is looked at, so that many at once gain nothing.
            counted = connection.execute(update(tables.code).where(good).values(tries=tables.code.c.tries + 1)).rowcount
            found = connection.execute(select(tables.code).where(mine)).mappings().first()
            if found is None or found["expires_at"] <= now or found["created_at"] > now + 60:
                return Fault.EXPIRED
            if not counted:
                return Fault.USED_UP
            code = "".join(letter for letter in typed if letter not in " -\u00a0")
            address = str(found["address"])
            right = hmac.compare_digest(found["code"], self._seal(row, address, code))
            # One that was never sent was guessed.
            if not (right and found["mailed"] and self._allowed(address)):
                return Fault.WRONG
            # The mail that went out counts on; the code does not.
            connection.execute(update(tables.code).where(mine).values(tries=_MOST_TRIES, code=""))
        return Identity(address, self.name)

    def current(self, identity: Identity) -> Identity | None:
        """See auth.Vouching."""
        return identity if self._allowed(identity.user) else None

    def prune(self) -> None:
        """Forget codes that count for nothing any more."""
        with self._store.writing() as connection:
            old = tables.code.c.created_at < self._clock.wall() - _HOUR_S
            connection.execute(delete(tables.code).where(old))

    def _allowed(self, address: str) -> bool:
        return address.rpartition("@")[2] in self._settings.domains

    def _seal(self, row: str, address: str, code: str) -> str:
        # A code is short: a plain hash of it could be turned back by trying them all.
        text = f"deskfleet.code.1\0{row}\0{address}\0{code}"
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def _mail(self, words: NullTranslations, address: str, code: str) -> None:
        host = urlsplit(self._public_url).hostname
        message = EmailMessage(policy=SMTP)  # it refuses a header that holds a line break
        message["From"] = self._sender
        message["To"] = address
        figures = {"site": self._title, "code": f"{code[:4]} {code[4:]}", "address": self._public_url}
        message["Subject"] = words.gettext("Your code for %(site)s") % figures
        message["Date"] = formatdate(self._clock.wall())
        message["Message-ID"] = f"<code.{secrets.token_hex(16)}@{host}>"
        message["Auto-Submitted"] = "auto-generated"
        lines = (
            words.gettext("Your code: %(code)s") % figures,
            words.gettext(
                "Type it into the page of %(address)s that asks for it, in the browser where you asked. It is good "
                "once, for ten minutes."
            )
            % figures,
            words.gettext(
                "If you did not ask for it, somebody else typed your address. Do nothing, and give the code to nobody."
            ),
        )
        message.set_content("\n\n".join(lines) + "\n")
        try:
            self._send(message)
        except (smtplib.SMTPException, OSError) as error:
            self._trouble_until = self._clock.monotonic() + _TROUBLE_S
            log.warning("a code could not be sent: %s", type(error).__name__)
