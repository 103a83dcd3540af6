"""The pages that people use: sign in, launch, progress, my desktops, the desktop itself."""

from __future__ import annotations

import re

from flask import Blueprint, Response, make_response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as WerkzeugResponse

from deskfleet.portal import actions
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.launching import Wish, lifetimes, offered
from deskfleet.portal.services import services
from deskfleet.portal.web import own_desktop, person, public, someone
from deskfleet.portal.words import ladder
from deskfleet.schemas.machine import GpuPolicy, Machine
from deskfleet.schemas.tickets import SID

pages = Blueprint("pages", __name__)

#: How long after the click the progress page asks often: a desktop is usually there before that.
_IMPATIENT_S = 3.0
_NEXT = re.compile(r"/(?![/\\])[^\s\\]*")


def _checked(sid: str) -> str:
    if not SID.fullmatch(sid):
        raise Problem(Refused.NO_SUCH_DESKTOP)
    return sid


@pages.get("/")
def home() -> WerkzeugResponse:
    return redirect(url_for("pages.launch"))


@pages.route("/login", methods=["GET", "POST"])
@public
def login() -> WerkzeugResponse | str | tuple[str, int]:
    wanted = request.values.get("next", "")
    target = wanted if _NEXT.fullmatch(wanted) else "/"
    if request.method == "GET":
        return redirect(target) if someone() else render_template("login.html", next=target)
    try:
        actions.log_in(request.form.get("user", ""), request.form.get("password", ""))
    except Problem as problem:
        text = render_template("login.html", next=target, problem=problem, user=request.form.get("user", ""))
        return text, int(problem.status)
    return redirect(target)


@pages.post("/logout")
def logout() -> WerkzeugResponse:
    actions.log_out()
    return redirect(url_for("pages.login"))


@pages.get("/launch")
def launch() -> str:
    return render_template("launch.html", machines=offered(services().catalogue.machines(), person()))


def _machine(name: str) -> Machine:
    machine = services().catalogue.machines().get(name)
    who = person()
    if machine is None or not machine.allows(who.user, who.groups):
        raise Problem(Refused.UNKNOWN_MACHINE)
    return machine


def _form(machine: Machine, problem: Problem | None = None) -> str:
    parts = services()
    return render_template(
        "machine.html",
        machine=machine,
        seal=parts.seals.mint(person().user, machine.name),
        sizes={
            "cpus": ladder(machine.cpus.min, machine.cpus.default, machine.cpus.max),
            "memory_mib": ladder(machine.memory_mib.min, machine.memory_mib.default, machine.memory_mib.max),
            "disk_gib": ladder(machine.disk_gib.min, machine.disk_gib.default, machine.disk_gib.max),
        },
        gpus={GpuPolicy.NEVER: [], GpuPolicy.OPTIONAL: [0, 1], GpuPolicy.REQUIRED: [1]}[machine.gpu],
        lifetimes=lifetimes(parts.settings),
        lifetime=parts.settings.lifetime_default_s,
        problem=problem,
    )


def _number(name: str) -> int | None:
    text = request.form.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Problem(Refused.BAD_FIELDS, details=[f"{name}: must be a number"])
    return int(text)


@pages.route("/launch/<name>", methods=["GET", "POST"])
def machine(name: str) -> WerkzeugResponse | str | tuple[str, int]:
    wanted = _machine(name)
    if request.method == "GET":
        return _form(wanted)
    try:
        sid = services().seals.open(request.form.get("seal", ""), person().user, name)
        wish = Wish(
            machine=name,
            cpus=_number("cpus"),
            memory_mib=_number("memory_mib"),
            disk_gib=_number("disk_gib"),
            gpus=_number("gpus"),
            persistent=request.form.get("persistent") == "yes",
            lifetime_s=_number("lifetime_s"),
        )
        actions.launch(wish, sid, "page")
    except Problem as problem:
        return _form(wanted, problem), int(problem.status)
    return redirect(url_for("pages.progress", sid=sid))


@pages.get("/progress/<sid>")
def progress(sid: str) -> WerkzeugResponse | str:
    desktop = own_desktop(_checked(sid))
    if desktop.running:
        return redirect(url_for("pages.desktop", sid=sid))
    return render_template("progress.html", story=services().desktops.story(desktop), pause="150ms")


@pages.get("/progress/<sid>/part")
def progress_part(sid: str) -> Response:
    desktop = own_desktop(_checked(sid))
    parts = services()
    fresh = parts.clock.wall() - desktop.created_at < _IMPATIENT_S
    story = parts.desktops.story(desktop)
    response = make_response(render_template("_progress.html", story=story, pause="150ms" if fresh else "1s"))
    if desktop.running:
        response.headers["HX-Redirect"] = url_for("pages.desktop", sid=sid)
    return response


@pages.get("/desktops")
def desktops() -> str:
    found, sure = services().desktops.of_user(person().user)
    return render_template("desktops.html", desktops=found, sure=sure)


@pages.get("/desktops/part")
def desktops_part() -> str:
    found, sure = services().desktops.of_user(person().user)
    return render_template("_desktops.html", desktops=found, sure=sure)


@pages.post("/desktops/<sid>/stop")
def stop(sid: str) -> WerkzeugResponse:
    actions.stop(_checked(sid))
    return redirect(url_for("pages.desktops"))


@pages.get("/desktop/<sid>")
def desktop(sid: str) -> WerkzeugResponse | str:
    found = own_desktop(_checked(sid))
    if found.over:
        return redirect(url_for("pages.desktops"))
    if not found.running and found.state != "stopping":
        return redirect(url_for("pages.progress", sid=sid))
    return render_template("desktop.html", desktop=found)
