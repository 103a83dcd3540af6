"""The pages that administrators use: hosts, everybody's desktops, queues."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from flask import Blueprint, redirect, render_template, url_for
from werkzeug.wrappers import Response

from deskfleet.portal import actions
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem
from deskfleet.portal.fleet import HostView
from deskfleet.portal.services import services
from deskfleet.portal.views import checked
from deskfleet.portal.web import admin_only

admin = Blueprint("admin", __name__, url_prefix="/admin")


@dataclass(frozen=True, slots=True)
class HostRow:
    """A host with its GPUs counted; `gpus_free` counts what no live desktop holds."""

    view: HostView
    gpus: int
    gpus_free: int


@admin.get("/")
@admin_only
def overview() -> str:
    """Everything at once."""
    return render_template("admin.html", **_hosts(), **_sessions(), **_queues())


@admin.get("/hosts")
@admin_only
def hosts() -> str:
    """The hosts, as the overview asks for them again and again."""
    return render_template("_hosts.html", **_hosts())


@admin.get("/sessions")
@admin_only
def sessions() -> str:
    """Everybody's desktops that have not ended."""
    return render_template("_sessions.html", **_sessions())


@admin.get("/queues")
@admin_only
def queues() -> str:
    """The broker's queues."""
    return render_template("_queues.html", **_queues())


# A part that can't be read says so itself: the others may hold what explains it.
def _hosts() -> dict[str, object]:
    parts = services()
    try:
        views, live = parts.fleet.hosts(), parts.desktops.live()
    except Problem as problem:
        return {"hosts": [], "hosts_problem": problem.message}
    return {"hosts": host_rows(views, live), "hosts_problem": ""}


def _sessions() -> dict[str, object]:
    try:
        return {"sessions": services().desktops.live(), "sessions_problem": ""}
    except Problem as problem:
        return {"sessions": [], "sessions_problem": problem.message}


def _queues() -> dict[str, object]:
    return {"queues": services().fleet.queues()}


def host_rows(views: list[HostView], live: list[Desktop]) -> list[HostRow]:
    """Hosts with their GPUs counted. Pure."""
    held: Counter[str] = Counter()
    for desktop in live:
        held[desktop.host] += desktop.resources.gpus
    rows = []
    for view in views:
        offered = sum(gpu.offered for gpu in view.report.gpus) if view.report else 0
        rows.append(HostRow(view, offered, max(0, offered - held[view.name])))
    return rows


@admin.post("/hosts/<host>/drain")
@admin_only
def drain(host: str) -> Response:
    """Place nothing more on a host."""
    actions.drain(host, True)
    return redirect(url_for("admin.overview"), 303)


@admin.post("/hosts/<host>/undrain")
@admin_only
def undrain(host: str) -> Response:
    """Use a host again."""
    actions.drain(host, False)
    return redirect(url_for("admin.overview"), 303)


@admin.post("/sessions/<sid>/stop")
@admin_only
def stop(sid: str) -> Response:
    """Stop anybody's desktop."""
    actions.stop(checked(sid))
    return redirect(url_for("admin.overview"), 303)
