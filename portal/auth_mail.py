"""Log in by a mail server: IMAP (RFC 9051) or SMTP AUTH (RFC 4954), with SASL PLAIN (RFC 4616) inside verified TLS.

PLAIN goes as base64, so nothing that is typed can become a second command. The name is made canonical first, and the
server is asked about that, so that one id is one mailbox.
"""

from __future__ import annotations

import base64
import imaplib
import smtplib
import socket
import ssl
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

from deskfleet.portal.auth import Answer, Identity, Realm, Unavailable, WrongPassword, normal
from deskfleet.portal.auth_settings import Endpoint, MailboxSettings, trust
from deskfleet.portal.distant import Away, Deadline, Servers
from deskfleet.runtime.service import Clock

# Reasons of a NO that are not about the password (RFC 5530).
_NOT_NOW = ("[UNAVAILABLE]", "[SERVERBUG]", "[INUSE]", "[LIMIT]", "[CONTACTADMIN]", "[PRIVACYREQUIRED]")
_SMTP_YES, _SMTP_NO = 235, 535


class _Mailboxes(ABC):
    """What both have in common: whose name it is, which server, how long."""

    name = ""
    distant = True

    def __init__(self, settings: MailboxSettings, realm: Realm, clock: Clock) -> None:
        self._settings = settings
        self._realm = realm
        self._context = trust(settings.ca)
        self._servers = Servers(settings.endpoints, settings.timeout_s, clock)

    def check(self, user: str, password: str) -> Answer:
        """See auth.Method."""
        name = self.account(user)
        canonical = self._realm.user_of(name) if name else None
        if canonical is None:
            return WrongPassword()
        plain = base64.b64encode(f"\0{name}\0{password}".encode()).decode()
        try:
            answer = self._servers.ask(partial(self._converse, plain))
        except Away as error:
            return Unavailable(str(error))
        return Identity(canonical, self.name) if answer is None else answer

    def current(self, identity: Identity) -> Identity | None:
        """See auth.Method. A mail server tells nothing without the password."""
        return identity

    def account(self, user: str) -> str | None:
        """What the server calls the person who typed this; None when it is another realm's business."""
        name = normal(user.lower() if self._settings.lowercase else user)
        if not self._realm.own:
            return name
        inner, at, domain = name.rpartition("@")
        if at and domain.lower() != self._realm.own:
            return None
        inner = inner if at else name
        if not inner or "@" in inner:
            return None
        return f"{inner}@{self._realm.own}" if self._settings.send_address else inner

    def _converse(self, plain: str, endpoint: Endpoint) -> WrongPassword | Unavailable | None:
        """Try the credentials; None when they are right. Raises Away."""
        with Deadline(self._settings.timeout_s) as deadline:
            try:
                ready = self._begin(endpoint, deadline)
            except _FAILURES as error:
                raise Away(_why(error)) from None
            try:
                return self._try(ready, plain)
            except _FAILURES as error:
                # Not a reason to let the server rest: what was typed may be what it can't stand, and some make those
                # wait who guess.
                return Unavailable(_why(error))
            finally:
                self._end(ready)

    @abstractmethod
    def _begin(self, endpoint: Endpoint, deadline: Deadline) -> Any:
        """Connect, encrypt, and see what the server offers."""

    @abstractmethod
    def _try(self, ready: Any, plain: str) -> WrongPassword | Unavailable | None:
        """Give it the credentials (SASL PLAIN)."""

    @abstractmethod
    def _end(self, ready: Any) -> None:
        """Hang up."""


class Imap(_Mailboxes):
    """The login method "imap"."""

    name = "imap"

    def _begin(self, endpoint: Endpoint, deadline: Deadline) -> imaplib.IMAP4:
        server = _Imap(endpoint, self._context, self._settings.timeout_s, deadline)
        try:
            if endpoint.starttls and not endpoint.tls:
                server.starttls(self._context)
            if "AUTH=PLAIN" not in server.capabilities or server.state != "NONAUTH":
                raise imaplib.IMAP4.abort("no AUTH=PLAIN, or no need of it")
        except BaseException:
            server.shutdown()
            raise
        return server

    def _try(self, ready: imaplib.IMAP4, plain: str) -> WrongPassword | Unavailable | None:
        try:
            # imaplib does the base64.
            ready.authenticate("PLAIN", lambda _: base64.b64decode(plain))
        except imaplib.IMAP4.abort:
            raise
        except imaplib.IMAP4.error as error:
            text = str(error).upper()
            if text.startswith("AUTHENTICATE COMMAND ERROR") or any(code in text for code in _NOT_NOW):
                return Unavailable("the server would not look at a password")
            return WrongPassword()
        return None

    def _end(self, ready: imaplib.IMAP4) -> None:
        try:
            ready.logout()
        except _FAILURES:
            ready.shutdown()


class _Imap(imaplib.IMAP4):
    """A connection under a deadline, with TLS from the first byte where the endpoint says so."""

    def __init__(self, endpoint: Endpoint, context: ssl.SSLContext, timeout_s: float, deadline: Deadline) -> None:
        self._endpoint = endpoint
        self._context = context
        self._deadline = deadline
        super().__init__(endpoint.host, endpoint.port, timeout_s)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return _dial(self._endpoint, self._context, timeout, self._deadline)


class Smtp(_Mailboxes):
    """The login method "smtp"."""

    name = "smtp"

    def _begin(self, endpoint: Endpoint, deadline: Deadline) -> smtplib.SMTP:
        server = _Smtp(endpoint, self._context, self._settings.timeout_s, deadline)
        try:
            server.ehlo_or_helo_if_needed()
            if endpoint.starttls and not endpoint.tls:
                server.starttls(context=self._context)
                server.ehlo()
            if "PLAIN" not in server.esmtp_features.get("auth", "").upper().split():
                raise smtplib.SMTPNotSupportedError("no AUTH PLAIN")
        except BaseException:
            server.close()
            raise
        return server

    def _try(self, ready: smtplib.SMTP, plain: str) -> WrongPassword | Unavailable | None:
        code, _ = ready.docmd("AUTH", f"PLAIN {plain}")
        if code == _SMTP_YES:
            return None
        return WrongPassword() if code == _SMTP_NO else Unavailable(f"the server answered {code}")

    def _end(self, ready: smtplib.SMTP) -> None:
        ready.close()


class _Smtp(smtplib.SMTP):
    """The same for SMTP."""

    def __init__(self, endpoint: Endpoint, context: ssl.SSLContext, timeout_s: float, deadline: Deadline) -> None:
        self._endpoint = endpoint
        self._context = context
        self._deadline = deadline
        # A name of its own would be looked up, which may take its time.
        super().__init__(endpoint.host, endpoint.port, "localhost", timeout_s)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:  # noqa: ARG002
        return _dial(self._endpoint, self._context, timeout, self._deadline)


def _dial(endpoint: Endpoint, context: ssl.SSLContext, timeout: float | None, deadline: Deadline) -> socket.socket:
    connected = socket.create_connection((endpoint.host, endpoint.port), timeout)
    try:
        deadline.watch(connected)
        return context.wrap_socket(connected, server_hostname=endpoint.host) if endpoint.tls else connected
    except BaseException:
        connected.close()
        raise


_FAILURES = (imaplib.IMAP4.error, smtplib.SMTPException, OSError, ValueError)


def _why(error: Exception) -> str:
    """What kind of failure it was; a server's own words may repeat what it was told."""
    return type(error).__name__
