"""How messages stand on the wire: one schema a message, in a registry by type.

The envelope is AMQP's (type, correlation_id = session id, user_id checked by the broker); the body is JSON and holds
only the payload. Unknown fields are ignored, so that old and new versions can meet on the wire.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_load, validate

from deskfleet.schemas.errors import DecodeError, Reason
from deskfleet.schemas.host import HOST, Gpu, GuestReport, HostBeat, HostReport, Phase
from deskfleet.schemas.machine import DIGEST, NAME, Drivers, Firmware, Format, Os, Video
from deskfleet.schemas.messages import (
    ADDRESS,
    INVENTORY,
    PCI_ADDRESS,
    REPLICA,
    DrainRequested,
    ExtendRequested,
    HostDeclaredDead,
    HostFence,
    HostInventory,
    LaunchRequested,
    Message,
    PlacementAnswered,
    PlacementAsked,
    SessionChanged,
    StopRequested,
    VmExtend,
    VmReport,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Outcome, Resources, State
from deskfleet.schemas.tickets import SID
from deskfleet.schemas.verdict import Forecast, Outlook, Verdict

MAX_BODY = 1 << 20


def _sid() -> fields.Str:
    return fields.Str(required=True, validate=validate.Regexp(rf"\A{SID.pattern}\Z"))


def _host() -> fields.Str:
    return fields.Str(required=True, validate=validate.Regexp(rf"\A{HOST.pattern}\Z"))


def _text(limit: int, least: int = 0) -> fields.Str:
    return fields.Str(required=True, validate=validate.Length(least, limit))


def _int(low: int = 0, high: int = 1 << 40) -> fields.Int:
    return fields.Int(required=True, strict=True, validate=validate.Range(low, high))


def _bool() -> fields.Bool:
    return fields.Bool(required=True, truthy={True}, falsy={False})


class Tuple(fields.List[Any]):
    """A JSON list that becomes a tuple, with a limit on its length."""

    def __init__(self, item: fields.Field[Any], limit: int) -> None:
        super().__init__(item, required=True, validate=validate.Length(max=limit))

    def _deserialize(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(super()._deserialize(*args, **kwargs))


def _addresses() -> Tuple:
    return Tuple(fields.Str(validate=validate.Regexp(rf"\A{PCI_ADDRESS.pattern}\Z")), 64)


class Wire(Schema):
    """Base of the wire schemas: ignores what it does not know and builds `target`."""

    target: type[Any]

    class Meta:
        unknown = EXCLUDE

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Any:
        return self.target(**data)


class ResourcesSchema(Wire):
    target = Resources
    cpus = _int(1, 4096)
    memory_mib = _int(1, 1 << 24)
    disk_gib = _int(1, 1 << 24)
    gpus = _int(0, 64)
    gpu_model = _text(128)


class LaunchRequestedSchema(Wire):
    target = LaunchRequested
    sid = _sid()
    user = _text(320, 1)
    groups = Tuple(fields.Str(validate=validate.Length(1, 256)), 1000)
    machine = fields.Str(required=True, validate=validate.Regexp(rf"\A{NAME.pattern}\Z"))
    resources = fields.Nested(ResourcesSchema, required=True)
    persistent = _bool()
    lifetime_s = _int(60, 366 * 24 * 3600)
    wait_s = _int(0, 366 * 24 * 3600)


class StopRequestedSchema(Wire):
    target = StopRequested
    sid = _sid()
    actor = _text(320, 1)
    admin = _bool()


class ExtendRequestedSchema(Wire):
    target = ExtendRequested
    sid = _sid()
    actor = _text(320, 1)
    admin = _bool()
    lifetime_s = _int(1, 366 * 24 * 3600)


class DrainRequestedSchema(Wire):
    target = DrainRequested
    host = _host()
    draining = _bool()
    actor = _text(320, 1)
    text = _text(400)


class HostDeclaredDeadSchema(Wire):
    target = HostDeclaredDead
    host = _host()
    actor = _text(320, 1)


class PlacementAskedSchema(Wire):
    target = PlacementAsked
    question = _sid()
    replica = fields.Str(required=True, validate=validate.Regexp(rf"\A{REPLICA.pattern}\Z"))
    user = _text(320, 1)
    groups = Tuple(fields.Str(validate=validate.Length(1, 256)), 1000)
    machine = fields.Str(required=True, validate=validate.Regexp(rf"\A{NAME.pattern}\Z"))
    resources = fields.Nested(ResourcesSchema, required=True)
    lifetime_s = _int(1, 366 * 24 * 3600)


class VerdictSchema(Wire):
    target = Verdict
    host = _text(63)
    reason = fields.Enum(Reason, required=True, by_value=True)
    detail = _text(4000)


class ForecastSchema(Wire):
    target = Forecast
    outlook = fields.Enum(Outlook, required=True, by_value=True)
    host = _text(63)
    place = _int()
    estimate_s = fields.Float(required=True, allow_none=True, allow_nan=False, validate=validate.Range(0, 1e9))
    why = _text(4000)
    largest = fields.Nested(ResourcesSchema, required=True, allow_none=True)
    verdicts = Tuple(fields.Nested(VerdictSchema), 10_000)


class PlacementAnsweredSchema(Wire):
    target = PlacementAnswered
    question = _sid()
    forecast = fields.Nested(ForecastSchema, required=True)


class VmStartSchema(Wire):
    target = VmStart
    sid = _sid()
    generation = _int(1)
    user = _text(320, 1)
    machine = fields.Str(required=True, validate=validate.Regexp(rf"\A{NAME.pattern}\Z"))
    os = fields.Enum(Os, required=True, by_value=True)
    sha256 = fields.Str(required=True, validate=validate.Regexp(rf"\A{DIGEST.pattern}\Z"))
    format = fields.Enum(Format, required=True, by_value=True)
    video = fields.Enum(Video, required=True, by_value=True)
    firmware = fields.Enum(Firmware, required=True, by_value=True)
    resources = fields.Nested(ResourcesSchema, required=True)
    gpu_addresses = _addresses()
    persistent = _bool()
    lifetime_s = _int(1, 366 * 24 * 3600)
    grace_s = _int(0, 366 * 24 * 3600)
    connect_s = _int(0, 366 * 24 * 3600)
    idle_s = _int(0, 366 * 24 * 3600)
    drivers = fields.Enum(Drivers, required=True, by_value=True)


class VmStopSchema(Wire):
    target = VmStop
    sid = _sid()
    generation = _int(0)
    outcome = fields.Enum(Outcome, required=True, by_value=True)
    reason = fields.Enum(Reason, required=True, by_value=True)


class VmExtendSchema(Wire):
    target = VmExtend
    sid = _sid()
    generation = _int(1)
    lifetime_s = _int(1, 366 * 24 * 3600)


class HostFenceSchema(Wire):
    target = HostFence
    host = _host()
    generation = _int(0)


class GuestReportSchema(Wire):
    target = GuestReport
    sid = _sid()
    generation = _int(0)
    phase = fields.Enum(Phase, required=True, by_value=True)
    ran = _bool()
    viewers = _int(0, 100_000)
    outcome = fields.Enum(Outcome, required=True, by_value=True, allow_none=True)
    reason = fields.Enum(Reason, required=True, by_value=True, allow_none=True)
    detail = _text(4000)
    left_s = fields.Float(required=True, allow_none=True, allow_nan=False, validate=validate.Range(0, 1e9))
    lifetime_s = fields.Int(required=True, strict=True, allow_none=True, validate=validate.Range(1, 366 * 24 * 3600))


class HostInventorySchema(Wire):
    target = HostInventory
    host = _host()


class VmReportSchema(Wire):
    target = VmReport
    host = _host()
    guest = fields.Nested(GuestReportSchema, required=True)


class GpuSchema(Wire):
    target = Gpu
    address = fields.Str(required=True, validate=validate.Regexp(rf"\A{PCI_ADDRESS.pattern}\Z"))
    model = _text(128, 1)
    group = _int(0, 1 << 20)
    functions = _addresses()
    offered = _bool()
    problem = _text(400)


class HostReportSchema(Wire):
    target = HostReport
    host = _host()
    incarnation = _text(64, 1)
    seq = _int()
    boot_id = _text(64, 1)
    last_generation = _int()
    fenced = _bool()
    console = fields.Str(required=True, validate=validate.Regexp(rf"\A({ADDRESS.pattern})?\Z"))
    accel = fields.Str(required=True, validate=validate.OneOf(["kvm", "tcg", "none"]))
    cpus = _int(0, 65_536)
    memory_mib = _int(0, 1 << 32)
    load1 = fields.Float(required=True, allow_nan=False, validate=validate.Range(0, 1e6))
    memory_free_mib = _int(0, 1 << 32)
    disk_mib = _int(0, 1 << 40)
    disk_free_mib = _int(0, 1 << 40)
    images = Tuple(fields.Str(validate=validate.Regexp(rf"\A{DIGEST.pattern}\Z")), 10_000)
    gpus = Tuple(fields.Nested(GpuSchema), 64)
    guests = Tuple(fields.Nested(GuestReportSchema), 5_000)
    problems = Tuple(fields.Str(validate=validate.Length(1, 400)), 100)
    version = _text(64)
    digest = fields.Str(required=True, validate=validate.Regexp(rf"\A({INVENTORY.pattern})?\Z"))


class HostBeatSchema(Wire):
    target = HostBeat
    host = _host()
    incarnation = _text(64, 1)
    seq = _int()
    last_generation = _int()
    fenced = _bool()
    console = fields.Str(required=True, validate=validate.Regexp(rf"\A({ADDRESS.pattern})?\Z"))
    load1 = fields.Float(required=True, allow_nan=False, validate=validate.Range(0, 1e6))
    memory_free_mib = _int(0, 1 << 32)
    disk_free_mib = _int(0, 1 << 40)
    digest = fields.Str(required=True, validate=validate.Regexp(rf"\A{INVENTORY.pattern}\Z"))


class SessionChangedSchema(Wire):
    target = SessionChanged
    sid = _sid()
    state = fields.Enum(State, required=True, by_value=True)
    outcome = fields.Enum(Outcome, required=True, by_value=True, allow_none=True)
    host = _text(63)
    generation = _int(0)


#: AMQP type property -> schema. The docs' message table is generated from this.
REGISTRY: dict[str, Wire] = {
    "launch.requested.v1": LaunchRequestedSchema(),
    "stop.requested.v1": StopRequestedSchema(),
    "extend.requested.v1": ExtendRequestedSchema(),
    "host.drain.v1": DrainRequestedSchema(),
    "host.declared_dead.v1": HostDeclaredDeadSchema(),
    "placement.asked.v1": PlacementAskedSchema(),
    "placement.answered.v1": PlacementAnsweredSchema(),
    "vm.start.v1": VmStartSchema(),
    "vm.stop.v1": VmStopSchema(),
    "vm.extend.v1": VmExtendSchema(),
    "host.fence.v1": HostFenceSchema(),
    "host.inventory.v1": HostInventorySchema(),
    "vm.report.v1": VmReportSchema(),
    "host.heartbeat.v1": HostReportSchema(),
    "host.beat.v1": HostBeatSchema(),
    "session.changed.v1": SessionChangedSchema(),
}
_KINDS = {schema.target: kind for kind, schema in REGISTRY.items()}
_M = TypeVar("_M")


def encode(message: Message) -> tuple[str, bytes]:
    """The AMQP type and the JSON body of a message."""
    kind = _KINDS[type(message)]
    body = json.dumps(REGISTRY[kind].dump(message), separators=(",", ":"), allow_nan=False)
    return kind, body.encode()


def decode(kind: str, body: bytes) -> Message:
    """The message that `body` holds.

    Raises:
        DecodeError: unknown type, not JSON, too long, or a field missing or out of range. It keeps the bytes.
    """
    schema = REGISTRY.get(kind)
    if schema is None:
        raise DecodeError(kind, body, "this type is not known")
    if len(body) > MAX_BODY:
        raise DecodeError(kind, body[:4096], f"longer than {MAX_BODY} bytes")
    try:
        message: Message = schema.load(json.loads(body))
    except (ValueError, RecursionError) as error:
        raise DecodeError(kind, body, f"not JSON ({type(error).__name__})") from None
    except ValidationError as error:
        raise DecodeError(kind, body, json.dumps(error.messages)[:1000]) from None
    return message


def decode_as(expected: type[_M], kind: str, body: bytes) -> _M:
    """Like `decode`, for a queue that carries one type only.

    Raises:
        DecodeError: also when the message is a valid one of another type.
    """
    message = decode(kind, body)
    if not isinstance(message, expected):
        raise DecodeError(kind, body, f"expected {_KINDS[expected]}")
    return message
