"""Mails to the owners of desktops: the one they waited for is running; the one that runs ends soon. Each once.

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
from dataclasses import asdict, dataclass
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate
from enum import StrEnum
from urllib.parse import urlsplit

from babel.support import NullTranslations
from prometheus_client import Counter
from sqlalchemy import ColumnElement, RowMapping, and_, delete, func, or_, select, update

from deskfleet.portal import tables
from deskfleet.portal.auth_settings import trust
from deskfleet.portal.languages import catalogue
from deskfleet.portal.records import Records
from deskfleet.portal.settings import MailSettings, address_of
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


_READY = "ready"
#: How long before the end a person is told, in minutes. What lasts hardly longer than that is not told of.
_WARN_MIN = (30, 5)


class Fate(StrEnum):
    """What became of a mail."""

    OPEN = "open"
    SENT = "sent"
    FAILED = "failed"
    NEEDLESS = "needless"


@dataclass(frozen=True, slots=True)
class _Cause:
    """Why a mail is due. `kind` is ready, or end:MINUTES:LIFETIME: whoever let a desktop last longer is told again."""

    sid: str
    user: str
    machine: str
    kind: str


class Notices:
    """Finds desktops that run after a wait and those that end soon, and sends their owners a mail."""

    def __init__(
        self,
        store: Store,
        records: Records,
        machines: Callable[[], Mapping[str, Machine]],
        clock: Clock,
        settings: MailSettings,
        public_url: str,
        language: Callable[[str], str],
        send: Send,
        count: Counter,
    ) -> None:
        self._store = store
        self._records = records
        self._machines = machines
        self._clock = clock
        self._settings = settings
        self._public_url = public_url
        self._language = language
        self._send = send
        self._count = count

    def undelivered(self, within_s: float) -> tuple[int, int]:
        """How many mails were given up lately, and how many were tried without success and will be again."""
        notice, now = tables.notice.c, self._clock.wall()
        given_up = select(func.count()).where(notice.state == Fate.FAILED, notice.created_at > now - within_s)
        tried = select(func.count()).where(notice.state == Fate.OPEN, notice.tries > 0)
        with self._store.reading() as connection:
            return int(connection.scalar(given_up) or 0), int(connection.scalar(tried) or 0)

    def sweep(self) -> None:
        """Enter what is new and try what is due. Repeated every few seconds; raises DBAPIError."""
        started = self._records.started_late(self._settings.mail_after_s, _NEWS_S)
        self._enter([_Cause(found.sid, found.user, found.machine, _READY) for found in started] + self._endings())
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
                    self._close(row, fate)

    def prune(self) -> None:
        """Forget mails of long ago."""
        with self._store.writing() as connection:
            old = tables.notice.c.created_at < self._clock.wall() - _KEEP_S
            connection.execute(delete(tables.notice).where(old))

    def _endings(self) -> list[_Cause]:
        if not self._settings.mail_before_end:
            return []
        causes = []
        for found in self._records.ending(60.0 * max(_WARN_MIN)):
            due = [m for m in _WARN_MIN if found.left_s <= 60 * m and found.lifetime_s >= 2 * 60 * m]
            if due:  # a portal that was off says it once, as it is now
                causes.append(_Cause(found.sid, found.user, found.machine, f"end:{min(due)}:{found.lifetime_s}"))
        return causes

    def _enter(self, causes: list[_Cause]) -> None:
        if not causes:
            return
        notice = tables.notice.c
        with self._store.reading() as connection:
            query = select(notice.sid, notice.kind).where(notice.sid.in_({cause.sid for cause in causes}))
            known = {(row.sid, row.kind) for row in connection.execute(query)}
        now = self._clock.wall()
        rows = [
            {**asdict(cause), "created_at": now, "next_try_at": now, "tries": 0, "state": Fate.OPEN.value}
            for cause in causes
            if (cause.sid, cause.kind) not in known
        ]
        if rows:
            with self._store.writing() as connection:
                insertion = upsert(connection, tables.notice).values(rows)
                connection.execute(insertion.on_conflict_do_nothing(index_elements=["sid", "kind"]))

    def _claim(self, row: RowMapping) -> bool:
        notice = tables.notice.c
        query = (
            update(tables.notice)
            .where(_is(row), notice.state == Fate.OPEN, notice.tries == row["tries"])
            .values(tries=row["tries"] + 1, next_try_at=self._clock.wall() + _FIRST_PAUSE_S * 2.0 ** row["tries"])
        )
        with self._store.writing() as connection:
            return connection.execute(query).rowcount == 1

    def _try(self, row: RowMapping) -> Fate:
        sid = row["sid"]
        left_s = self._records.left_s(sid)
        minutes = _minutes(row["kind"])
        # It has ended, or its owner has let it last longer, since.
        if left_s is None or (minutes and left_s > 60 * minutes):
            return Fate.NEEDLESS
        address = address_of(row["user"], self._settings.domain)
        if address is None:
            log.warning("no mail about session %s: its owner's name makes no address", sid)
            return Fate.FAILED
        try:
            self._send(self._write(row, address, left_s))
        except (smtplib.SMTPException, OSError) as error:
            last = row["tries"] + 1 >= _MOST_TRIES
            log.warning("the mail about session %s was not taken%s: %s", sid, ", given up" if last else "", _why(error))
            return Fate.FAILED if last else Fate.OPEN
        return Fate.SENT

    def _write(self, row: RowMapping, address: str, left_s: float) -> EmailMessage:
        machine = self._machines().get(row["machine"])
        title = "".join(letter for letter in (machine.title if machine else row["machine"]) if letter.isprintable())
        message = EmailMessage(policy=SMTP)  # it refuses a header that holds a line break
        message["From"] = self._settings.sender
        message["To"] = address
        words = catalogue(self._language(row["user"]))
        subject, text = self._ends(words, title, left_s) if _minutes(row["kind"]) else self._ready(words, row, title)
        message["Subject"] = subject
        message["Date"] = formatdate(self._clock.wall())
        message["Message-ID"] = f"<{row['kind'].replace(':', '.')}.{row['sid']}@{urlsplit(self._public_url).hostname}>"
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(text)
        return message

    def _ready(self, words: NullTranslations, row: RowMapping, title: str) -> tuple[str, str]:
        address = f"{self._public_url}/desktop/{row['sid']}"
        lines = (
            words.gettext("The desktop that you waited for is running now: %(desktop)s") % {"desktop": title},
            words.gettext("Open it: %(address)s") % {"address": address},
            words.gettext("If nobody opens it for a while it ends by itself, and others get its place."),
        )
        return words.gettext("Your desktop is ready: %(desktop)s") % {"desktop": title}, "\n\n".join(lines) + "\n"

    def _ends(self, words: NullTranslations, title: str, left_s: float) -> tuple[str, str]:
        figures = {"desktop": title, "minutes": max(1, round(left_s / 60)), "address": f"{self._public_url}/desktops"}
        lines = (
            words.gettext("The time of your desktop is over in about %(minutes)s min: %(desktop)s") % figures,
            words.gettext("Save your work, or let it last longer: %(address)s") % figures,
        )
        return words.gettext("Your desktop ends in %(minutes)s min: %(desktop)s") % figures, "\n\n".join(lines) + "\n"

    def _close(self, row: RowMapping, fate: Fate) -> None:
        self._count.labels(fate.value).inc()
        with self._store.writing() as connection:
            connection.execute(update(tables.notice).where(_is(row)).values(state=fate.value))


def _is(row: RowMapping) -> ColumnElement[bool]:
    return and_(tables.notice.c.sid == row["sid"], tables.notice.c.kind == row["kind"])


def _minutes(kind: str) -> int:
    """How long before the end a mail of this kind is due; 0 when it is about something else."""
    return 0 if kind == _READY else int(kind.split(":")[1])


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
