"""The [agent] section of the settings file."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates, validates_schema

from deskfleet.agent.fetch import Source
from deskfleet.agent.templates import Rules
from deskfleet.agent.volumes import IDS, USER, Kind, Volume
from deskfleet.runtime.secret import Secret
from deskfleet.runtime.settings import Network, NetworkField, SecretField
from deskfleet.schemas.host import HOST
from deskfleet.schemas.machine import NAME
from deskfleet.schemas.messages import ADDRESS, PCI_ADDRESS

#: A unix socket's path has 107 bytes; this much is ours after the run folder: /<sid>/rescue.sock
_LONGEST_RUN = 107 - len("/" + 32 * "x" + "/rescue.sock")


#: Link-local addresses, where most clouds have their metadata service, and where some have it besides: who asks there
#: gets the credentials of the host.
_BLOCKED = ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "fd20:ce::254/128", "100.100.100.200/32")

#: Tags are qemu's, and name sockets: short, and nothing in them that means anything.
_TAG = re.compile(r"[a-z0-9][a-z0-9_-]{0,29}")
#: Where it is mounted in the guest, told in a line of words.
_TARGET = re.compile(r"/[A-Za-z0-9._/-]{1,200}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")


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
    bridge: str
    bridge_isolated: bool
    blocked_networks: tuple[Network, ...]
    cgroup: Path
    volumes: tuple[Volume, ...]
    disk_floor_mib: int
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
    templates: Rules | None
    template_build_s: float
    template_still_s: float


class VolumeSchema(Schema):
    """[[agent.volumes]]: a folder of the host that guests see. `path` may end in /{user}."""

    class Meta:
        unknown = RAISE

    tag = fields.Str(required=True, validate=validate.Regexp(rf"\A{_TAG.pattern}\Z"))
    path = fields.Str(required=True, validate=validate.Regexp(r"\A/[^\0]+\Z"))
    kind = fields.Enum(Kind, by_value=True, load_default=Kind.NINE_P)
    read_only = fields.Bool(load_default=True)
    target = fields.Str(load_default="", validate=validate.Regexp(rf"\A({_TARGET.pattern})?\Z"))
    owner = fields.Int(load_default=300_000, validate=validate.Range(1000, 2**31 - IDS))
    create = fields.Bool(load_default=False)
    machines = fields.List(fields.Str(validate=validate.Regexp(rf"\A{NAME.pattern}\Z")), load_default=list)
    users = fields.List(fields.Str(validate=validate.Length(1, 256)), load_default=list)

    @validates_schema
    def _together(self, data: dict[str, Any], **_: Any) -> None:
        path = data["path"]
        personal = path.endswith(f"/{USER}")
        if ".." in path.split("/"):
            raise ValidationError("no '..' in a path", "path")
        if USER in path.removesuffix(f"/{USER}"):
            raise ValidationError(f"{USER} can only be the whole last part of a path", "path")
        if data["kind"] is Kind.NINE_P and (personal or not data["read_only"]):
            raise ValidationError("9p gives what everybody may read, and no more: kind = 'virtiofs' for this", "kind")
        if data["create"] and not personal:
            raise ValidationError(f"only a folder of a user ({USER}) is made", "create")

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Volume:
        target = data.pop("target") or f"/mnt/{data['tag']}"
        machines, users = tuple(data.pop("machines")), tuple(data.pop("users"))
        return Volume(**data, target=target, machines=machines, users=users)


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
    network = fields.Str(load_default="passt", validate=validate.OneOf(["passt", "bridge", "none"]))
    bridge = fields.Str(load_default="", validate=validate.Regexp(rf"\A({_INTERFACE.pattern})?\Z"))
    bridge_isolated = fields.Bool(load_default=True)
    blocked_networks = fields.List(NetworkField(), load_default=lambda: [ipaddress.ip_network(n) for n in _BLOCKED])
    cgroup = fields.Str(
        load_default="/sys/fs/cgroup/system.slice/deskfleet-guests.service", validate=validate.Regexp(r"\A/")
    )
    volumes = fields.List(fields.Nested(VolumeSchema), load_default=list)
    disk_floor_mib = fields.Int(load_default=1024, validate=validate.Range(0))
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
    templates = fields.Bool(load_default=True)
    template_load = fields.Float(load_default=0.8, validate=validate.Range(0.01, 1000))
    template_floor_mib = fields.Int(load_default=1024, validate=validate.Range(0))
    template_build_s = fields.Float(load_default=900.0, validate=validate.Range(10, 24 * 3600))
    template_still_s = fields.Float(load_default=10.0, validate=validate.Range(0.1, 600))
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
        if (data["network"] == "bridge") != bool(data["bridge"]):
            raise ValidationError("network = 'bridge' and bridge = NAME belong together", "bridge")
        tags = [volume.tag for volume in data["volumes"]]
        if len(tags) != len(set(tags)):
            raise ValidationError("each volume needs a tag of its own", "volumes")
        for volume in data["volumes"]:
            if volume.owner <= data["last_uid"] and data["first_uid"] < volume.owner + IDS:
                raise ValidationError(f"{volume.tag}: owner is among the guests' user ids", "volumes")

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> AgentSettings:
        tls = (data.pop("console_cert"), data.pop("console_key"), data.pop("console_ca"))
        uids = range(data.pop("first_uid"), data.pop("last_uid") + 1)
        for name in ("state", "run", "images", "cgroup"):
            data[name] = Path(data[name])
        for name in ("volumes", "blocked_networks"):
            data[name] = tuple(data[name])
        console_tls = tls if tls[0] else None
        rules = Rules(data.pop("template_load"), data.pop("template_floor_mib"))
        data["templates"] = rules if data["templates"] and data["hugepages"] != "all" else None
        names = ("source", "ca", "token", "rate_mib_s", "room_mib", "prefetch", "keep_days")
        data["source"] = Source(**{name: data.pop(f"image_{name}") for name in names})
        return AgentSettings(**data, uids=uids, console_tls=console_tls)
