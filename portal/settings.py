"""The [portal] section of the settings file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates_schema

from deskfleet.runtime.secret import Secret
from deskfleet.runtime.settings import SHORTEST_KEY, KeysField, Network, NetworkField, SecretField
from deskfleet.schemas.messages import ADDRESS

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_DAY = 24 * 3600


@dataclass(frozen=True, slots=True)
class PortalSettings:
    """What the portal is told. Times in seconds; `origin` and `console_origin` are as browsers write them.

    `ticket_keys`: the last one signs. `front_proxies` are the networks whose X-Forwarded-For is believed.
    """

    listen: str
    ops_listen: str
    public_url: str
    console_url: str
    broker_url: Secret
    database: Secret
    secret_key: Secret
    ticket_keys: tuple[Secret, ...]
    admins: frozenset[str]
    auth: tuple[str, ...]
    title: str
    lifetime_default_s: int
    lifetime_max_s: int
    wait_s: int
    login_s: int
    host_silent_s: int
    workers: int
    threads: int
    front_proxies: tuple[Network, ...]

    @property
    def secure(self) -> bool:
        """Whether people reach the portal over TLS; only a portal for this machine alone may do without."""
        return self.public_url.startswith("https:")

    @property
    def console_origin(self) -> str:
        """What the content policy lets pages connect to, beside the portal itself."""
        parts = urlsplit(self.console_url)
        return f"{parts.scheme}://{parts.netloc}"


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


class PortalSchema(Schema):
    """[portal]. There is no default for anything secret, and none for how people prove who they are."""

    class Meta:
        unknown = RAISE

    listen = _address("127.0.0.1:8080")
    ops_listen = _address("127.0.0.1:9100")
    public_url = fields.Str(required=True)
    console_url = fields.Str(required=True)
    broker_url = SecretField(required=True)
    database = SecretField(required=True)
    secret_key = SecretField(required=True, validate=validate.Length(min=SHORTEST_KEY))
    ticket_keys = KeysField(required=True)
    admins = fields.List(fields.Str(validate=validate.Length(1, 320)), load_default=list)
    auth = fields.List(
        fields.Str(validate=validate.OneOf(["local"])),
        required=True,
        validate=validate.Length(min=1, error="name at least one way to log in"),
    )
    title = fields.Str(load_default="Deskfleet", validate=validate.Length(1, 60))
    lifetime_default_s = _seconds(8 * 3600, 60, 366 * _DAY)
    lifetime_max_s = _seconds(7 * _DAY, 60, 366 * _DAY)
    wait_s = _seconds(3600, 10, 366 * _DAY)
    login_s = _seconds(12 * 3600, 60, 30 * _DAY)
    host_silent_s = _seconds(20, 5, 3600)
    workers = fields.Int(load_default=1, strict=True, validate=validate.Range(1, 64))
    threads = fields.Int(load_default=16, strict=True, validate=validate.Range(1, 256))
    front_proxies = fields.List(NetworkField(), load_default=list)

    @validates_schema(skip_on_field_errors=False)
    def _together(self, data: Mapping[str, Any], **_: Any) -> None:
        wrong: dict[str, list[str]] = {}
        if "public_url" in data:
            wrong["public_url"] = _check_url(data["public_url"], "http", "https", path=False)
        if "console_url" in data:
            wrong["console_url"] = _check_url(data["console_url"], "ws", "wss", path=True)
        if data.get("lifetime_default_s", 0) > data.get("lifetime_max_s", 1 << 40):
            wrong["lifetime_default_s"] = ["is more than lifetime_max_s"]
        if "database" in data and not data["database"].reveal().startswith(("sqlite:///", "postgresql")):
            wrong["database"] = ["must be sqlite:///PATH or postgresql+psycopg://…"]
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
                "front_proxies": tuple(data["front_proxies"]),
            }
        )
