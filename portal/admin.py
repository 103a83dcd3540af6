"""The administrator's page: hosts, sessions and queues, and what can be done about them."""

from __future__ import annotations

from flask import Blueprint, redirect, render_template, url_for
from werkzeug.wrappers import Response as WerkzeugResponse

from deskfleet.portal import actions
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.services import services
from deskfleet.portal.web import admin_only
from deskfleet.schemas.tickets import SID

admin = Blueprint("admin", __name__, url_prefix="/admin")


def _fleet() -> dict[str, object]:
    parts = services()
    try:
        hosts, live, sure = parts.fleet.hosts(), parts.desktops.live(), True
    except Problem:
        hosts, live, sure = [], [], False  # said on the page; the queues may still be known
    return {"hosts": hosts, "desktops": live, "queues": parts.fleet.queues(), "sure": sure}


@admin.get("/")
@admin_only
def page() -> str:
    return render_template("admin.html", **_fleet())


@admin.get("/part")
@admin_only
def part() -> str:
    return render_template("_admin.html", **_fleet())


@admin.post("/hosts/<host>/drain")
@admin_only
def drain(host: str) -> WerkzeugResponse:
    actions.drain(host, True)
    return redirect(url_for("admin.page"))


@admin.post("/hosts/<host>/undrain")
@admin_only
def undrain(host: str) -> WerkzeugResponse:
    actions.drain(host, False)
    return redirect(url_for("admin.page"))


@admin.post("/sessions/<sid>/stop")
@admin_only
def stop(sid: str) -> WerkzeugResponse:
    if not SID.fullmatch(sid):
        raise Problem(Refused.NO_SUCH_DESKTOP)
    actions.stop(sid)
    return redirect(url_for("admin.page"))
