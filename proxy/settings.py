"""The [proxy] section of the settings file."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any
from urllib.parse import urlsplit

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates_schema

from deskfleet.proxy.server import Limits
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.settings import SecretField
from deskfleet.schemas.messages import ADDRESS

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """What a proxy is told. Times in seconds; `tls` are certificate, key and CA towards hosts (paths of PEM files)."""

    listen: str
    ops_listen: str
    broker_url: Secret
    origins: frozenset[str]
    ticket_keys: tuple[str, ...]
    tls: tuple[str, str, str] | None
    insecure_plain_hosts: bool
    front_proxies: tuple[Network, ...]
    originless: tuple[Network, ...]
    limits: Limits
    dial_s: float
    settle_s: float
    keep_s: float
    drain_s: float


class _Networks(fields.List[Any]):
    def __init__(self) -> None:
        super().__init__(fields.Str(), load_default=list)

    def _deserialize(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return tuple(ip_network(str(text)) for text in super()._deserialize(*args, **kwargs))
        except ValueError as error:
            raise ValidationError(f"is not a network: {error}") from None


def _origin(text: str) -> None:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or text != f"{parts.scheme}://{parts.netloc.lower()}":
        raise ValidationError("must be an origin as browsers write it, such as https://desktops.example.org")


class ProxySchema(Schema):
    """[proxy]. `origins` are the portal's; `originless` the networks of programs that send no Origin."""

    class Meta:
        unknown = RAISE

    listen = fields.Str(load_default="127.0.0.1:8081", validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))
    ops_listen = fields.Str(load_default="127.0.0.1:9103", validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))
    broker_url = SecretField(required=True)
    origins = fields.List(fields.Str(validate=_origin), required=True, validate=validate.Length(min=1))
    ticket_keys = fields.List(SecretField(validate=validate.Length(min=32)), required=True)
    tls_cert = fields.Str(load_default="")
    tls_key = fields.Str(load_default="")
    tls_ca = fields.Str(load_default="")
    insecure_plain_hosts = fields.Bool(load_default=False)
    front_proxies = _Networks()
    originless = _Networks()
    max_tunnels = fields.Int(load_default=4000, validate=validate.Range(1, 100_000))
    max_per_session = fields.Int(load_default=8, validate=validate.Range(1, 1000))
    dial_s = fields.Float(load_default=5.0, validate=validate.Range(0.1, 60))
    settle_s = fields.Float(load_default=6.0, validate=validate.Range(0, 60))
    keep_s = fields.Float(load_default=600.0, validate=validate.Range(10))
    drain_s = fields.Float(load_default=5.0, validate=validate.Range(0, 86_400))

    @validates_schema
    def _together(self, data: dict[str, Any], **_: Any) -> None:
        files = [data["tls_cert"], data["tls_key"], data["tls_ca"]]
        if any(files) and not all(files):
            raise ValidationError("tls_cert, tls_key and tls_ca belong together")

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> ProxySettings:
        tls = (data["tls_cert"], data["tls_key"], data["tls_ca"])
        return ProxySettings(
            listen=data["listen"],
            ops_listen=data["ops_listen"],
            broker_url=data["broker_url"],
            origins=frozenset(data["origins"]),
            ticket_keys=tuple(key.reveal() for key in data["ticket_keys"]),
            tls=tls if tls[0] else None,
            insecure_plain_hosts=data["insecure_plain_hosts"],
            front_proxies=data["front_proxies"],
            originless=data["originless"],
            limits=Limits(tunnels=data["max_tunnels"], per_session=data["max_per_session"]),
            dial_s=data["dial_s"],
            settle_s=data["settle_s"],
            keep_s=data["keep_s"],
            drain_s=data["drain_s"],
        )
