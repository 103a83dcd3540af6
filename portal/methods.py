"""Putting together the ways to log in that the settings name."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import Counter

from deskfleet.portal.accounts import Accounts
from deskfleet.portal.auth import Chain, Method, Realm
from deskfleet.portal.auth_header import ProxyHeaders
from deskfleet.portal.auth_ldap import Directory
from deskfleet.portal.auth_mail import Imap, Smtp
from deskfleet.portal.auth_oidc import OpenIdConnect
from deskfleet.portal.auth_settings import PASSWORD_METHODS
from deskfleet.portal.email_codes import EmailCodes
from deskfleet.portal.mail import Send
from deskfleet.portal.room import Room
from deskfleet.portal.settings import PortalSettings
from deskfleet.portal.store import Store
from deskfleet.runtime.service import Clock

log = logging.getLogger(__name__)

#: Where a provider of OpenID Connect sends people back to.
CALLBACK = "/login/oidc/return"

_MOST_MAILS_WAITING = 50


@dataclass(frozen=True, slots=True)
class Methods:
    """The ways to log in: the chain knows them all, the others are None where they are not in use."""

    chain: Chain
    codes: EmailCodes | None
    headers: ProxyHeaders | None
    oidc: OpenIdConnect | None


class Answers:
    """Counts what the methods say, and remembers when each said what, in this process. `count` has the labels method
    and result."""

    def __init__(self, count: Counter, clock: Clock) -> None:
        self._count = count
        self._clock = clock
        self._last: dict[str, tuple[str, float]] = {}

    def note(self, method: str, result: str) -> None:
        """A method has answered."""
        self._count.labels(method, result).inc()
        self._last[method] = result, self._clock.monotonic()

    def last(self) -> dict[str, tuple[str, float]]:
        """What each method said last, and how many seconds ago."""
        now = self._clock.monotonic()
        return {method: (result, now - at) for method, (result, at) in list(self._last.items())}


class Aside:
    """Runs actions on two threads of its own, at most so many waiting."""

    def __init__(self, most: int) -> None:
        self._room = threading.BoundedSemaphore(most)
        self._pool = ThreadPoolExecutor(2, "portal-codes")

    def __call__(self, action: Callable[[], None]) -> bool:
        """Take on an action; False when there is no room."""
        if not self._room.acquire(blocking=False):
            return False
        self._pool.submit(action).add_done_callback(self._done)
        return True

    def _done(self, _: Future[None]) -> None:
        self._room.release()


def build(
    settings: PortalSettings, accounts: Accounts, store: Store, clock: Clock, send: Send | None, answers: Answers
) -> Methods:
    """The methods in the order of the settings. `send` sends mails; `answers` is told what each method says."""
    # Half of the threads may wait for other machines, so that pages go on when one of them hangs.
    room = max(1, settings.threads // 2)
    url = settings.public_url
    for name, section in (("ldap", settings.ldap), ("imap", settings.imap), ("smtp", settings.smtp)):
        if section is not None and section.plain and name in settings.auth:
            log.warning("insecure: passwords go in clear to a server of [portal.%s]", name)
    codes = headers = oidc = None
    passwords: list[Method] = []
    for name in settings.auth:
        if name in PASSWORD_METHODS:
            passwords.append(_by_password(name, settings, accounts, clock))
    if "email" in settings.auth and settings.email and settings.mail and send:
        key = settings.secret_key.reveal()
        aside = Aside(_MOST_MAILS_WAITING)
        codes = EmailCodes(store, clock, settings.email, key, send, settings.mail.sender, settings.title, url, aside)
    if "header" in settings.auth and settings.header:
        headers = ProxyHeaders(settings.header, _realm(settings, settings.header.realm))
    if "oidc" in settings.auth and settings.oidc:
        oidc = OpenIdConnect(settings.oidc, _realm(settings, settings.oidc.realm), clock, url + CALLBACK, room)
    others = [method for method in (codes, headers, oidc) if method is not None]
    chain = Chain(passwords, settings.admins, others, answers.note, Room(room, clock.monotonic))
    return Methods(chain, codes, headers, oidc)


def _by_password(name: str, settings: PortalSettings, accounts: Accounts, clock: Clock) -> Method:
    if name == "ldap" and settings.ldap:
        return Directory(settings.ldap, _realm(settings, settings.ldap.realm), clock)
    if name == "imap" and settings.imap:
        return Imap(settings.imap, _realm(settings, settings.imap.realm), clock)
    if name == "smtp" and settings.smtp:
        return Smtp(settings.smtp, _realm(settings, settings.smtp.realm), clock)
    return accounts


def _realm(settings: PortalSettings, own: str) -> Realm:
    return Realm(own, settings.realms - {own})
