"""The mail that tells a person, once, that the desktop they waited for is running.

It is written and sent by a thread of its own, so that no page waits for a mail server. A row in the portal's database
claims each try, so that several portals send one mail; a crash in the instant after the server took it may send it
again, under the same Message-ID.
"""

from __future__ import annotations

import logging
import smtplib
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate
from enum import StrEnum
from urllib.parse import urlsplit

from prometheus_client import Counter
from sqlalchemy import RowMapping, delete, or_, select, update

from deskfleet.portal import tables
from deskfleet.portal.records import Records, Started
from deskfleet.portal.settings import MailSettings, address_of, trust
from deskfleet.portal.store import Store, upsert
from deskfleet.runtime.service import Clock
from deskfleet.schemas.machine import Machine

log = logging.getLogger(__name__)

#: A desktop that came to run longer ago is no news: mail may just have been configured, or the portal was off.
_NEWS_S = 3600.0
_KEEP_S = 30 * 24 * 3600.0
_MOST_TRIES = 4
# Longer than a whole exchange with a slow server takes, so that no second portal begins while the first one sends.
_FIRST_PAUSE_S = 120.0
_BATCH = 20
_STEP_S = 10.0

Send = Callable[[EmailMessage], None]


class Fate(StrEnum):
    """What became of a mail."""

    OPEN = "open"
    SENT = "sent"
    FAILED = "failed"
    NEEDLESS = "needless"


class Notices:
    """Finds desktops that run after a wait, and sends their owners a mail."""

    def __init__(
        self,
        store: Store,
        records: Records,
        machines: Callable[[], Mapping[str, Machine]],
        clock: Clock,
        settings: MailSettings,
        public_url: str,
        send: Send,
        count: Counter,
    ) -> None:
        self._store = store
        self._records = records
        self._machines = machines
        self._clock = clock
        self._settings = settings
        self._public_url = public_url
        self._send = send
        self._count = count

    def sweep(self) -> None:
        """Enter what is new and try what is due. Repeated every few seconds; raises DBAPIError."""
        self._enter(self._records.started_late(self._settings.mail_after_s, _NEWS_S))
        notice, now = tables.notice.c, self._clock.wall()
        # A date that lies far ahead comes from a clock that was set back since.
        farthest = now + _FIRST_PAUSE_S * 2.0**_MOST_TRIES
        due = or_(notice.next_try_at <= now, notice.next_try_at > farthest)
        query = select(tables.notice).where(notice.state == Fate.OPEN, due).order_by(notice.next_try_at)
        with self._store.reading() as connection:
            rows = list(connection.execute(query.limit(_BATCH)).mappings())
        for row in rows:
            if self._claim(row):
                fate = self._try(row)
                if fate is not Fate.OPEN:
                    self._close(row["sid"], fate)

    def prune(self) -> None:
        """Forget mails of long ago."""
        with self._store.writing() as connection:
            old = tables.notice.c.created_at < self._clock.wall() - _KEEP_S
            connection.execute(delete(tables.notice).where(old))

    def _enter(self, found: list[Started]) -> None:
        if not found:
            return
        with self._store.reading() as connection:
            query = select(tables.notice.c.sid).where(tables.notice.c.sid.in_([started.sid for started in found]))
            known = set(connection.scalars(query))
        now = self._clock.wall()
        rows = [
            {
                "sid": started.sid,
                "user": started.user,
                "machine": started.machine,
                "created_at": now,
                "next_try_at": now,
                "tries": 0,
                "state": Fate.OPEN.value,
            }
            for started in found
            if started.sid not in known
        ]
        if rows:
            with self._store.writing() as connection:
                insertion = upsert(connection, tables.notice).values(rows)
                connection.execute(insertion.on_conflict_do_nothing(index_elements=["sid"]))

    def _claim(self, row: RowMapping) -> bool:
        notice = tables.notice.c
        query = (
            update(tables.notice)
            .where(notice.sid == row["sid"], notice.state == Fate.OPEN, notice.tries == row["tries"])
            .values(tries=row["tries"] + 1, next_try_at=self._clock.wall() + _FIRST_PAUSE_S * 2.0 ** row["tries"])
        )
        with self._store.writing() as connection:
            return connection.execute(query).rowcount == 1

    def _try(self, row: RowMapping) -> Fate:
        sid = row["sid"]
        if not self._records.running(sid):
            return Fate.NEEDLESS
        address = address_of(row["user"], self._settings.domain)
        if address is None:
            log.warning("no mail about session %s: its owner's name makes no address", sid)
            return Fate.FAILED
        try:
            self._send(self._write(row, address))
        except (smtplib.SMTPException, OSError) as error:
            last = row["tries"] + 1 >= _MOST_TRIES
            log.warning("the mail about session %s was not taken%s: %s", sid, ", given up" if last else "", _why(error))
            return Fate.FAILED if last else Fate.OPEN
        return Fate.SENT

    def _write(self, row: RowMapping, address: str) -> EmailMessage:
        machine = self._machines().get(row["machine"])
        title = "".join(letter for letter in (machine.title if machine else row["machine"]) if letter.isprintable())
        message = EmailMessage(policy=SMTP)  # it refuses a header that holds a line break
        message["From"] = self._settings.sender
        message["To"] = address
        message["Subject"] = f"Your desktop is ready: {title}"
        message["Date"] = formatdate(self._clock.wall())
        message["Message-ID"] = f"<ready.{row['sid']}@{urlsplit(self._public_url).hostname}>"
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(
            f"The desktop that you waited for is running now: {title}\n\n"
            f"Open it: {self._public_url}/desktop/{row['sid']}\n\n"
            "If nobody opens it for a while it ends by itself, and others get its place.\n"
        )
        return message

    def _close(self, sid: str, fate: Fate) -> None:
        self._count.labels(fate.value).inc()
        with self._store.writing() as connection:
            connection.execute(update(tables.notice).where(tables.notice.c.sid == sid).values(state=fate.value))


def sender_over(settings: MailSettings, own_name: str) -> Send:
    """Sends by the server of these settings; `own_name` is what this machine calls itself there.

    Every step has a time limit. What is returned raises SMTPException or OSError when the server did not take a mail.
    """
    context = trust(settings.ca)
    if settings.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE

    def send(message: EmailMessage) -> None:
        server = smtplib.SMTP(settings.server, settings.port, own_name, _STEP_S)
        try:
            server.ehlo_or_helo_if_needed()
            if not settings.insecure or server.has_extn("starttls"):
                server.starttls(context=context)
            if settings.password is not None:
                server.login(settings.user, settings.password.reveal())
            server.send_message(message)
            with suppress(smtplib.SMTPException, OSError):  # it has the mail, whatever it says now
                server.quit()
        finally:
            server.close()

    return send


def _why(error: Exception) -> str:
    """What kind of failure it was; the text of a server's answer may repeat what it was told."""
    code = getattr(error, "smtp_code", None)
    return f"{type(error).__name__} {code}" if code else type(error).__name__
