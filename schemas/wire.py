"""How messages stand on the wire: one schema a message, in a registry by type.

The envelope is AMQP's (type, correlation_id = session id, user_id checked by the broker); the body is JSON and holds
only the payload. Unknown fields are ignored, so that old and new versions can meet on the wire.
"""

from __future__ import annotations

import json
from typing import TypeVar

from marshmallow import ValidationError, fields, validate

from deskfleet.schemas.errors import DecodeError, Reason
from deskfleet.schemas.machine import FILE, NAME, Drivers, Firmware, Format, Os, ReadyBy, Video
from deskfleet.schemas.messages import (
    INVENTORY,
    MOST_IMAGES,
    REPLICA,
    CatalogueImage,
    Console,
    ConsolesAsked,
    ConsolesListed,
    DrainRequested,
    ExtendRequested,
    GrantRevoked,
    HostDeclaredDead,
    HostFence,
    HostImages,
    HostInventory,
    HostTemplates,
    LaunchRequested,
    Message,
    PlacementAnswered,
    PlacementAsked,
    SessionChanged,
    StopRequested,
    TemplateOrdered,
    VmExtend,
    VmLook,
    VmPicture,
    VmReport,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Outcome, Resources, State
from deskfleet.schemas.template import KEY, MOST_TEMPLATES, Blueprint, TemplateOrder
from deskfleet.schemas.tickets import GRANT
from deskfleet.schemas.verdict import Forecast, Outlook, Verdict
from deskfleet.schemas.wire_fields import (
    Png,
    Tuple,
    Wire,
    addresses_field,
    bool_field,
    digest_field,
    host_field,
    int_field,
    sid_field,
    text_field,
)
from deskfleet.schemas.wire_host import GuestReportSchema, HostBeatSchema, HostReportSchema

MAX_BODY = 1 << 20


def _grant() -> fields.Str:
    return fields.Str(required=True, validate=validate.Regexp(rf"\A{GRANT.pattern}\Z"))


def _replica() -> fields.Str:
    return fields.Str(required=True, validate=validate.Regexp(rf"\A{REPLICA.pattern}\Z"))


class ResourcesSchema(Wire):
    target = Resources
    cpus = int_field(1, 4096)
    memory_mib = int_field(1, 1 << 24)
    disk_gib = int_field(1, 1 << 24)
    gpus = int_field(0, 64)
    gpu_model = text_field(128)


class LaunchRequestedSchema(Wire):
    target = LaunchRequested
    sid = sid_field()
    user = text_field(320, 1)
    groups = Tuple(fields.Str(validate=validate.Length(1, 256)), 1000)
    machine = fields.Str(required=True, validate=validate.Regexp(rf"\A{NAME.pattern}\Z"))
    resources = fields.Nested(ResourcesSchema, required=True)
    persistent = bool_field()
    lifetime_s = int_field(60, 366 * 24 * 3600)
    wait_s = int_field(0, 366 * 24 * 3600)


class StopRequestedSchema(Wire):
    target = StopRequested
    sid = sid_field()
    actor = text_field(320, 1)
    admin = bool_field()


class ExtendRequestedSchema(Wire):
    target = ExtendRequested
    sid = sid_field()
    actor = text_field(320, 1)
    admin = bool_field()
    lifetime_s = int_field(1, 366 * 24 * 3600)


class DrainRequestedSchema(Wire):
    target = DrainRequested
    host = host_field()
    draining = bool_field()
    actor = text_field(320, 1)
    text = text_field(400)


class HostDeclaredDeadSchema(Wire):
    target = HostDeclaredDead
    host = host_field()
    actor = text_field(320, 1)


class PlacementAskedSchema(Wire):
    target = PlacementAsked
    question = sid_field()
    replica = _replica()
    user = text_field(320, 1)
    groups = Tuple(fields.Str(validate=validate.Length(1, 256)), 1000)
    machine = fields.Str(required=True, validate=validate.Regexp(rf"\A{NAME.pattern}\Z"))
    resources = fields.Nested(ResourcesSchema, required=True)
    lifetime_s = int_field(1, 366 * 24 * 3600)


class VerdictSchema(Wire):
    target = Verdict
    host = text_field(63)
    reason = fields.Enum(Reason, required=True, by_value=True)
    detail = text_field(4000)


class ForecastSchema(Wire):
    target = Forecast
    outlook = fields.Enum(Outlook, required=True, by_value=True)
    host = text_field(63)
    place = int_field()
    estimate_s = fields.Float(required=True, allow_none=True, allow_nan=False, validate=validate.Range(0, 1e9))
    why = text_field(4000)
    largest = fields.Nested(ResourcesSchema, required=True, allow_none=True)
    verdicts = Tuple(fields.Nested(VerdictSchema), 10_000)
    instant = fields.Bool(load_default=False, truthy={True}, falsy={False})


class PlacementAnsweredSchema(Wire):
    target = PlacementAnswered
    question = sid_field()
    forecast = fields.Nested(ForecastSchema, required=True)


class VmStartSchema(Wire):
    target = VmStart
    sid = sid_field()
    generation = int_field(1)
    user = text_field(320, 1)
    machine = fields.Str(required=True, validate=validate.Regexp(rf"\A{NAME.pattern}\Z"))
    os = fields.Enum(Os, required=True, by_value=True)
    sha256 = digest_field()
    format = fields.Enum(Format, required=True, by_value=True)
    video = fields.Enum(Video, required=True, by_value=True)
    firmware = fields.Enum(Firmware, required=True, by_value=True)
    resources = fields.Nested(ResourcesSchema, required=True)
    gpu_addresses = addresses_field()
    persistent = bool_field()
    lifetime_s = int_field(1, 366 * 24 * 3600)
    grace_s = int_field(0, 366 * 24 * 3600)
    connect_s = int_field(0, 366 * 24 * 3600)
    idle_s = int_field(0, 366 * 24 * 3600)
    drivers = fields.Enum(Drivers, required=True, by_value=True)
    # An agent that was upgraded finds older ones in its journal.
    template = fields.Str(load_default="", validate=validate.Regexp(rf"\A({KEY.pattern})?\Z"))


class VmStopSchema(Wire):
    target = VmStop
    sid = sid_field()
    generation = int_field(0)
    outcome = fields.Enum(Outcome, required=True, by_value=True)
    reason = fields.Enum(Reason, required=True, by_value=True)


class VmExtendSchema(Wire):
    target = VmExtend
    sid = sid_field()
    generation = int_field(1)
    lifetime_s = int_field(1, 366 * 24 * 3600)


class HostFenceSchema(Wire):
    target = HostFence
    host = host_field()
    generation = int_field(0)


class CatalogueImageSchema(Wire):
    target = CatalogueImage
    sha256 = digest_field()
    file = fields.Str(required=True, validate=validate.Regexp(rf"\A{FILE.pattern}\Z"))
    format = fields.Enum(Format, required=True, by_value=True)


class HostImagesSchema(Wire):
    target = HostImages
    host = host_field()
    digest = fields.Str(required=True, validate=validate.Regexp(rf"\A{INVENTORY.pattern}\Z"))
    images = Tuple(fields.Nested(CatalogueImageSchema), MOST_IMAGES)
    wanted = Tuple(digest_field(), MOST_IMAGES)


class BlueprintSchema(Wire):
    target = Blueprint
    machine = fields.Str(required=True, validate=validate.Regexp(rf"\A{NAME.pattern}\Z"))
    os = fields.Enum(Os, required=True, by_value=True)
    sha256 = digest_field()
    format = fields.Enum(Format, required=True, by_value=True)
    video = fields.Enum(Video, required=True, by_value=True)
    firmware = fields.Enum(Firmware, required=True, by_value=True)
    drivers = fields.Enum(Drivers, required=True, by_value=True)
    cpus = int_field(1, 4096)
    memory_mib = int_field(1, 1 << 24)
    disk_gib = int_field(1, 1 << 24)
    most_cpus = int_field(1, 4096)
    most_memory_mib = int_field(1, 1 << 24)
    ready = fields.Enum(ReadyBy, required=True, by_value=True)
    copied = bool_field()
    tenant = text_field(256)


BLUEPRINT = BlueprintSchema()


class HostTemplatesSchema(Wire):
    target = HostTemplates
    host = host_field()
    digest = fields.Str(required=True, validate=validate.Regexp(rf"\A{INVENTORY.pattern}\Z"))
    blueprints = Tuple(fields.Nested(BlueprintSchema), MOST_TEMPLATES)


class TemplateOrderedSchema(Wire):
    target = TemplateOrdered
    host = host_field()
    key = fields.Str(required=True, validate=validate.Regexp(rf"\A{KEY.pattern}\Z"))
    order = fields.Enum(TemplateOrder, required=True, by_value=True)
    actor = text_field(320, 1)


class HostInventorySchema(Wire):
    target = HostInventory
    host = host_field()


class VmLookSchema(Wire):
    target = VmLook
    sid = sid_field()
    replica = _replica()


class VmPictureSchema(Wire):
    target = VmPicture
    host = host_field()
    sid = sid_field()
    png = Png(required=True)
    last = bool_field()


class VmReportSchema(Wire):
    target = VmReport
    host = host_field()
    guest = fields.Nested(GuestReportSchema, required=True)


class SessionChangedSchema(Wire):
    target = SessionChanged
    sid = sid_field()
    state = fields.Enum(State, required=True, by_value=True)
    outcome = fields.Enum(Outcome, required=True, by_value=True, allow_none=True)
    host = text_field(63)
    generation = int_field(0)


class GrantRevokedSchema(Wire):
    target = GrantRevoked
    grant = _grant()


class ConsolesAskedSchema(Wire):
    target = ConsolesAsked
    sid = sid_field()
    replica = _replica()


class ConsoleSchema(Wire):
    target = Console
    user = text_field(320, 1)
    grant = _grant()
    open_s = fields.Float(required=True, allow_nan=False, validate=validate.Range(0, 1e9))


class ConsolesListedSchema(Wire):
    target = ConsolesListed
    proxy = _replica()
    sid = sid_field()
    consoles = Tuple(fields.Nested(ConsoleSchema), 1000)


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
    "vm.look.v1": VmLookSchema(),
    "vm.picture.v1": VmPictureSchema(),
    "host.images.v1": HostImagesSchema(),
    "host.templates.v1": HostTemplatesSchema(),
    "template.ordered.v1": TemplateOrderedSchema(),
    "vm.report.v1": VmReportSchema(),
    "host.heartbeat.v1": HostReportSchema(),
    "host.beat.v1": HostBeatSchema(),
    "session.changed.v1": SessionChangedSchema(),
    "grant.revoked.v1": GrantRevokedSchema(),
    "consoles.asked.v1": ConsolesAskedSchema(),
    "consoles.listed.v1": ConsolesListedSchema(),
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
