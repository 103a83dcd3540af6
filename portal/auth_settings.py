"""The sections [portal.ldap], [portal.imap], [portal.smtp], [portal.email], [portal.header] and [portal.oidc]."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ldap3.core.exceptions import LDAPExceptionError
from ldap3.operation.search import parse_filter
from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates_schema

from deskfleet.portal.auth import Rights
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.settings import Network, NetworkField, SecretField

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
#: Every way to log in.
METHODS = ("local", "ldap", "imap", "smtp", "email", "header", "oidc")
#: Those that take a name and a password, by one form.
PASSWORD_METHODS = ("local", "ldap", "imap", "smtp")

_DAY = 24 * 3600
_DOMAIN = r"[a-z0-9](?:[a-z0-9.-]{0,250}[a-z0-9])?"
_ATTRIBUTE = r"\A[A-Za-z][A-Za-z0-9;-]{0,62}\Z"
_PORTS = {"ldap": 389, "ldaps": 636, "imap": 143, "imaps": 993, "smtp": 587, "smtps": 465}


def trust(ca: str) -> ssl.SSLContext:
    """Whose certificates are believed: those in the file `ca`, or the system's when it is empty. Raises OSError."""
    return ssl.create_default_context(cafile=ca or None)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that checks passwords. `tls` is whether it speaks TLS from the first byte, `starttls` whether it must
    begin to before it is told anything."""

    host: str
    port: int
    tls: bool
    starttls: bool

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSettings:
    """Servers that check passwords, tried in this order; `timeout_s` is for a whole conversation with one."""

    servers: tuple[str, ...]
    ca: str
    starttls: bool
    insecure: bool
    timeout_s: int
    realm: str

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The servers, taken apart."""
        found = []
        for server in self.servers:
            parts = urlsplit(server)
            tls = parts.scheme.endswith("s")
            found.append(Endpoint(parts.hostname or "", parts.port or _PORTS[parts.scheme], tls, self.starttls))
        return tuple(found)

    @property
    def plain(self) -> bool:
        """Whether passwords go to another machine in clear."""
        return not self.starttls and any(not e.tls and e.host not in LOOPBACK_NAMES for e in self.endpoints)


@dataclass(frozen=True, slots=True, kw_only=True)
class LdapSettings(RemoteSettings):
    """[portal.ldap]; see docs/operations.md. `recheck_s` is how long what the directory said of a person holds."""

    bind_dn: str
    bind_password: Secret | None
    base: str
    user_filter: str
    id_attribute: str
    member_attribute: str
    group_base: str
    group_filter: str
    group_attribute: str
    admin_groups: tuple[str, ...]
    allowed_groups: tuple[str, ...]
    recheck_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MailboxSettings(RemoteSettings):
    """[portal.imap] and [portal.smtp]: `send_address` is whether the server knows people as name@realm, `lowercase`
    whether it is asked in small letters, whatever was typed."""

    send_address: bool
    lowercase: bool


@dataclass(frozen=True, slots=True)
class EmailSettings:
    """[portal.email]: whose addresses get a code, and how many mails go out in an hour, to one address and in all."""

    domains: tuple[str, ...]
    mails_per_hour: int
    all_mails_per_hour: int


@dataclass(frozen=True, slots=True)
class HeaderSettings:
    """[portal.header]: the proxies that vouch for people, by which headers."""

    proxies: tuple[Network, ...]
    user_header: str
    groups_header: str
    realm: str
    admin_groups: tuple[str, ...]
    allowed_groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OidcSettings:
    """[portal.oidc]: a provider of OpenID Connect."""

    issuer: str
    client_id: str
    client_secret: Secret | None
    title: str
    ca: str
    scopes: str
    id_claim: str
    groups_claim: str
    realm: str
    domains: tuple[str, ...]
    admin_groups: tuple[str, ...]
    allowed_groups: tuple[str, ...]
    timeout_s: int


def rights(settings: LdapSettings | HeaderSettings | OidcSettings) -> Rights:
    """What the groups of a method mean."""
    return Rights(frozenset(settings.admin_groups), frozenset(settings.allowed_groups))


def domain_field(**options: Any) -> fields.String:
    """A domain in small letters."""
    return fields.Str(validate=validate.Regexp(rf"\A{_DOMAIN}\Z", error="must be a domain in small letters"), **options)


def _realm(**options: Any) -> fields.String:
    error = "must be a domain in small letters, or empty"
    return fields.Str(validate=validate.Regexp(rf"\A(?:{_DOMAIN})?\Z", error=error), **options)


def _flag(default: bool) -> fields.Bool:
    return fields.Bool(load_default=default, truthy={True}, falsy={False})


def _texts(**options: Any) -> fields.List[str]:
    return fields.List(fields.Str(validate=validate.Length(1, 400)), **({"load_default": list} | options))


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _unreadable(ca: str) -> list[str]:
    try:
        trust(ca)
    except OSError as error:
        return [f"holds no certificates that can be read: {type(error).__name__}"]
    return []


class _RemoteSchema(Schema):
    """What the sections of distant servers have in common. Passwords go over TLS to a server that proves its name; in
    clear to this machine alone, or when `insecure` says so."""

    class Meta:
        unknown = RAISE

    kind = ""

    servers = fields.List(fields.Str(), required=True, validate=validate.Length(1, 8))
    ca = fields.Str(load_default="")
    starttls = _flag(True)
    insecure = _flag(False)
    timeout_s = fields.Int(load_default=5, strict=True, validate=validate.Range(1, 30))
    realm = _realm(required=True)

    @validates_schema
    def _servers(self, data: Mapping[str, Any], **_: Any) -> None:
        wrong = {"ca": _unreadable(data["ca"]), "servers": [], "insecure": []}
        for server in data["servers"]:
            wrong["servers"] += [f"{server}: {fault}" for fault in _faults(server, self.kind)]
        if not wrong["servers"]:
            shape = {key: data[key] for key in ("ca", "starttls", "insecure", "timeout_s", "realm")}
            if RemoteSettings(servers=tuple(data["servers"]), **shape).plain and not data["insecure"]:
                wrong["insecure"] = [
                    "without TLS passwords can be read on the way; say insecure = true to do it anyway"
                ]
        if wrong := {key: lines for key, lines in wrong.items() if lines}:
            raise ValidationError(wrong)


def _faults(server: str, kind: str) -> list[str]:
    try:
        parts = urlsplit(server)
        _ = parts.port
    except ValueError as error:
        return [str(error)]
    wrong = []
    if parts.scheme not in (kind, f"{kind}s") or not parts.hostname:
        wrong.append(f"must be {kind}s://HOST or {kind}://HOST, with :PORT where it is not the usual one")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        wrong.append("must name a host and a port only")
    return wrong


class LdapSchema(_RemoteSchema):
    """[portal.ldap]."""

    kind = "ldap"

    bind_dn = fields.Str(load_default="", validate=validate.Length(max=1000))
    bind_password = SecretField(load_default=None, validate=validate.Length(min=1))
    base = fields.Str(required=True, validate=validate.Length(1, 1000))
    user_filter = fields.Str(load_default="(uid={user})")
    id_attribute = fields.Str(load_default="uid", validate=validate.Regexp(_ATTRIBUTE))
    member_attribute = fields.Str(load_default="", validate=validate.Regexp(rf"{_ATTRIBUTE}|\A\Z"))
    group_base = fields.Str(load_default="", validate=validate.Length(max=1000))
    group_filter = fields.Str(load_default="")
    group_attribute = fields.Str(load_default="cn", validate=validate.Regexp(_ATTRIBUTE))
    admin_groups = _texts()
    allowed_groups = _texts()
    recheck_s = fields.Int(load_default=600, strict=True, validate=validate.Range(10, _DAY))

    @validates_schema
    def _together(self, data: Mapping[str, Any], **_: Any) -> None:
        wrong: dict[str, list[str]] = {}
        if bool(data["bind_dn"]) != (data["bind_password"] is not None):
            wrong["bind_password"] = ["bind_dn and bind_password go together"]
        for key, places in (("user_filter", ("{user}",)), ("group_filter", ("{dn}", "{user}"))):
            if data[key] and not any(place in data[key] for place in places):
                wrong[key] = [f"must hold {' or '.join(places)}, where the person is put in"]
            elif data[key] and not _is_filter(data[key]):
                wrong[key] = ["is not an LDAP filter (RFC 4515)"]
        if not data["user_filter"]:
            wrong["user_filter"] = ["must not be empty"]
        if data["group_filter"] and not data["group_base"]:
            wrong["group_base"] = ["says where groups are searched; group_filter needs it"]
        if wrong:
            raise ValidationError(wrong)

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> LdapSettings:
        return LdapSettings(**_tuples(data))


def _is_filter(text: str) -> bool:
    try:
        parse_filter(text.replace("{user}", "x").replace("{dn}", "x"), None, False, None, None, False)
    except (LDAPExceptionError, IndexError, ValueError, TypeError):
        return False
    return True


class _MailboxSchema(_RemoteSchema):
    send_address = _flag(False)
    lowercase = _flag(True)

    @validates_schema
    def _addresses(self, data: Mapping[str, Any], **_: Any) -> None:
        if data["send_address"] and not data["realm"]:
            raise ValidationError({"send_address": ["needs a realm, which stands behind the @"]})

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> MailboxSettings:
        return MailboxSettings(**_tuples(data))


class ImapSchema(_MailboxSchema):
    """[portal.imap]."""

    kind = "imap"


class SmtpSchema(_MailboxSchema):
    """[portal.smtp]."""

    kind = "smtp"


class EmailSchema(Schema):
    """[portal.email]. Whoever reads mail at one of these domains may log in, so none is a default."""

    class Meta:
        unknown = RAISE

    domains = fields.List(domain_field(), required=True, validate=validate.Length(1, 100))
    mails_per_hour = fields.Int(load_default=5, strict=True, validate=validate.Range(1, 60))
    all_mails_per_hour = fields.Int(load_default=300, strict=True, validate=validate.Range(1, 100_000))

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> EmailSettings:
        return EmailSettings(**_tuples(data))


class HeaderSchema(Schema):
    """[portal.header]. What these headers say is believed from these addresses, and from nowhere else."""

    class Meta:
        unknown = RAISE

    proxies = fields.List(NetworkField(), required=True, validate=validate.Length(1, 100))
    user_header = fields.Str(load_default="X-Remote-User", validate=validate.Regexp(r"\A[A-Za-z][A-Za-z0-9-]{0,62}\Z"))
    groups_header = fields.Str(load_default="", validate=validate.Regexp(r"\A(?:[A-Za-z][A-Za-z0-9-]{0,62})?\Z"))
    realm = _realm(required=True)
    admin_groups = _texts()
    allowed_groups = _texts()

    @validates_schema
    def _narrow(self, data: Mapping[str, Any], **_: Any) -> None:
        if any(network.prefixlen == 0 for network in data["proxies"]):
            raise ValidationError({"proxies": ["must not be everybody: whoever is in it may be anybody"]})

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> HeaderSettings:
        return HeaderSettings(**_tuples(data))


class OidcSchema(Schema):
    """[portal.oidc]. An address is an id only when the provider has verified it and its domain is in `domains`."""

    class Meta:
        unknown = RAISE

    issuer = fields.Str(required=True)
    client_id = fields.Str(required=True, validate=validate.Length(1, 400))
    client_secret = SecretField(load_default=None)
    title = fields.Str(load_default="OpenID Connect", validate=validate.Length(1, 60))
    ca = fields.Str(load_default="")
    scopes = fields.Str(load_default="openid email profile")
    id_claim = fields.Str(load_default="sub", validate=validate.Length(1, 100))
    groups_claim = fields.Str(load_default="groups", validate=validate.Length(1, 100))
    realm = _realm(load_default=None)
    domains = fields.List(domain_field(), load_default=list)
    admin_groups = _texts()
    allowed_groups = _texts()
    timeout_s = fields.Int(load_default=5, strict=True, validate=validate.Range(1, 30))

    @validates_schema
    def _together(self, data: Mapping[str, Any], **_: Any) -> None:
        wrong: dict[str, list[str]] = {"ca": _unreadable(data["ca"])}
        parts = urlsplit(data["issuer"])
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK_NAMES):
            wrong["issuer"] = ["must begin with https:// (or http:// on this machine alone)"]
        if "openid" not in data["scopes"].split():
            wrong["scopes"] = ["must hold openid"]
        if data["id_claim"] == "email":
            if not data["domains"]:
                wrong["domains"] = ["name the domains whose addresses the provider may vouch for"]
        elif data["realm"] is None:
            wrong["realm"] = ["must be set, unless id_claim is email"]
        if wrong := {key: lines for key, lines in wrong.items() if lines}:
            raise ValidationError(wrong)

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> OidcSettings:
        return OidcSettings(**_tuples({**data, "realm": data["realm"] or "", "issuer": data["issuer"]}))
