"""The HTTP API for administrators: queues, dead letters, everybody's desktops, health, and the audit."""

# flask-smorest comes without types; what its decorators wrap is checked all the same.
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from marshmallow import Schema, fields, validate

from deskfleet.portal import admin_actions
from deskfleet.portal.api import ApiBlueprint
from deskfleet.portal.api_schemas import Input, SessionSchema
from deskfleet.portal.audit import Entry, question
from deskfleet.portal.checks import Check, checks
from deskfleet.portal.dead_letters import Letter
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.fleet import QueueView, machines_on
from deskfleet.portal.history import Series, Span
from deskfleet.portal.services import services
from deskfleet.portal.session_list import Filter, Person, people
from deskfleet.portal.web import admin_only

_MOST = 1000
_MOST_NUMBER = 1 << 53


class _FilterSchema(Input):
    user = fields.Str(load_default="", validate=validate.Length(max=320))
    host = fields.Str(load_default="", validate=validate.Length(max=320))
    state = fields.Str(load_default="", validate=validate.Length(max=320))
    machine = fields.Str(load_default="", validate=validate.Length(max=320))
    text = fields.Str(load_default="", validate=validate.Length(max=320))


class StopAllSchema(_FilterSchema):
    """Which desktops shall be stopped, and how many the caller believes them to be."""

    count = fields.Int(strict=True, required=True, validate=validate.Range(1, _MOST_NUMBER))


class EverybodySchema(Schema):
    """Everybody's desktops that have not ended, oldest first: how many match, and the first of them."""

    count = fields.Int()
    sessions = fields.List(fields.Nested(SessionSchema))
    why = fields.Dict(keys=fields.Str(), values=fields.Str())


class StoppedSchema(Schema):
    """The desktops whose end was asked for."""

    sids = fields.List(fields.Str())


class HolderSchema(Schema):
    """A host that holds a machine's image, or is getting it; `state` is held, fetching, waiting or failed."""

    host = fields.Str()
    state = fields.Str()
    percent = fields.Int()
    detail = fields.Str()


class WhereSchema(Schema):
    """A machine of the catalogue, and where its image is. A silent host is not among them."""

    machine = fields.Str()
    sha256 = fields.Str()
    hosts = fields.List(fields.Nested(HolderSchema))


class SpanSchema(Input):
    """How far back."""

    span = fields.Enum(Span, by_value=True, load_default=Span.DAY)


class SeriesSchema(Schema):
    """Figures at regular times (UNIX seconds, `step` seconds apart); null is unknown. Memory and disk in MiB."""

    step = fields.Int()
    times = fields.List(fields.Int())
    figures = fields.Dict(keys=fields.Str(), values=fields.List(fields.Float(allow_none=True)))


class PersonSchema(Schema):
    """Somebody who is signed in or has desktops."""

    user = fields.Str()
    logins = fields.Int()
    running = fields.Int()
    waiting = fields.Int()


class QueueStatsSchema(Schema):
    """What the broker's management API tells of a queue; null is unknown. Rates are messages a second."""

    unacked = fields.Int(allow_none=True)
    in_rate = fields.Float(allow_none=True)
    out_rate = fields.Float(allow_none=True)
    oldest_s = fields.Float(allow_none=True)


class QueueSchema(Schema):
    """A queue; figures are null while they are unknown, `problem` says why. `busy_s` is for how many seconds nobody
    has seen it empty."""

    name = fields.Str()
    purpose = fields.Str()
    messages = fields.Int(allow_none=True)
    consumers = fields.Int(allow_none=True)
    problem = fields.Str()
    alarm = fields.Bool()
    busy_s = fields.Float(allow_none=True)
    stats = fields.Nested(QueueStatsSchema)


class PageSchema(Input):
    """How many, and older than which number (0: the newest)."""

    limit = fields.Int(load_default=100, validate=validate.Range(1, _MOST))
    before = fields.Int(load_default=0, validate=validate.Range(0, _MOST_NUMBER))


class LetterSchema(Schema):
    """A dead letter: in which queue it died, and why (rejected, expired, delivery_limit, maxlen)."""

    number = fields.Int()
    name = fields.Str()
    died_at = fields.Float()
    queue = fields.Str()
    cause = fields.Str()
    type = fields.Str()
    sender = fields.Str()
    sid = fields.Str()
    size = fields.Int()


class WholeLetterSchema(LetterSchema):
    """A dead letter with its body as text; `obstacle` says why it can't be sent again ("": it can)."""

    text = fields.Str()
    obstacle = fields.Str()


class DiscardSchema(Input):
    """All up to this number, and how many the caller believes them to be."""

    count = fields.Int(strict=True, required=True, validate=validate.Range(1, _MOST_NUMBER))
    up_to = fields.Int(strict=True, required=True, validate=validate.Range(1, _MOST_NUMBER))


class DiscardedSchema(Schema):
    """How many were discarded."""

    discarded = fields.Int()


class CheckSchema(Schema):
    """How a part of the service is (level: good, warn, bad, unknown), and what to do."""

    name = fields.Str()
    level = fields.Str()
    sentence = fields.Str()
    advice = fields.Str()


class AuditQuerySchema(Input):
    """Which lines of the audit; days are YYYY-MM-DD (UTC), both included."""

    limit = fields.Int(load_default=200, validate=validate.Range(1, _MOST))
    before = fields.Int(load_default=0, validate=validate.Range(0, _MOST_NUMBER))
    actor = fields.Str(load_default="")
    action = fields.Str(load_default="")
    text = fields.Str(load_default="")
    since = fields.Str(load_default="")
    until = fields.Str(load_default="")


class AuditSchema(Schema):
    """One line of the audit."""

    number = fields.Int()
    at = fields.Float()
    actor = fields.Str()
    address = fields.Str()
    action = fields.Str()
    target = fields.Str()
    detail = fields.Str()


blueprint = ApiBlueprint("api_admin", __name__, url_prefix="/api/v1", description="For administrators")


@blueprint.get("/images")
@admin_only
@blueprint.response(200, WhereSchema(many=True))
def images() -> list[dict[str, object]]:
    """Which hosts hold which machine. For administrators."""
    known = services().catalogue.machines()
    where = machines_on(services().fleet.hosts(), known)
    return [
        {
            "machine": name,
            "sha256": known[name].sha256,
            "hosts": [
                {"host": host, "state": image.state, "percent": image.percent, "detail": image.detail}
                for host, image in where[name]
            ],
        }
        for name in sorted(known)
    ]


@blueprint.get("/hosts/<host>/history")
@admin_only
@blueprint.arguments(SpanSchema, location="query")
@blueprint.response(200, SeriesSchema)
def history(query: dict[str, Span], host: str) -> Series:
    """What a host had over time. For administrators."""
    return services().history.of(services().fleet.host(host).name, query["span"])


@blueprint.get("/everybody/sessions")
@admin_only
@blueprint.arguments(_FilterSchema, location="query")
@blueprint.response(200, EverybodySchema)
def everybody(query: dict[str, str]) -> dict[str, Any]:
    """Everybody's desktops, narrowed down; the first 1,000, with why those wait that do. For administrators."""
    which, desktops = Filter.of(query), services().desktops
    found = [desktop for desktop in desktops.live() if which.matches(desktop)]
    shown = found[:_MOST]
    return {"count": len(found), "sessions": shown, "why": desktops.why(shown)}


@blueprint.post("/everybody/sessions/stop")
@admin_only
@blueprint.arguments(StopAllSchema)
@blueprint.response(202, StoppedSchema)
def stop_all(asked: dict[str, Any]) -> dict[str, Any]:
    """Stop every desktop that matches, when they are as many as `count` says. For administrators."""
    count = asked.pop("count")
    stopped: list[Desktop] = admin_actions.stop_all(Filter.of(asked), count)
    return {"sids": [desktop.sid for desktop in stopped]}


@blueprint.get("/everybody")
@admin_only
@blueprint.response(200, PersonSchema(many=True))
def people_now() -> list[Person]:
    """Who is signed in or has desktops: counts only. For administrators."""
    parts = services()
    return people(parts.logins.now(), parts.desktops.live())


@blueprint.get("/queues")
@admin_only
@blueprint.response(200, QueueSchema(many=True))
def queues() -> list[QueueView]:
    """The queues of the broker. For administrators."""
    return services().fleet.queues()


@blueprint.get("/dead-letters")
@admin_only
@blueprint.arguments(PageSchema, location="query")
@blueprint.response(200, LetterSchema(many=True))
def letters(query: dict[str, int]) -> list[Letter]:
    """Messages that nobody could take, newest first. For administrators."""
    return services().letters.newest(query["limit"], query["before"])


@blueprint.get("/dead-letters/<name>")
@admin_only
@blueprint.response(200, WholeLetterSchema)
def letter(name: str) -> dict[str, Any]:
    """One of them, with its body. For administrators."""
    found = services().letters.find(name)
    return {**asdict(found), "text": found.text, "obstacle": services().letters.obstacle(found)}


@blueprint.post("/dead-letters/<name>/replay")
@admin_only
@blueprint.response(204)
def replay(name: str) -> None:
    """Send it again to where it was on its way to. For administrators."""
    admin_actions.replay(name)


@blueprint.delete("/dead-letters/<name>")
@admin_only
@blueprint.response(204)
def discard(name: str) -> None:
    """Forget it. For administrators."""
    admin_actions.discard(name)


@blueprint.post("/dead-letters/discard")
@admin_only
@blueprint.arguments(DiscardSchema)
@blueprint.response(200, DiscardedSchema)
def discard_all(asked: dict[str, int]) -> dict[str, int]:
    """Forget all up to a number, when they are as many as `count` says. For administrators."""
    return {"discarded": admin_actions.discard_all(asked["count"], asked["up_to"])}


@blueprint.get("/health")
@admin_only
@blueprint.response(200, CheckSchema(many=True))
def health() -> list[Check]:
    """How each part of the service is, and what to do where it does not work. For administrators."""
    return checks(services())


@blueprint.get("/audit")
@admin_only
@blueprint.arguments(AuditQuerySchema, location="query")
@blueprint.response(200, AuditSchema(many=True))
def audit(query: dict[str, Any]) -> list[Entry]:
    """The lines of the audit that are meant, newest first; go on with `before`, the last number. For administrators."""
    try:
        which = question(query)
    except ValueError:
        raise Problem(Refused.BAD_FIELDS, "A day is written like 2026-01-31.") from None
    return services().audit.newest(query["limit"], which, query["before"])
