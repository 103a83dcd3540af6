"""The HTTP API, /api/v1: what pages can do, for programs. It describes itself at /api/v1/openapi.json."""

# flask-smorest comes without types; what its decorators wrap is checked all the same.
# mypy: disallow-untyped-decorators=False, disallow-subclassing-any=False

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from flask import Flask, Response, jsonify, url_for
from flask_smorest import Api, Blueprint  # type: ignore[import-untyped]
from marshmallow import ValidationError
from webargs.flaskparser import FlaskParser

from deskfleet.portal import actions, api_schemas, words
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.fleet import HostView, images_on
from deskfleet.portal.launching import Wish, offered
from deskfleet.portal.logins import TokenInfo
from deskfleet.portal.services import services
from deskfleet.portal.shares import Share
from deskfleet.portal.web import admin_only, changes_nothing, own_desktop, person, public
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import Console
from deskfleet.schemas.template import TemplateOrder

_SID = re.compile(r"[0-9a-f]{32}")
_NOBODY_KNOWS = {
    "outlook": "unknown",
    "host": "",
    "place": 0,
    "estimate_s": None,
    "why": "",
    "largest": None,
    "instant": False,
}


class _Parser(FlaskParser):
    """Faults in a request come out as the portal's own refusals."""

    def handle_error(self, error: ValidationError, *_: Any, **__: Any) -> NoReturn:
        raise Problem(Refused.BAD_FIELDS, details=_lines(error.messages))

    def _handle_invalid_json_error(self, *_: Any, **__: Any) -> NoReturn:
        raise Problem(Refused.BAD_REQUEST, "The body of this request is not JSON.")


def _lines(messages: Any, where: str = "") -> list[str]:
    """marshmallow's tree of messages as lines "field: what is wrong"; the first level is where the field stood."""
    if isinstance(messages, Mapping):
        return [
            line
            for key, value in messages.items()
            for line in _lines(value, where if key in ("json", "query", "_schema") else f"{where}.{key}".lstrip("."))
        ]
    if isinstance(messages, list):
        return [line for message in messages for line in _lines(message, where)]
    return [f"{where}: {messages}" if where else str(messages)]


class _Api(Api):
    ERROR_SCHEMA = api_schemas.ErrorSchema

    def _register_error_handlers(self) -> None:
        """None of its own: the application answers pages and programs from one table."""


class ApiBlueprint(Blueprint):
    """Calls whose faults come out as the portal's own refusals."""

    ARGUMENTS_PARSER = _Parser()


blueprint = ApiBlueprint("api", __name__, url_prefix="/api/v1", description="Desktops and the fleet")


def register(app: Flask, *more: ApiBlueprint, root: str = "") -> None:
    """Add the API, with further calls, and its description to an application below the path `root` of its host."""
    api = _Api(
        spec_kwargs={
            "title": "Deskfleet",
            "version": "v1",
            "openapi_version": "3.0.3",
            "security": [{"bearer": []}, {"cookie": []}],
            **({"servers": [{"url": root}]} if root else {}),
        }
    )
    api.init_app(app)
    schemes = api.spec.components
    schemes.security_scheme("bearer", {"type": "http", "scheme": "bearer"})
    schemes.security_scheme("cookie", {"type": "apiKey", "in": "cookie", "name": app.config["SESSION_COOKIE_NAME"]})
    for calls in (blueprint, *more):
        api.register_blueprint(calls)

    @app.get("/api/v1/openapi.json", endpoint="openapi")
    @public
    def _openapi() -> Response:
        return jsonify(api.spec.to_dict())


def _desktop(sid: str) -> Desktop:
    if not _SID.fullmatch(sid):
        raise Problem(Refused.NO_SUCH_DESKTOP)
    return own_desktop(sid)


@blueprint.get("/machines")
@blueprint.response(200, api_schemas.MachineSchema(many=True))
def machines() -> list[Machine]:
    """The machines that the caller may start."""
    return offered(services().catalogue.machines(), person())


@blueprint.post("/sessions")
@blueprint.arguments(api_schemas.LaunchSchema)
@blueprint.response(202, api_schemas.SessionSchema)
@blueprint.alt_response(200, schema=api_schemas.SessionSchema, description="The same request came before")
def launch(asked: tuple[str, Wish]) -> Any:
    """Start a desktop. The answer comes when the request is stored safely; follow it by its sid."""
    sid, wish = asked
    sid = sid or secrets.token_hex(16)
    _, new = actions.launch(wish, sid, "api")
    return own_desktop(sid), 202 if new else 200


@blueprint.post("/placements")
@changes_nothing
@blueprint.arguments(api_schemas.PlacementSchema)
@blueprint.response(200, api_schemas.ForecastSchema)
def placement(wish: Wish) -> dict[str, Any]:
    """What would become of a launch if it were asked for now. Nothing is started, and no place is kept."""
    message, forecast = actions.foresee(wish)
    return {
        "machine": message.machine,
        "resources": message.resources,
        "sentence": words.forecast(forecast),
        **(asdict(forecast) if forecast else _NOBODY_KNOWS),
        "verdicts": forecast.verdicts if forecast else (),
    }


@blueprint.get("/sessions")
@blueprint.response(200, api_schemas.SessionListSchema)
def sessions() -> dict[str, Any]:
    """The caller's desktops."""
    found, complete = services().desktops.of_user(person().user)
    return {"sessions": found, "complete": complete}


@blueprint.get("/sessions/<sid>")
@blueprint.response(200, api_schemas.StorySchema)
def session(sid: str) -> dict[str, Any]:
    """One desktop and how it got where it is."""
    story = services().desktops.story(_desktop(sid))
    return {
        **asdict(story.desktop),
        "place": story.place,
        "estimate_s": story.estimate_s,
        "verdicts": [{"host": host, "reason": reason, "sentence": text} for host, reason, text in story.verdicts],
        "steps": story.steps,
    }


@blueprint.post("/sessions/<sid>/stop")
@blueprint.response(200, api_schemas.SessionSchema)
def stop(sid: str) -> Desktop:
    """Stop a desktop. Asking again changes nothing."""
    return actions.stop(_desktop(sid).sid)


@blueprint.post("/sessions/<sid>/extend")
@blueprint.arguments(api_schemas.ExtendSchema)
@blueprint.response(202, api_schemas.SessionSchema)
def extend(asked: dict[str, int], sid: str) -> Desktop:
    """Let a running desktop last longer, up to what the site allows. The answer shows it as it was when asked."""
    return actions.extend(_desktop(sid).sid, asked["extra_s"])


@blueprint.post("/sessions/<sid>/ticket")
@blueprint.response(200, api_schemas.TicketSchema)
def ticket(sid: str) -> dict[str, object]:
    """A ticket for the console of a running desktop."""
    return actions.ticket(_desktop(sid).sid)


@blueprint.get("/sessions/<sid>/shares")
@blueprint.response(200, api_schemas.ShareSchema(many=True))
def shares(sid: str) -> list[Share]:
    """The links that open a desktop, without their secrets."""
    return services().shares.of(_desktop(sid).sid)


@blueprint.post("/sessions/<sid>/shares")
@blueprint.arguments(api_schemas.NewShareSchema)
@blueprint.response(201, api_schemas.MadeShareSchema)
def make_share(asked: dict[str, Any], sid: str) -> dict[str, Any]:
    """A link by which others may use the caller's desktop; the link is in this answer and nowhere else."""
    secret, made = actions.share(
        _desktop(sid).sid, asked["audience"], asked["lifetime_s"], asked["passphrase"], watch=asked["mode"] == "watch"
    )
    link = services().settings.origin + url_for("sharing.link", link=secret)
    return {**asdict(made), "link": link}


@blueprint.delete("/sessions/<sid>/shares/<name>")
@blueprint.response(204)
def drop_share(sid: str, name: str) -> None:
    """Take a link back; consoles that were opened by it are cut."""
    actions.unshare(_desktop(sid).sid, name)


@blueprint.get("/sessions/<sid>/consoles")
@blueprint.response(200, api_schemas.ConsoleSchema(many=True))
def consoles(sid: str) -> list[Console]:
    """Who has a desktop open, as told a moment ago. Ask again for what is true now."""
    return services().grants.consoles(_desktop(sid).sid)


@blueprint.get("/hosts")
@admin_only
@blueprint.response(200, api_schemas.HostSchema(many=True))
def hosts() -> list[HostView]:
    """The hosts. For administrators."""
    return services().fleet.hosts()


@blueprint.get("/hosts/<host>")
@admin_only
@blueprint.response(200, api_schemas.OneHostSchema)
def one_host(host: str) -> dict[str, object]:
    """One host, and the images that it holds or fetches. For administrators."""
    found = services().fleet.host(host)
    shown = {
        name: getattr(found, name) for name in ("name", "draining", "dead", "message", "seen_s", "guests", "report")
    }
    return {**shown, "images": images_on(found.report, services().catalogue.machines())}


@blueprint.post("/hosts/<host>/drain")
@admin_only
@blueprint.arguments(api_schemas.DrainSchema)
@blueprint.response(204)
def drain(asked: dict[str, str], host: str) -> None:
    """Place nothing more on a host; what runs there goes on. The text is for the people there. For administrators."""
    actions.drain(host, True, asked["text"])


@blueprint.post("/hosts/<host>/undrain")
@admin_only
@blueprint.response(204)
def undrain(host: str) -> None:
    """Place desktops on a host again. For administrators."""
    actions.drain(host, False)


@blueprint.post("/hosts/<host>/templates/<key>")
@admin_only
@blueprint.arguments(api_schemas.TemplateOrderSchema)
@blueprint.response(204)
def order_template(asked: dict[str, TemplateOrder], host: str, key: str) -> None:
    """Have a host's template made anew, or removed; what was forked from it runs on. For administrators."""
    actions.order_template(host, key, asked["order"])


@blueprint.post("/hosts/<host>/declare-dead")
@admin_only
@blueprint.response(204)
def declare_dead(host: str) -> None:
    """Give up what a host runs. Only when it is surely off or cut from everything. For administrators."""
    actions.declare_dead(host)


@blueprint.get("/tokens")
@blueprint.response(200, api_schemas.TokenSchema(many=True))
def tokens() -> list[TokenInfo]:
    """The caller's access tokens, without their secrets. Not by a token."""
    return actions.tokens()


@blueprint.post("/tokens")
@blueprint.arguments(api_schemas.NewTokenSchema)
@blueprint.response(201, api_schemas.MadeTokenSchema)
def make_token(asked: dict[str, Any]) -> dict[str, Any]:
    """A new access token; its secret is in this answer and nowhere else. Not by a token."""
    secret, info = actions.make_token(asked["label"], asked["days"], asked["scopes"])
    return {**asdict(info), "token": secret}


@blueprint.delete("/tokens/<name>")
@blueprint.response(204)
def drop_token(name: str) -> None:
    """Remove one of the caller's access tokens; it is worth nothing from then on. Not by a token."""
    actions.drop_token(name)
