"""The administrator's lists: desktops, people, machines, how the service is, and who did what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flask import Blueprint, Response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as WerkzeugResponse

from deskfleet.portal import admin_actions
from deskfleet.portal.audit import MOST_EXPORTED, Question, as_csv, as_json_lines, question
from deskfleet.portal.checks import checks
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.fleet import machines_on
from deskfleet.portal.languages import gettext
from deskfleet.portal.launching import offered
from deskfleet.portal.services import services
from deskfleet.portal.session_list import MOST_SHOWN, Filter, people
from deskfleet.portal.web import admin_only, client_address, person, whole
from deskfleet.portal.words import STATES

Answer = str | tuple[str, int] | WerkzeugResponse

lists = Blueprint("lists", __name__, url_prefix="/admin")

_AUDIT_PAGE = 200
_LIVE = ("queued", "assigned", "starting", "running", "stopping", "unknown")


@lists.get("/sessions")
@admin_only
def sessions() -> str:
    """Everybody's desktops, narrowed down."""
    return _sessions(Filter.of(request.args))


@lists.get("/sessions/part")
@admin_only
def sessions_part() -> str:
    """The rows of the same."""
    return render_template("_sessions.html", **_found(Filter.of(request.args)))


def _found(which: Filter) -> dict[str, Any]:
    desktops = services().desktops
    try:
        every, sure = desktops.live(), True
    except Problem:
        every, sure = [], False
    found = [desktop for desktop in every if which.matches(desktop)]
    shown = found[:MOST_SHOWN]
    return {
        "which": which,
        "desktops": shown,
        "count": len(found),
        "all": len(every),
        "why": desktops.why(shown),
        "sure": sure,
        "users": _options(desktop.user for desktop in every),
        "hosts": _options(desktop.host for desktop in every if desktop.host),
        "machines": _options(desktop.machine for desktop in every),
        "states": [(name, gettext(STATES[name])) for name in _LIVE],
    }


def _options(values: Iterable[str]) -> list[tuple[str, str]]:
    return [(value, value) for value in sorted(set(values))]


def _sessions(which: Filter, problem: Problem | None = None) -> str:
    return render_template("sessions.html", problem=problem, **_found(which))


@lists.post("/sessions/stop-all")
@admin_only
def stop_all() -> Answer:
    """Stop every desktop that matches. Their number must be typed, so that no slip of the hand does it."""
    which = Filter.of(request.form)
    try:
        admin_actions.stop_all(which, whole(request.form, "typed", -1))
    except Problem as problem:
        return _sessions(which, problem), int(problem.status)
    given: dict[str, Any] = {**which.given}
    return redirect(url_for("lists.sessions", **given), 303)


@lists.get("/people")
@admin_only
def people_page() -> str:
    """Who is signed in or has desktops: counts only."""
    return render_template("people.html", **_people())


@lists.get("/people/part")
@admin_only
def people_part() -> str:
    """The rows of the same."""
    return render_template("_people.html", **_people())


def _people() -> dict[str, Any]:
    parts = services()
    try:
        desktops, sure = parts.desktops.live(), True
    except Problem:
        desktops, sure = [], False
    return {"people": people(parts.logins.now(), desktops), "sure": sure}


@lists.get("/machines")
@admin_only
def machines() -> str:
    """Which host has which image."""
    return render_template("machines.html", **_machines())


@lists.get("/machines/part")
@admin_only
def machines_part() -> str:
    """The rows of the same."""
    return render_template("_machines.html", **_machines())


def _machines() -> dict[str, Any]:
    parts = services()
    known = parts.catalogue.machines()
    try:
        hosts, sure = parts.fleet.hosts(), True
    except Problem:
        hosts, sure = [], False
    return {
        "machines": [known[name] for name in sorted(known)],
        "where": machines_on(hosts, known),
        "mine": {machine.name for machine in offered(known, person())},
        "silent": [host.name for host in hosts if host.report is None],
        "sure": sure,
    }


@lists.get("/health")
@admin_only
def health() -> str:
    """Whether each part works, and what to do where it does not."""
    return render_template("health.html", checks=checks(services()))


@lists.get("/health/part")
@admin_only
def health_part() -> str:
    """The rows of the same."""
    return render_template("_health.html", checks=checks(services()))


@lists.get("/audit")
@admin_only
def audit() -> Answer:
    """Who did what, newest first."""
    problem, which = None, Question()
    try:
        which = _question()
    except Problem as refused:
        problem = refused
    before = whole(request.args, "before")
    trail = services().audit
    entries = trail.newest(_AUDIT_PAGE, which, before)
    text = render_template(
        "audit.html",
        entries=entries,
        actions=trail.actions(),
        given={name: value for name, value in request.args.items() if name in _FIELDS},
        older=entries[-1].number if len(entries) == _AUDIT_PAGE else 0,
        before=before,
        problem=problem,
        most=MOST_EXPORTED,
    )
    return (text, int(problem.status)) if problem else text


_FIELDS = ("actor", "action", "text", "since", "until")


def _question() -> Question:
    try:
        return question(request.args)
    except ValueError:
        raise Problem(Refused.BAD_FIELDS, gettext("A day is written like 2026-01-31.")) from None


@lists.get("/audit.<form>")
@admin_only
def export(form: str) -> Response:
    """The same as a file: csv or jsonl."""
    return audit_file(_question(), form)


def audit_file(which: Question, form: str) -> Response:
    """Lines of the audit as a file that is written while it is read. Raises Problem."""
    if form not in ("csv", "jsonl"):
        raise Problem(Refused.NOT_FOUND)
    trail = services().audit
    trail.note(person().user, client_address(), "export", "audit", form)
    entries = trail.every(which, MOST_EXPORTED)
    lines = as_csv(entries) if form == "csv" else as_json_lines(entries)
    kind = "text/csv" if form == "csv" else "application/jsonl"
    answer = Response(lines, mimetype=kind)
    answer.headers["Content-Disposition"] = f'attachment; filename="audit.{form}"'
    return answer
