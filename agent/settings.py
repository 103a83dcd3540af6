"""The [agent] section of the settings file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates, validates_schema

from deskfleet.agent.fetch import Source
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.settings import SecretField
from deskfleet.schemas.host import HOST
from deskfleet.schemas.messages import ADDRESS, PCI_ADDRESS

#: A unix socket's path has 107 bytes; this much is ours after the run folder: /<sid>/rescue.sock
_LONGEST_RUN = 107 - len("/" + 32 * "x" + "/rescue.sock")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """How an agent runs. Times in seconds; `uids` is the range of user ids for guests."""

    host: str
    broker_url: Secret
    broker_ca: str
    state: Path
    run: Path
    images: Path
    console_listen: str
    console_address: str
    console_tls: tuple[str, str, str] | None
    ops_listen: str
    network: str
    uids: range
    offer_cpus: int
    offer_memory_mib: int
    gpu_names: dict[str, str]
    gpu_roms: dict[str, str]
    hugepages: str
    ready_s: float
    powerdown_s: float
    heartbeat_s: float
    picture_s: float
    source: Source


class AgentSchema(Schema):
    """[agent]. `host` is this host's name for ever; `console_address` is where proxies reach `console_listen`."""

    class Meta:
        unknown = RAISE

    host = fields.Str(required=True, validate=validate.Regexp(rf"\A{HOST.pattern}\Z"))
    broker_url = SecretField(required=True)
    broker_ca = fields.Str(load_default="")
    state = fields.Str(load_default="/var/lib/deskfleet/agent", validate=validate.Regexp(r"\A/"))
    run = fields.Str(load_default="/run/deskfleet", validate=validate.Regexp(rf"\A/.{{1,{_LONGEST_RUN - 1}}}\Z"))
    images = fields.Str(load_default="/var/lib/deskfleet/images", validate=validate.Regexp(r"\A/"))
    console_listen = fields.Str(load_default="0.0.0.0:6080", validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))
    console_address = fields.Str(required=True, validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))
    console_cert = fields.Str(load_default="")
    console_key = fields.Str(load_default="")
    console_ca = fields.Str(load_default="")
    ops_listen = fields.Str(load_default="127.0.0.1:9102", validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))
    network = fields.Str(load_default="passt", validate=validate.OneOf(["passt", "none"]))
    first_uid = fields.Int(load_default=200_000, validate=validate.Range(1000, 2**31))
    last_uid = fields.Int(load_default=209_999, validate=validate.Range(1000, 2**31))
    offer_cpus = fields.Int(load_default=0, validate=validate.Range(0, 65_536))
    offer_memory_mib = fields.Int(load_default=0, validate=validate.Range(0))
    gpu_names = fields.Dict(fields.Str(), fields.Str(validate=validate.Length(1, 128)), load_default=dict)
    gpu_roms = fields.Dict(
        fields.Str(validate=validate.Regexp(rf"\A({PCI_ADDRESS.pattern}|[0-9a-f]{{4}}:[0-9a-f]{{4}})\Z")),
        fields.Str(validate=validate.Regexp(r"\A(/.+)?\Z")),
        load_default=dict,
    )
    hugepages = fields.Str(load_default="off", validate=validate.OneOf(["off", "gpu", "all"]))
    ready_s = fields.Float(load_default=30.0, validate=validate.Range(1, 600))
    powerdown_s = fields.Float(load_default=10.0, validate=validate.Range(0, 600))
    heartbeat_s = fields.Float(load_default=5.0, validate=validate.Range(0.5, 60))
    image_source = fields.Str(load_default="")
    image_ca = fields.Str(load_default="", validate=validate.Regexp(r"\A(/.*)?\Z"))
    image_token = SecretField(load_default=None, validate=validate.Length(min=1))
    image_rate_mib_s = fields.Float(load_default=50.0, validate=validate.Range(0, 100_000))
    image_room_mib = fields.Int(load_default=4096, validate=validate.Range(0, 1 << 30))
    image_prefetch = fields.Bool(load_default=False)
    image_keep_days = fields.Float(load_default=0.0, validate=validate.Range(0, 36_500))

    @validates("image_source")
    def _source(self, value: str, **_: Any) -> None:
        if value.startswith("/") or not value:
            return
        try:
            parts = urlsplit(value)
            plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            plain = False
        if not plain or "@" in value or "?" in value or "#" in value or not value.isprintable() or " " in value:
            raise ValidationError(
                "must be an absolute path, or a folder's https:// or http:// address without login or question mark"
            )

    picture_s = fields.Float(load_default=30.0, validate=validate.Range(1, 3600))

    @validates_schema
    def _together(self, data: dict[str, Any], **_: Any) -> None:
        files = [data["console_cert"], data["console_key"], data["console_ca"]]
        if any(files) and not all(files):
            raise ValidationError("console_cert, console_key and console_ca belong together")
        if data["image_token"] and not data["image_source"].startswith("https:"):
            raise ValidationError("image_token is sent over https only; image_source must begin with https://")
        if 0 < data["image_rate_mib_s"] < 0.1:
            raise ValidationError("image_rate_mib_s must be 0 (no limit) or at least 0.1")
        if data["first_uid"] > data["last_uid"]:
            raise ValidationError("first_uid must not be above last_uid")

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> AgentSettings:
        tls = (data.pop("console_cert"), data.pop("console_key"), data.pop("console_ca"))
        uids = range(data.pop("first_uid"), data.pop("last_uid") + 1)
        state, run, images = (Path(data.pop(name)) for name in ("state", "run", "images"))
        console_tls = tls if tls[0] else None
        names = ("source", "ca", "token", "rate_mib_s", "room_mib", "prefetch", "keep_days")
        data["source"] = Source(**{name: data.pop(f"image_{name}") for name in names})
        return AgentSettings(**data, state=state, run=run, images=images, uids=uids, console_tls=console_tls)
