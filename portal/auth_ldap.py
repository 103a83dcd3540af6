"""Log in by an LDAP directory: find the one entry, then bind as it with the password (RFC 4511, RFC 4513).

The id is what the entry says, never what was typed. Nothing is told to a server before its certificate was checked,
referrals and aliases are not followed, and at most one password is tried in an attempt.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ldap3 import ANONYMOUS, DEREF_NEVER, NONE, SIMPLE, SUBTREE, Connection, Server, Tls
from ldap3.core.exceptions import LDAPExceptionError
from ldap3.utils.conv import escape_filter_chars
from ldap3.utils.dn import parse_dn
from pyasn1.error import PyAsn1Error

from deskfleet.portal.auth import Answer, Identity, Realm, Unavailable, WrongPassword, normal, plausible_name
from deskfleet.portal.auth_settings import Endpoint, LdapSettings, rights, trust
from deskfleet.portal.distant import Away, Deadline, Servers
from deskfleet.runtime.service import Clock

log = logging.getLogger(__name__)

# RFC 4511, appendix A; 19 is what some servers say when an account is locked.
_SUCCESS, _TOO_MANY = 0, 4
_REFUSED = frozenset({19, 32, 48, 49, 50, 53})
_REMEMBERED = 20_000
_RETRY_S = 30.0
_ESCAPED = re.compile(r"\\([0-9a-fA-F]{2}|.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Entry:
    dn: str
    name: str  # the value of the id attribute
    user: str  # the canonical id
    groups: tuple[str, ...]


class Directory:
    """The login method "ldap"."""

    name = "ldap"
    distant = True

    def __init__(self, settings: LdapSettings, realm: Realm, clock: Clock) -> None:
        self._settings = settings
        self._realm = realm
        self._clock = clock
        self._rights = rights(settings)
        self._context = trust(settings.ca)
        self._servers = Servers(settings.endpoints, settings.timeout_s, clock)
        self._looking = threading.Lock()
        self._seen: dict[str, tuple[float, Identity | None]] = {}

    def check(self, user: str, password: str) -> Answer:
        """See auth.Method."""
        try:
            answer = self._servers.ask(partial(self._prove, user, password))
        except Away as error:
            return Unavailable(str(error))
        if isinstance(answer, Identity):
            self._remember(answer.user, answer, self._settings.recheck_s)
        return answer

    def current(self, identity: Identity) -> Identity | None:
        """See auth.Method. What the directory says holds for a while; when it can't be asked, what it said last."""
        until, known = self._seen.get(identity.user, (0.0, identity))
        if self._clock.monotonic() < until or not self._looking.acquire(blocking=False):
            return self._judged(known)
        try:
            found = self._servers.ask(partial(self._again, identity.user))
        except Away as error:
            log.warning("the directory can't be asked whether %s still has an account: %s", identity.user, error)
            found = Unavailable("")
        finally:
            self._looking.release()
        if isinstance(found, Unavailable):
            self._remember(identity.user, known, _RETRY_S)
            return self._judged(known)
        self._remember(identity.user, found, self._settings.recheck_s)
        return found

    def _judged(self, known: Identity | None) -> Identity | None:
        # A login that was read from the database has its groups, and the rights that these mean today.
        return self._rights.judge(known.user, self.name, known.groups) if known else None

    def _remember(self, user: str, identity: Identity | None, seconds: float) -> None:
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen[user] = (self._clock.monotonic() + seconds, identity)

    # One conversation.

    def _prove(self, user: str, password: str, endpoint: Endpoint) -> Answer:
        wanted = self._settings.user_filter.replace("{user}", escape_filter_chars(normal(user)))
        with Deadline(self._settings.timeout_s) as deadline, self._service(endpoint, deadline) as service:
            entry = self._find(service, wanted)
            if not isinstance(entry, _Entry):
                return entry or WrongPassword()
            refused = self._bind(endpoint, deadline, entry.dn, password)
            if refused:
                return refused
            groups = self._groups(service, entry)
        if isinstance(groups, Unavailable):
            return groups
        return self._rights.judge(entry.user, self.name, groups) or WrongPassword()

    def _again(self, user: str, endpoint: Endpoint) -> Identity | Unavailable | None:
        """What the directory says now of somebody who logged in."""
        own = self._realm.own
        names = [user.removesuffix(f"@{own}"), user] if own else [user]
        same = "".join(f"({self._settings.id_attribute}={escape_filter_chars(name)})" for name in names)
        wanted = f"(&{self._settings.user_filter.replace('{user}', '*')}(|{same}))"
        with Deadline(self._settings.timeout_s) as deadline, self._service(endpoint, deadline) as service:
            entry = self._find(service, wanted)
            if not isinstance(entry, _Entry):
                return entry
            groups = self._groups(service, entry)
        if isinstance(groups, Unavailable):
            return groups
        return self._rights.judge(user, self.name, groups) if entry.user == user else None

    @contextmanager
    def _service(self, endpoint: Endpoint, deadline: Deadline) -> Iterator[Connection]:
        """A connection that may search. Raises Away."""
        settings = self._settings
        login: dict[str, Any] = {"authentication": ANONYMOUS}
        if settings.bind_password is not None:
            password = settings.bind_password.reveal()
            login = {"authentication": SIMPLE, "user": settings.bind_dn, "password": password}
        connection = self._connect(endpoint, deadline, **login)
        try:
            try:
                bound = connection.bind(read_server_info=False)
            except _FAILURES as error:
                raise Away(f"{type(error).__name__} at the bind of the service account") from None
            if not bound:
                raise Away(f"the service account may not bind: {_result(connection)}")
            try:
                yield connection
            except _FAILURES as error:
                raise Away(f"{type(error).__name__} while it was asked") from None
        finally:
            _close(connection)

    def _connect(self, endpoint: Endpoint, deadline: Deadline, **login: Any) -> Connection:
        """An open connection, over TLS unless the settings say otherwise. Raises Away."""
        limit = self._settings.timeout_s
        tls = _VerifiedTls(self._context, deadline)
        server = Server(endpoint.host, endpoint.port, endpoint.tls, get_info=NONE, tls=tls, connect_timeout=limit)
        connection = Connection(
            server, **login, auto_referrals=False, receive_timeout=limit, read_only=True, check_names=False
        )
        try:
            connection.open(read_server_info=False)
            deadline.watch(connection.socket)
            if endpoint.starttls and not endpoint.tls:
                connection.start_tls(read_server_info=False)
        except _FAILURES as error:
            _close(connection)
            raise Away(f"{type(error).__name__}{': not trusted' if _is_distrust(error) else ''}") from None
        if (endpoint.starttls or endpoint.tls) and not tls.verified:
            _close(connection)
            raise Away("no TLS")
        return connection

    def _bind(
        self, endpoint: Endpoint, deadline: Deadline, dn: str, password: str
    ) -> WrongPassword | Unavailable | None:
        """Try the password; None when it is right. Raises Away."""
        connection = self._connect(endpoint, deadline, authentication=SIMPLE, user=dn, password=password)
        try:
            if connection.bind(read_server_info=False):
                who = connection.extend.standard.who_am_i()
                if connection.result["result"] == _SUCCESS and not who:
                    log.error("the directory answered yes to a bind that left us anonymous: it is not believed")
                    return WrongPassword()
                return None
            if connection.result["result"] in _REFUSED:
                return WrongPassword()
            return Unavailable(f"answer to a bind: {_result(connection)}")
        except _FAILURES as error:
            # Not a reason to let the server rest: what was typed may be what it can't stand, and some make those wait
            # who guess.
            return Unavailable(f"{type(error).__name__} at the bind of a person")
        finally:
            _close(connection)

    def _find(self, service: Connection, wanted: str) -> _Entry | Unavailable | None:
        settings = self._settings
        attributes = [settings.id_attribute, *([settings.member_attribute] if settings.member_attribute else [])]
        rows = self._search(service, settings.base, wanted, attributes, 2)
        if isinstance(rows, Unavailable):
            return rows
        if not rows:
            return None
        if len(rows) > 1:
            log.warning("the directory knows several entries for one name: nobody is logged in by it")
            return None
        row = rows[0]
        names = _values(row, settings.id_attribute)
        user = self._realm.user_of(names[0]) if len(names) == 1 else None
        if not row["dn"] or user is None or not plausible_name(user):
            log.warning("%s has no single usable value of %s", row["dn"], settings.id_attribute)
            return None
        groups = _values(row, settings.member_attribute) if settings.member_attribute else []
        return _Entry(row["dn"], names[0], user, tuple(groups))

    def _groups(self, service: Connection, entry: _Entry) -> list[str] | Unavailable:
        """The person's groups: by their names below group_base; without it, by their whole DN."""
        settings = self._settings
        if not settings.group_base:
            return list(entry.groups)
        groups = [name for dn in entry.groups if (name := group_name(dn, settings.group_base))]
        if settings.group_filter:
            dn, name = escape_filter_chars(entry.dn), escape_filter_chars(entry.name)
            wanted = settings.group_filter.replace("{dn}", dn).replace("{user}", name)
            rows = self._search(service, settings.group_base, wanted, [settings.group_attribute], 0)
            if isinstance(rows, Unavailable):
                return rows
            groups += [value for row in rows for value in _values(row, settings.group_attribute)]
        return groups

    def _search(
        self, service: Connection, base: str, wanted: str, attributes: list[str], most: int
    ) -> list[dict[str, Any]] | Unavailable:
        service.search(
            base,
            wanted,
            SUBTREE,
            dereference_aliases=DEREF_NEVER,
            attributes=attributes,
            size_limit=most,
            time_limit=self._settings.timeout_s,
        )
        allowed = {_SUCCESS, _TOO_MANY} if most else {_SUCCESS}
        if service.result["result"] not in allowed:
            return Unavailable(f"answer to a search below {base}: {_result(service)}")
        return [row for row in service.response if row["type"] == "searchResEntry"]


class _VerifiedTls(Tls):  # type: ignore[misc]  # ldap3 is not typed
    """TLS by the standard library's own check of certificate and name, which ldap3 leaves out by default."""

    def __init__(self, context: Any, deadline: Deadline) -> None:
        super().__init__()
        self._context = context
        self._deadline = deadline
        self.verified = False

    def wrap_socket(self, connection: Connection, do_handshake: bool = False) -> None:  # noqa: ARG002
        self._deadline.watch(connection.socket)
        connection.socket = self._context.wrap_socket(connection.socket, server_hostname=connection.server.host)
        self.verified = True


# ldap3 raises its own, and lets some of the system's and of its decoder's through.
_FAILURES = (LDAPExceptionError, PyAsn1Error, OSError, ValueError, IndexError)


def group_name(dn: str, base: str) -> str | None:
    """What a group is called below `base`: the value of its first part. None when it lies elsewhere."""
    try:
        parts, below = parse_dn(dn), parse_dn(base)
    except LDAPExceptionError:
        return None
    outer = [(key.lower(), value.lower()) for key, value, _ in below]
    if len(parts) <= len(outer) or [(key.lower(), value.lower()) for key, value, _ in parts[-len(outer) :]] != outer:
        return None
    if parts[0][2] == "+":
        return None
    pieces = re.split(r"(\\[0-9a-fA-F]{2}|\\.)", parts[0][1], flags=re.DOTALL)
    raw = b"".join(_unescaped(piece) for piece in pieces)
    return raw.decode("utf-8", "replace")


def _unescaped(piece: str) -> bytes:
    if found := _ESCAPED.fullmatch(piece):
        return bytes.fromhex(found[1]) if len(found[1]) == 2 else found[1].encode()
    return piece.encode()


def _values(row: dict[str, Any], attribute: str) -> list[str]:
    """The values of an attribute; its name may come back in other letters, or with options."""
    for key, values in row["raw_attributes"].items():
        if key.lower() == attribute.lower():
            return [text for value in values if (text := value.decode("utf-8", "ignore")).encode() == value]
    return []


def _result(connection: Connection) -> str:
    return f"{connection.result['result']} {connection.result['description']}"


def _is_distrust(error: Exception) -> bool:
    return "certificate" in str(error).lower()


def _close(connection: Connection) -> None:
    with suppress(Exception):  # whatever it is, nothing more is wanted of it
        connection.unbind()
    if connection.socket is not None:  # it forgets the one that never got through
        connection.socket.close()
