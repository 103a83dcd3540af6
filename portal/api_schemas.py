"""What the HTTP API takes and gives. Sizes in MiB and GiB, times in seconds or as UNIX time."""

from __future__ import annotations

from typing import Any

from marshmallow import RAISE, Schema, fields, post_load, validate

from deskfleet.portal.fleet import LONGEST_TEXT
from deskfleet.portal.launching import Wish
from deskfleet.portal.scopes import Scope
from deskfleet.portal.shares import Audience
from deskfleet.schemas.template import TemplateOrder, TemplateState

_MOST = 1 << 40


class Input(Schema):
    """What comes in: a field that is not known is refused."""

    class Meta:
        unknown = RAISE


def _whole(low: int = 0, **options: Any) -> fields.Int:
    return fields.Int(strict=True, validate=validate.Range(low, _MOST), **options)


class _WishSchema(Input):
    machine = fields.Str(required=True, validate=validate.Length(1, 48))
    cpus = _whole(1, load_default=None)
    memory_mib = _whole(1, load_default=None)
    disk_gib = _whole(1, load_default=None)
    gpus = _whole(load_default=None)
    gpu_model = fields.Str(load_default="", validate=validate.Length(max=128))
    persistent = fields.Bool(load_default=False, truthy={True}, falsy={False})
    lifetime_s = _whole(1, load_default=None)


class PlacementSchema(_WishSchema):
    """A launch that is only thought of."""

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Wish:
        return Wish(**data)


class LaunchSchema(_WishSchema):
    """A launch. With `sid`, the same request sent again is the same desktop; without, every request is a new one."""

    sid = fields.Str(
        load_default="", validate=validate.Regexp(r"\A([0-9a-f]{32})?\Z", error="must be 32 lower-case hex digits")
    )

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> tuple[str, Wish]:
        return data.pop("sid"), Wish(**data)


class DrainSchema(Input):
    """What the administrator tells the people on a host that is being drained."""

    text = fields.Str(load_default="", validate=validate.Length(max=LONGEST_TEXT))


class ExtendSchema(Input):
    """How many seconds longer a desktop shall last."""

    extra_s = fields.Int(strict=True, required=True, validate=validate.Range(60, 366 * 24 * 3600))


class NewTokenSchema(Input):
    """A new access token: what it is for, what it may do, and for how many days it is good."""

    label = fields.Str(required=True, validate=validate.Length(1, 80))
    scopes = fields.List(
        fields.Enum(Scope, by_value=True), load_default=lambda: [Scope.DESKTOPS], validate=validate.Length(min=1)
    )
    days = fields.Int(strict=True, load_default=30, validate=validate.Range(1, 366))


class NewShareSchema(Input):
    """A new link to a desktop: what its guests may do, who may use it, for how long, and with which passphrase."""

    mode = fields.Str(load_default="full", validate=validate.OneOf(["full", "watch"]))
    audience = fields.Enum(Audience, by_value=True, load_default=Audience.SIGNED_IN)
    lifetime_s = fields.Int(strict=True, load_default=3600, validate=validate.Range(60, 366 * 24 * 3600))
    passphrase = fields.Str(load_default="", validate=validate.Length(max=200))


class ErrorSchema(Schema):
    """Every refusal: a reason for programs, a message for people, what exactly is wrong, and a reference to the log."""

    reason = fields.Str(required=True)
    message = fields.Str(required=True)
    details = fields.List(fields.Str(), required=True)
    reference = fields.Str(required=True)


class RangeSchema(Schema):
    """The sizes that a machine allows."""

    min = fields.Int()
    default = fields.Int()
    max = fields.Int()


class MachineSchema(Schema):
    """A machine that the caller may start."""

    name = fields.Str()
    title = fields.Str()
    text = fields.Str()
    os = fields.Str()
    cpus = fields.Nested(RangeSchema)
    memory_mib = fields.Nested(RangeSchema)
    disk_gib = fields.Nested(RangeSchema)
    gpu = fields.Str()
    gpu_models = fields.List(fields.Str())


class ResourcesSchema(Schema):
    """The size of a desktop."""

    cpus = fields.Int()
    memory_mib = fields.Int()
    disk_gib = fields.Int()
    gpus = fields.Int()
    gpu_model = fields.Str()


class SessionSchema(Schema):
    """A desktop. `unsure`: the records can't be read now, so this is what was true last. `host_silent`: its host does
    not answer, so nobody knows whether it is still in this `state`. `host_message`: what people on it are told.
    `birth`: forked, or booted and why, once it runs."""

    sid = fields.Str()
    user = fields.Str()
    machine = fields.Str()
    title = fields.Str()
    state = fields.Str()
    sentence = fields.Str()
    host = fields.Str()
    generation = fields.Int()
    outcome = fields.Str()
    reason = fields.Str()
    created_at = fields.Float()
    changed_at = fields.Float()
    time_left_s = fields.Float(allow_none=True)
    lifetime_s = fields.Int()
    persistent = fields.Bool()
    resources = fields.Nested(ResourcesSchema)
    stop_asked = fields.Bool()
    unsure = fields.Bool()
    host_silent = fields.Bool()
    host_message = fields.Str()
    birth = fields.Str()


class VerdictSchema(Schema):
    """Why a host did not take a desktop, or, without a host, which rule of the queue holds it back."""

    host = fields.Str()
    reason = fields.Str()
    sentence = fields.Str()


class StepSchema(Schema):
    """One step in a desktop's life."""

    at = fields.Float()
    event = fields.Str()
    state = fields.Str()
    host = fields.Str()
    reason = fields.Str(allow_none=True)


class StorySchema(SessionSchema):
    """A desktop, its place among those that wait (1 = next), in how many seconds it starts at the latest (null:
    unknown), why no host took it yet, and its steps."""

    place = fields.Int(allow_none=True)
    estimate_s = fields.Float(allow_none=True)
    verdicts = fields.List(fields.Nested(VerdictSchema))
    steps = fields.List(fields.Nested(StepSchema))


class ForecastSchema(Schema):
    """What would become of a launch. `outlook` is now, waits, never, or unknown when the scheduler does not say. With
    `instant` it is forked from a machine that is kept ready. `largest` is the largest size of the machine that some
    host could give (null: none)."""

    machine = fields.Str()
    resources = fields.Nested(ResourcesSchema)
    outlook = fields.Str()
    sentence = fields.Str()
    host = fields.Str()
    place = fields.Int()
    estimate_s = fields.Float(allow_none=True)
    why = fields.Str()
    largest = fields.Nested(ResourcesSchema, allow_none=True)
    verdicts = fields.List(fields.Nested(VerdictSchema))
    instant = fields.Bool()


class SessionListSchema(Schema):
    """The caller's desktops, newest first. `complete` is false when the records can't be read now."""

    sessions = fields.List(fields.Nested(SessionSchema))
    complete = fields.Bool()


class TicketSchema(Schema):
    """A ticket for a console: good for one connection, for a short time."""

    ticket = fields.Str()
    console_url = fields.Str()
    generation = fields.Int()
    expires_in_s = fields.Int()


class GpuSchema(Schema):
    """A GPU of a host."""

    address = fields.Str()
    model = fields.Str()
    offered = fields.Bool()
    problem = fields.Str()


class TemplateSchema(Schema):
    """A machine that a host keeps ready to be forked. `mib` is the memory that it takes, `made_at` UNIX seconds (0: not
    made), `forks` how many desktops run on it; `hits` and `misses` are launches that were forked, and that had to
    boot."""

    key = fields.Str()
    machine = fields.Str()
    tenant = fields.Str()
    cpus = fields.Int()
    memory_mib = fields.Int()
    state = fields.Enum(TemplateState, by_value=True)
    serving = fields.Bool()
    mib = fields.Int()
    made_at = fields.Int()
    forks = fields.Int()
    hits = fields.Int()
    misses = fields.Int()
    detail = fields.Str()


class TemplateOrderSchema(Input):
    """What is to become of a template."""

    order = fields.Enum(TemplateOrder, required=True, by_value=True)


class ReportSchema(Schema):
    """What a host said of itself last."""

    accel = fields.Str()
    fenced = fields.Bool()
    cpus = fields.Int()
    memory_mib = fields.Int()
    memory_free_mib = fields.Int()
    disk_mib = fields.Int()
    disk_free_mib = fields.Int()
    load1 = fields.Float()
    images = fields.List(fields.Str())
    gpus = fields.List(fields.Nested(GpuSchema))
    problems = fields.List(fields.Str())
    version = fields.Str()
    templates = fields.List(fields.Nested(TemplateSchema), allow_none=True)


class HostSchema(Schema):
    """A host; `report` is null unless it is fresh, `seen_s` null when it never reported."""

    name = fields.Str()
    draining = fields.Bool()
    dead = fields.Bool()
    message = fields.Str()
    seen_s = fields.Float(allow_none=True)
    guests = fields.Int()
    report = fields.Nested(ReportSchema, allow_none=True)


class ImageSchema(Schema):
    """An image on a host, or on its way there; `machines` are the catalogue's names for it. `state` is held, fetching,
    waiting or failed; `mib` is 0 while it is unknown."""

    sha256 = fields.Str()
    machines = fields.List(fields.Str())
    state = fields.Str()
    percent = fields.Int()
    mib = fields.Int()
    fault = fields.Str()
    detail = fields.Str()


class OneHostSchema(HostSchema):
    """A host with its images."""

    images = fields.List(fields.Nested(ImageSchema))


class TokenSchema(Schema):
    """An access token as it is shown later."""

    name = fields.Str()
    label = fields.Str()
    scopes = fields.List(fields.Enum(Scope, by_value=True))
    created_at = fields.Float()
    expires_at = fields.Float()


class ShareSchema(Schema):
    """A link as it is shown later; `locked` when it asks for a passphrase."""

    name = fields.Str()
    audience = fields.Enum(Audience, by_value=True)
    locked = fields.Bool()
    created_at = fields.Float()
    expires_at = fields.Float()


class MadeShareSchema(ShareSchema):
    """A new link, which is shown this once."""

    link = fields.Str()


class ConsoleSchema(Schema):
    """An open console; its grant is share-NAME when it was opened by a link."""

    user = fields.Str()
    grant = fields.Str()
    open_s = fields.Float()


class MadeTokenSchema(TokenSchema):
    """A new access token with its secret, which is shown this once."""

    token = fields.Str()
