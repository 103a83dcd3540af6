"""The [proxy] section of the settings file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates_schema

from deskfleet.proxy.server import Limits
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.settings import KeysField, Network, NetworkField, SecretField
from deskfleet.schemas.messages import ADDRESS

_DAY = 86_400


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """What a proxy is told. Times in seconds; `tls` are certificate, key and CA towards hosts (paths of PEM files)."""

    listen: str
    ops_listen: str
    broker_url: Secret
    broker_ca: str
    origins: frozenset[str]
    ticket_keys: tuple[Secret, ...]
    tls: tuple[str, str, str] | None
    insecure_plain_hosts: bool
    front_proxies: tuple[Network, ...]
    originless: tuple[Network, ...]
    limits: Limits
    dial_s: float
    half_close_s: float
    settle_s: float
    keep_s: float
    drain_s: float


def _origin(text: str) -> None:
    """Only what a browser could send may be listed (RFC 6454 section 6.2): a near miss would never match."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValidationError(f"is not an origin: {error}") from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or text != f"{parts.scheme}://{parts.netloc.lower()}"
    ):
        raise ValidationError(
            "must be as browsers write it, such as https://desktops.example.org: no path, no capitals"
        )
    if port == {"http": 80, "https": 443}[parts.scheme] or "@" in parts.netloc:
        raise ValidationError("must hold no login, and no port that the scheme implies")


def _address(default: str) -> fields.String:
    return fields.Str(load_default=default, validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))


def _count(default: int, low: int, high: int) -> fields.Int:
    return fields.Int(load_default=default, strict=True, validate=validate.Range(low, high))


def _seconds(default: float, low: float, high: float) -> fields.Float:
    return fields.Float(load_default=default, allow_nan=False, validate=validate.Range(low, high))


class ProxySchema(Schema):
    """[proxy]. `origins` are the portal's, `front_proxies` the networks whose X-Forwarded-For is believed,
    `originless` the networks of programs that send no Origin. [::] as an address means IPv4 as well.

    `settle_s` is a little more than the agents' heartbeat interval; `keep_s` is for how long the routes of a silent
    host are kept; `drain_s` for how long consoles live on after SIGTERM.
    """

    class Meta:
        unknown = RAISE

    listen = _address("127.0.0.1:8081")
    ops_listen = _address("127.0.0.1:9103")
    broker_url = SecretField(required=True)
    broker_ca = fields.Str(load_default="")
    origins = fields.List(fields.Str(validate=_origin), required=True, validate=validate.Length(min=1))
    ticket_keys = KeysField(required=True)
    tls_cert = fields.Str(load_default="")
    tls_key = fields.Str(load_default="")
    tls_ca = fields.Str(load_default="")
    insecure_plain_hosts = fields.Bool(load_default=False)
    front_proxies = fields.List(NetworkField(), load_default=list)
    originless = fields.List(NetworkField(), load_default=list)
    max_tunnels = _count(4000, 1, 100_000)
    max_per_session = _count(8, 1, 1000)
    max_heads = _count(512, 1, 100_000)
    head_s = _seconds(10.0, 0.1, 60)
    dial_s = _seconds(5.0, 0.1, 60)
    half_close_s = _seconds(10.0, 0, 600)
    settle_s = _seconds(6.0, 0, 60)
    keep_s = _seconds(600.0, 10, _DAY)
    drain_s = _seconds(5.0, 0, _DAY)

    @validates_schema
    def _together(self, data: Mapping[str, Any], **_: Any) -> None:
        files = [data["tls_cert"], data["tls_key"], data["tls_ca"]]
        if any(files) and not all(files):
            raise ValidationError("tls_cert, tls_key and tls_ca belong together")

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> ProxySettings:
        tls = (data.pop("tls_cert"), data.pop("tls_key"), data.pop("tls_ca"))
        limits = Limits(
            tunnels=data.pop("max_tunnels"),
            per_session=data.pop("max_per_session"),
            heads=data.pop("max_heads"),
            head_s=data.pop("head_s"),
        )
        data["origins"] = frozenset(data["origins"])
        for name in ("front_proxies", "originless"):
            data[name] = tuple(data[name])
        return ProxySettings(**data, tls=tls if tls[0] else None, limits=limits)
