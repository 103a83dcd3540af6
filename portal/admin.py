"""The administrator's pages: the fleet at a glance, and each host."""

from __future__ import annotations

from flask import Blueprint, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from deskfleet.portal import actions
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.fleet import LONGEST_TEXT, gpus_held, images_on
from deskfleet.portal.languages import gettext
from deskfleet.portal.services import services
from deskfleet.portal.views import checked
from deskfleet.portal.web import admin_only
from deskfleet.schemas.template import TemplateOrder
from deskfleet.schemas.topology import SCHEDULER_COMMANDS

Answer = str | tuple[str, int] | Response

admin = Blueprint("admin", __name__, url_prefix="/admin")


@admin.get("/")
@admin_only
def page() -> str:
    """Everything at once."""
    return render_template("admin.html", **_fleet())


@admin.get("/part")
@admin_only
def part() -> str:
    """The same without its frame, as the page asks for it again and again."""
    return render_template("_admin.html", **_fleet())


def _fleet() -> dict[str, object]:
    parts = services()
    try:
        hosts, live, sure = parts.fleet.hosts(), parts.desktops.live(), True
    except Problem:
        hosts, live, sure = [], [], False  # said on the page; the queues may still be known, and explain it
    queues = parts.fleet.queues()
    return {
        "hosts": hosts,
        "images": {host.name: images_on(host.report, parts.catalogue.machines()) for host in hosts},
        "gpus_held": gpus_held(live),
        "desktops": live,
        "queues": queues,
        "no_scheduler": any(queue.name == SCHEDULER_COMMANDS and queue.consumers == 0 for queue in queues),
        "waiting_here": parts.outbox.waiting(),
        "connected": parts.bus.connected,
        "sure": sure,
    }


@admin.get("/hosts/<host>")
@admin_only
def host_page(host: str) -> str:
    """One host, and what can be done with it."""
    return _host_page(host)


def _host_page(host: str, problem: Problem | None = None) -> str:
    found = services().fleet.host(host)
    desktops = [desktop for desktop in services().desktops.live() if desktop.host == host]
    images = images_on(found.report, services().catalogue.machines())
    return render_template(
        "host.html", host=found, images=images, desktops=desktops, problem=problem, longest=LONGEST_TEXT
    )


@admin.post("/hosts/<host>/drain")
@admin_only
def drain(host: str) -> Answer:
    """Place nothing more on a host, and tell the people on it why."""
    try:
        actions.drain(host, True, request.form.get("text", ""))
    except Problem as problem:
        if problem.reason is not Refused.BAD_FIELDS:
            raise
        return _host_page(host, problem), int(problem.status)
    return redirect(url_for("admin.page"), 303)


@admin.post("/hosts/<host>/undrain")
@admin_only
def undrain(host: str) -> Response:
    """Use a host again."""
    actions.drain(host, False)
    return redirect(url_for("admin.page"), 303)


@admin.post("/hosts/<host>/templates/<key>")
@admin_only
def order_template(host: str, key: str) -> Answer:
    """Have a template made anew, or removed."""
    try:
        order = TemplateOrder(request.form.get("order", ""))
    except ValueError:
        raise Problem(Refused.BAD_FIELDS) from None
    actions.order_template(host, key, order)
    return redirect(url_for("admin.host_page", host=host), 303)


@admin.post("/hosts/<host>/declare-dead")
@admin_only
def declare_dead(host: str) -> Answer:
    """Give up what a host runs. Its name must be typed, so that no slip of the hand does it."""
    if request.form.get("name") != host:
        message = gettext("Nothing was done: the name that was typed is not this host's.")
        problem = Problem(Refused.BAD_FIELDS, message)
        return _host_page(host, problem), int(problem.status)
    actions.declare_dead(host)
    return redirect(url_for("admin.page"), 303)


@admin.post("/sessions/<sid>/stop")
@admin_only
def stop(sid: str) -> Response:
    """Stop anybody's desktop."""
    actions.stop(checked(sid))
    return redirect(url_for("admin.page"), 303)
