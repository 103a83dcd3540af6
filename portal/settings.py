"""The [portal] section of the settings file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from email_validator import EmailNotValidError, validate_email
from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates_schema

from deskfleet.portal.auth_settings import (
    LOOPBACK_NAMES,
    METHODS,
    EmailSchema,
    EmailSettings,
    HeaderSchema,
    HeaderSettings,
    ImapSchema,
    LdapSchema,
    LdapSettings,
    MailboxSettings,
    OidcSchema,
    OidcSettings,
    SmtpSchema,
    trust,
)
from deskfleet.portal.brand import PLAIN, Brand, BrandSchema
from deskfleet.portal.languages import NAMES
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.settings import SHORTEST_KEY, KeysField, Network, NetworkField, SecretField
from deskfleet.schemas.messages import ADDRESS

_DAY = 24 * 3600
_PATH = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*/?")


@dataclass(frozen=True, slots=True)
class MailSettings:
    """How mails are sent. `ca` is a file of certificates to believe ("": the system's), `domain` makes an address of a
    name without one, `mail_after_s` is after how long a wait a person is told that the desktop is ready,
    `mail_before_end` is whether they are told 30 and 5 minutes before it ends."""

    server: str
    port: int
    ca: str
    insecure: bool
    user: str
    password: Secret | None
    sender: str
    domain: str
    mail_after_s: int
    mail_before_end: bool


@dataclass(frozen=True, slots=True)
class ManagementSettings:
    """Where the broker's management API answers; `ca` is a file of certificates to believe ("": the system's)."""

    url: str
    user: str
    password: Secret
    ca: str


@dataclass(frozen=True, slots=True)
class PortalSettings:
    """What the portal is told. Times in seconds; `origin` and `console_origin` are as browsers write them.

    `ticket_keys`: the last one signs. `front_proxies` are the networks whose X-Forwarded-For is believed. Without
    `mail` there is none.
    """

    listen: str
    ops_listen: str
    public_url: str
    console_url: str
    broker_url: Secret
    broker_ca: str
    database: Secret
    secret_key: Secret
    ticket_keys: tuple[Secret, ...]
    admins: frozenset[str]
    auth: tuple[str, ...]
    access_log: bool
    title: str
    languages: tuple[str, ...]
    default_language: str
    brand: Brand
    lifetime_default_s: int
    lifetime_max_s: int
    sharing: str
    share_max_s: int
    wait_s: int
    login_s: int
    host_silent_s: int
    workers: int
    threads: int
    front_proxies: tuple[Network, ...]
    mail: MailSettings | None
    broker_management: ManagementSettings | None
    login_idle_s: int
    ldap: LdapSettings | None
    imap: MailboxSettings | None
    smtp: MailboxSettings | None
    email: EmailSettings | None
    header: HeaderSettings | None
    oidc: OidcSettings | None

    @property
    def realms(self) -> frozenset[str]:
        """The realms that the methods in use speak for."""
        sections = (getattr(self, name) for name in self.auth if name != "local")
        return frozenset(realm for section in sections if (realm := getattr(section, "realm", "")))

    @property
    def secure(self) -> bool:
        """Whether people reach the portal over TLS; only a portal for this machine alone may do without."""
        return self.public_url.startswith("https:")

    @property
    def origin(self) -> str:
        """The portal's address without its path, as browsers write it in Origin."""
        return self.public_url.removesuffix(self.path)

    @property
    def path(self) -> str:
        """Below which path of its host the portal lies; empty when it has the host to itself."""
        return urlsplit(self.public_url).path

    @property
    def console_origin(self) -> str:
        """What the content policy lets pages connect to, beside the portal itself."""
        parts = urlsplit(self.console_url)
        return f"{parts.scheme}://{parts.netloc}"


def address_of(user: str, domain: str) -> str | None:
    """The mail address of a person: the name when it is one, else the name at the domain; None when neither is."""
    text = user if "@" in user else f"{user}@{domain}"
    try:
        found = validate_email(text, check_deliverability=False, globally_deliverable=False, allow_smtputf8=False)
    except EmailNotValidError:
        return None
    return found.ascii_email


def _address(default: str) -> fields.String:
    return fields.Str(load_default=default, validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))


def _seconds(default: int, low: int, high: int) -> fields.Int:
    return fields.Int(load_default=default, strict=True, validate=validate.Range(low, high))


def _check_url(text: str, plain: str, secure: str, path: bool) -> list[str]:
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as error:
        return [f"is not a URL: {error}"]
    wrong = []
    if parts.scheme not in (plain, secure) or not host:
        wrong.append(f"must begin with {secure}:// (or {plain}:// on this machine alone) and name a host")
    elif parts.scheme == plain and host not in LOOPBACK_NAMES:
        wrong.append(f"{plain}:// is for {', '.join(sorted(LOOPBACK_NAMES))} only; use {secure}://")
    if parts.query or parts.fragment or parts.username or (not path and parts.path not in ("", "/")):
        wrong.append("must hold no login, query or fragment" + ("" if path else ", and no path"))
    return wrong


def _auth_faults(data: Mapping[str, Any]) -> list[str]:
    """What the ways to log in lack. A section that is not valid is missing from `data` and has been told."""
    auth = data.get("auth") or []
    wrong = [
        f"{name}: needs a section [portal.{name}]" for name in auth if name != "local" and data.get(name, 1) is None
    ]
    if len(set(auth)) != len(auth):
        wrong.append("names a way to log in twice")
    if "email" in auth and data.get("mail", 1) is None:
        wrong.append("email: codes are sent by mail, which needs a section [portal.mail]")
    return wrong


class MailSchema(Schema):
    """[portal.mail]. Mails go over TLS to a server that proves its name, unless `insecure` says otherwise."""

    class Meta:
        unknown = RAISE

    server = fields.Str(required=True, validate=validate.Regexp(r"\A[A-Za-z0-9][A-Za-z0-9.:-]{0,252}\Z"))
    port = fields.Int(load_default=587, strict=True, validate=validate.Range(1, 65535))
    ca = fields.Str(load_default="")
    insecure = fields.Bool(load_default=False, truthy={True}, falsy={False})
    user = fields.Str(load_default="", validate=validate.Length(max=320))
    password = SecretField(load_default=None)
    sender = fields.Str(required=True)
    domain = fields.Str(load_default="", validate=validate.Length(max=253))
    mail_after_s = _seconds(60, 0, _DAY)
    mail_before_end = fields.Bool(load_default=True)

    @validates_schema
    def _together(self, data: Mapping[str, Any], **_: Any) -> None:
        wrong: dict[str, list[str]] = {}
        if address_of(data["sender"], "") != data["sender"]:
            wrong["sender"] = ["is not a mail address"]
        if data["domain"] and address_of("somebody", data["domain"]) is None:
            wrong["domain"] = ["is not the domain of a mail address"]
        if bool(data["user"]) != (data["password"] is not None):
            wrong["password"] = ["user and password go together"]
        elif data["insecure"] and data["user"]:
            wrong["insecure"] = ["a password goes to a server that proves its name only; leave out one of the two"]
        try:
            trust(data["ca"])
        except OSError as error:
            wrong["ca"] = [f"holds no certificates that can be read: {type(error).__name__}"]
        if wrong:
            raise ValidationError(wrong)

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> MailSettings:
        return MailSettings(**data)


class ManagementSchema(Schema):
    """[portal.broker_management]. Its user needs the tag `monitoring`, and no rights on any queue."""

    class Meta:
        unknown = RAISE

    url = fields.Str(required=True)
    user = fields.Str(required=True, validate=validate.Length(1, 255))
    password = SecretField(required=True)
    ca = fields.Str(load_default="")

    @validates_schema
    def _together(self, data: Mapping[str, Any], **_: Any) -> None:
        wrong: dict[str, list[str]] = {}
        faults = _check_url(data["url"], "http", "https", path=True)
        if faults:
            wrong["url"] = faults
        try:
            trust(data["ca"])
        except OSError as error:
            wrong["ca"] = [f"holds no certificates that can be read: {type(error).__name__}"]
        if wrong:
            raise ValidationError(wrong)

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> ManagementSettings:
        return ManagementSettings(**data)


class PortalSchema(Schema):
    """[portal]. There is no default for anything secret, and none for how people prove who they are."""

    class Meta:
        unknown = RAISE

    listen = _address("127.0.0.1:8080")
    ops_listen = _address("127.0.0.1:9100")
    public_url = fields.Str(required=True)
    console_url = fields.Str(required=True)
    broker_url = SecretField(required=True)
    broker_ca = fields.Str(load_default="")
    database = SecretField(required=True)
    secret_key = SecretField(required=True, validate=validate.Length(min=SHORTEST_KEY))
    ticket_keys = KeysField(required=True)
    admins = fields.List(fields.Str(validate=validate.Length(1, 320)), load_default=list)
    auth = fields.List(
        fields.Str(validate=validate.OneOf(METHODS)),
        required=True,
        validate=validate.Length(min=1, error="name at least one way to log in"),
    )
    ldap = fields.Nested(LdapSchema, load_default=None)
    imap = fields.Nested(ImapSchema, load_default=None)
    smtp = fields.Nested(SmtpSchema, load_default=None)
    email = fields.Nested(EmailSchema, load_default=None)
    header = fields.Nested(HeaderSchema, load_default=None)
    oidc = fields.Nested(OidcSchema, load_default=None)
    access_log = fields.Bool(load_default=False)
    title = fields.Str(load_default="Deskfleet", validate=validate.Length(1, 60))
    languages = fields.List(
        fields.Str(validate=validate.OneOf(list(NAMES))),
        load_default=lambda: list(NAMES),
        validate=validate.Length(min=1),
    )
    default_language = fields.Str(load_default=None)
    brand = fields.Nested(BrandSchema, load_default=PLAIN)
    lifetime_default_s = _seconds(8 * 3600, 60, 366 * _DAY)
    lifetime_max_s = _seconds(7 * _DAY, 60, 366 * _DAY)
    sharing = fields.Str(load_default="signed_in", validate=validate.OneOf(["off", "signed_in", "anybody"]))
    share_max_s = _seconds(_DAY, 60, 366 * _DAY)
    wait_s = _seconds(3600, 10, 366 * _DAY)
    login_s = _seconds(12 * 3600, 60, 30 * _DAY)
    login_idle_s = _seconds(2 * 3600, 0, 30 * _DAY)
    host_silent_s = _seconds(20, 5, 3600)
    workers = fields.Int(load_default=1, strict=True, validate=validate.Range(1, 64))
    threads = fields.Int(load_default=16, strict=True, validate=validate.Range(1, 256))
    front_proxies = fields.List(NetworkField(), load_default=list)
    mail = fields.Nested(MailSchema, load_default=None)
    broker_management = fields.Nested(ManagementSchema, load_default=None)

    @validates_schema(skip_on_field_errors=False)
    def _together(self, data: Mapping[str, Any], **_: Any) -> None:
        wrong: dict[str, list[str]] = {}
        if "public_url" in data:
            wrong["public_url"] = _check_url(data["public_url"], "http", "https", path=True)
            if not _PATH.fullmatch(urlsplit(data["public_url"]).path):
                wrong["public_url"].append("its path may hold letters, digits, dots, dashes and underscores only")
        if "console_url" in data:
            wrong["console_url"] = _check_url(data["console_url"], "ws", "wss", path=True)
        if data.get("lifetime_default_s", 0) > data.get("lifetime_max_s", 1 << 40):
            wrong["lifetime_default_s"] = ["is more than lifetime_max_s"]
        if "database" in data and not data["database"].reveal().startswith(("sqlite:///", "postgresql")):
            wrong["database"] = ["must be sqlite:///PATH or postgresql+psycopg://…"]
        if data.get("default_language") and data["default_language"] not in data.get("languages", NAMES):
            wrong["default_language"] = ["is not one of languages"]
        wrong["auth"] = _auth_faults(data)
        wrong = {name: lines for name, lines in wrong.items() if lines}
        if wrong:
            raise ValidationError(wrong)

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> PortalSettings:
        return PortalSettings(
            **{
                **data,
                "public_url": data["public_url"].rstrip("/"),
                "admins": frozenset(data["admins"]),
                "auth": tuple(data["auth"]),
                "languages": tuple(dict.fromkeys(data["languages"])),
                "default_language": data["default_language"] or data["languages"][0],
                "front_proxies": tuple(data["front_proxies"]),
            }
        )
