"""The administrator's pages about queues, and about the messages that nobody could take."""

from __future__ import annotations

from flask import Blueprint, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from deskfleet.portal import admin_actions
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.services import services
from deskfleet.portal.web import admin_only, whole

Answer = str | tuple[str, int] | Response

queues = Blueprint("queues", __name__, url_prefix="/admin/queues")


@queues.get("/")
@admin_only
def page() -> str:
    """The queues and the newest dead letters."""
    return _page()


@queues.get("/part")
@admin_only
def part() -> str:
    """What changes of it."""
    return render_template("_queues.html", **_found())


def _found() -> dict[str, object]:
    parts = services()
    before = whole(request.args, "before")
    letters = parts.letters.newest(before=before)
    return {
        "queues": parts.fleet.queues(),
        "managed": parts.settings.broker_management is not None,
        "letters": letters,
        "count": parts.letters.count(),
        "older": letters[-1].number if letters and len(letters) == 100 else 0,
        "before": before,
    }


def _page(problem: Problem | None = None) -> str:
    return render_template("queues.html", problem=problem, **_found())


@queues.get("/dead/<name>")
@admin_only
def letter(name: str) -> str:
    """One dead letter, and what can be done with it."""
    return _letter(name)


def _letter(name: str, problem: Problem | None = None) -> str:
    letters = services().letters
    found = letters.find(name)
    return render_template("letter.html", letter=found, obstacle=letters.obstacle(found), problem=problem)


@queues.post("/dead/<name>/replay")
@admin_only
def replay(name: str) -> Answer:
    """Send a dead letter again."""
    try:
        admin_actions.replay(name)
    except Problem as problem:
        if problem.reason is Refused.NO_SUCH_LETTER:
            raise
        return _letter(name, problem), int(problem.status)
    return redirect(url_for("queues.page"), 303)


@queues.post("/dead/<name>/discard")
@admin_only
def discard(name: str) -> Answer:
    """Forget a dead letter. The first letters of its name must be typed, so that no slip of the hand does it."""
    if request.form.get("typed") != name[:4]:
        problem = Problem(Refused.NOT_CONFIRMED)
        return _letter(name, problem), int(problem.status)
    admin_actions.discard(name)
    return redirect(url_for("queues.page"), 303)


@queues.post("/dead/discard-all")
@admin_only
def discard_all() -> Answer:
    """Forget all dead letters that the page showed. Their number must be typed."""
    try:
        admin_actions.discard_all(_number("typed"), _number("up_to"))
    except Problem as problem:
        return _page(problem), int(problem.status)
    return redirect(url_for("queues.page"), 303)


def _number(field: str) -> int:
    """A number of a form; one that is none never fits."""
    return whole(request.form, field, -1)
