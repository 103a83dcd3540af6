"""The pages that people use: log in, launch, watch it start, open its screen, stop it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flask import Blueprint, make_response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from deskfleet.portal import actions, details, forms, languages, progress, signing_in, words
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import COOKIE, gettext
from deskfleet.portal.launching import Wish, lifetimes, may_persist, offered
from deskfleet.portal.login_pages import Page, local, login_page
from deskfleet.portal.services import services
from deskfleet.portal.web import grant, mine, own_desktop, person, public, someone
from deskfleet.schemas.machine import GpuPolicy, Machine
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import State
from deskfleet.schemas.tickets import SID

#: How much longer a desktop lasts by one click.
EXTRA_S = 3600
_YEAR_S = 365 * 24 * 3600

pages = Blueprint("pages", __name__)

_NUMBER = re.compile(r"[0-9]{1,9}")


def checked(sid: str) -> str:
    """A session id out of an address. Raises Problem when it can't be one."""
    if not SID.fullmatch(sid):
        raise Problem(Refused.NO_SUCH_DESKTOP)
    return sid


@pages.get("/")
def home() -> Response:
    """Where people begin."""
    return redirect(url_for("pages.launch"))


@pages.route("/login", methods=["GET", "POST"])
@public
def login() -> Page:
    """Ask who somebody is, by every way that the site has."""
    target = local(request.values.get("next", "/"))
    user = request.form.get("user", "")
    try:
        if request.method == "POST":
            signing_in.log_in(user, request.form.get("password", ""))
        elif not someone() and ("out" in request.args or not signing_in.by_header()):
            return login_page(target)
    except Problem as problem:
        return login_page(target, problem, user=user)
    return redirect(target, 303)


@pages.post("/logout")
def logout() -> Response:
    """End the login."""
    signing_in.log_out()
    # A proxy in front that names people would log them in again at once.
    out = "1" if services().headers else None
    return redirect(url_for("pages.login", out=out), 303)


@pages.post("/language")
@public
def language() -> Response:
    """Show the pages in another language from now on, in this browser; mails to whoever is logged in follow."""
    parts, chosen = services(), request.form.get("language", "")
    if chosen not in parts.settings.languages:
        raise Problem(Refused.BAD_FIELDS)
    who = someone()
    if who is not None:
        parts.people.reads(who.user, chosen)
    response = redirect(local(request.form.get("next", "/")), 303)
    response.set_cookie(
        COOKIE,
        chosen,
        max_age=_YEAR_S,
        path=url_for("pages.home"),
        secure=parts.settings.secure,
        httponly=True,
        samesite="Lax",
    )
    return response


@pages.get("/launch")
def launch() -> Page:
    """What the person may start, each with a button that starts it as it is."""
    parts, who = services(), person()
    machines = offered(parts.catalogue.machines(), who)
    asked, longest_s = _last_launches(), parts.settings.lifetime_max_s
    again = {machine.name: forms.last(machine, asked, longest_s) for machine in machines}
    return render_template(
        "launch.html",
        machines=machines,
        seals={machine.name: parts.seals.mint(who.user, machine.name) for machine in machines},
        again={name: launch for name, launch in again.items() if launch},
        filled={name: forms.filled(last, may_persist=may_persist(who)) for name, last in again.items() if last},
        pictures=parts.catalogue.pictures(),
        lifetime_s=parts.settings.lifetime_default_s,
    )


def _last_launches() -> list[LaunchRequested]:
    return [request.launch for request in services().outbox.launches_of(person().user) if request.launch]


@pages.get("/launch/<name>/picture")
def machine_picture(name: str) -> Response:
    """The picture of a machine, which lies beside its entry in the catalogue."""
    parts, who = services(), person()
    entry = parts.catalogue.machines().get(name)
    png = parts.catalogue.picture(name) if entry and entry.allows(who.user, who.groups) else None
    if png is None:
        raise Problem(Refused.NOT_FOUND)
    return Response(png, mimetype="image/png")


@pages.route("/launch/<name>", methods=["GET", "POST"])
def machine(name: str) -> Page:
    """The launch form of a machine, and what it sends."""
    parts, who = services(), person()
    entry = parts.catalogue.machines().get(name)
    if entry is None or not entry.allows(who.user, who.groups):
        raise Problem(Refused.UNKNOWN_MACHINE)
    if request.method == "GET":
        return _form(entry, parts.seals.mint(who.user, name))
    seal = request.form.get("seal", "")
    try:
        sid = parts.seals.open(seal, who.user, name)
        actions.launch(_wish(name, request.form), sid, "page")
    except Problem as problem:
        if problem.reason in (Refused.STALE_FORM, Refused.SID_TAKEN):
            seal = parts.seals.mint(who.user, name)
        return _form(entry, seal, problem), int(problem.status)
    if entry.instant and actions.runs_soon(sid):
        return redirect(url_for("pages.desktop", sid=sid), 303)
    return redirect(url_for("pages.progress_page", sid=sid), 303)


def _form(entry: Machine, seal: str, problem: Problem | None = None) -> str:
    settings = services().settings
    lives = lifetimes(settings)
    may = may_persist(person())
    last = forms.last(entry, _last_launches(), settings.lifetime_max_s) if request.method == "GET" else None
    filled = forms.filled(last, may_persist=may) if last else dict(request.form)
    if last:
        lives = sorted({*lives, last.lifetime_s})
    return render_template(
        "machine.html",
        machine=entry,
        seal=seal,
        problem=problem,
        filled=filled,
        presets=forms.presets(entry),
        free_gpus=services().fleet.free_gpus() if entry.gpu is not GpuPolicy.NEVER else {},
        lifetimes=lives,
        lifetime_s=settings.lifetime_default_s,
        policies=GpuPolicy,
        any_gpu=forms.ANY_GPU,
        may_persist=may,
    )


def _wish(name: str, form: Mapping[str, str]) -> Wish:
    """What a form asks for. A field that was not sent means the default; one that can't be read is a fault."""
    wrong = []
    numbers: dict[str, int | None] = {}
    for field in ("cpus", "memory_mib", "disk_gib", "lifetime_s"):
        text = form.get(field)
        if text is not None and not _NUMBER.fullmatch(text):
            wrong.append(gettext("%(field)s: must be a whole number", field=field))
        else:
            numbers[field] = None if text is None else int(text)
    if form.get("persistent", "no") not in ("no", "yes"):
        wrong.append(gettext("persistent: must be yes or no"))
    if wrong:
        raise Problem(Refused.BAD_FIELDS, details=wrong)
    gpu = form.get("gpu")
    return Wish(
        machine=name,
        cpus=numbers["cpus"],
        memory_mib=numbers["memory_mib"],
        disk_gib=numbers["disk_gib"],
        gpus=None if gpu is None else int(bool(gpu)),
        gpu_model="" if gpu in (None, forms.ANY_GPU) else gpu,
        persistent=form.get("persistent") == "yes",
        lifetime_s=numbers["lifetime_s"],
    )


@pages.get("/launch/<name>/outlook")
def outlook(name: str) -> Page:
    """What would become of a launch as the form is filled in; the launch pages show it before the click."""
    try:
        _, forecast = actions.foresee(_wish(name, request.args))
    except Problem as problem:
        if problem.reason not in (Refused.BAD_FIELDS, Refused.BAD_RESOURCES):
            raise
        return render_template("_outlook.html", tone="never", text=problem.message, reasons=problem.details)
    return render_template(
        "_outlook.html",
        tone=forecast.outlook.value if forecast else "unknown",
        text=words.forecast(forecast),
        reasons=[details.verdict(v.host, v.text) for v in forecast.verdicts] if forecast else [],
    )


@pages.get("/progress/<sid>")
def progress_page(sid: str) -> Page:
    """How a desktop gets on; its screen as soon as there is one."""
    desktop = own_desktop(checked(sid))
    if desktop.running and not desktop.host_silent:
        return redirect(url_for("pages.desktop", sid=sid))
    return render_template("progress.html", **_progress(desktop))


@pages.get("/progress/<sid>/part")
def progress_part(sid: str) -> Page:
    """The part of the progress page that changes."""
    desktop = own_desktop(checked(sid))
    opens = desktop.running and not desktop.host_silent
    now = services().clock.wall()
    # Most polls end here: who waits asks each second, and is told something new now and then.
    if not opens and now < request.args.get("until", 0, int) and request.args.get("seen") == _look(desktop, now):
        return Response(status=204)
    response = make_response(render_template("_progress.html", **_progress(desktop)))
    if opens:
        response.headers["HX-Redirect"] = url_for("pages.desktop", sid=sid)
    return response


def _look(desktop: Desktop, now: float) -> str:
    # The forms in it hold a token that is good for one login.
    return progress.look(desktop, now, languages.language(), grant())


def _progress(desktop: Desktop) -> dict[str, object]:
    now = services().clock.wall()
    story = services().desktops.story(desktop)
    return {
        "story": story,
        "desktop": story.desktop,
        "stages": progress.stages(story, now),
        "headline": progress.headline(story),
        "pause_ms": progress.pause_ms(story.desktop, now),
        "seen": _look(story.desktop, now),
        "until": progress.good_until(story, now),
        "last": desktop.over and desktop.user == person().user and services().pictures.has_last(desktop.sid),
    }


@pages.get("/desktops")
def desktops() -> Page:
    """The person's desktops."""
    return render_template("desktops.html", **_own())


@pages.get("/desktops/part")
def desktops_part() -> Page:
    """The part of the list that changes."""
    return render_template("_desktops.html", **_own())


def _own() -> dict[str, object]:
    found, sure = services().desktops.of_user(person().user)
    return {
        "live": [desktop for desktop in found if not desktop.over],
        "history": [desktop for desktop in found if desktop.over],
        "longest_s": services().settings.lifetime_max_s,
        "sure": sure,
    }


@pages.get("/desktops/<sid>/picture")
def picture(sid: str) -> Response:
    """The screen of one's own running desktop, small; a blank while there is none. Nobody else gets it."""
    desktop = mine(checked(sid))
    png = services().pictures.of(desktop)
    return Response(png, mimetype="image/png") if png else Response(status=204)


@pages.get("/desktops/<sid>/last")
def last(sid: str) -> Response:
    """The last picture of one's own desktop that failed."""
    png = services().pictures.last(mine(checked(sid)).sid)
    if png is None:
        raise Problem(Refused.NOT_FOUND)
    return Response(png, mimetype="image/png")


@pages.post("/desktops/<sid>/stop")
def stop(sid: str) -> Response:
    """Stop a desktop."""
    actions.stop(checked(sid))
    return redirect(url_for("pages.desktops"), 303)


@pages.post("/desktops/<sid>/extend")
def extend(sid: str) -> Response:
    """Let a desktop last an hour longer."""
    actions.extend(checked(sid), EXTRA_S)
    return redirect(url_for("pages.desktops"), 303)


@pages.get("/desktop/<sid>")
def desktop(sid: str) -> Page:
    """The screen of a desktop."""
    found = own_desktop(checked(sid))
    if found.over or found.waiting:
        return redirect(url_for("pages.progress_page", sid=sid))
    return render_template(
        "desktop.html", desktop=found, stopping=found.state == State.STOPPING, extra_s=EXTRA_S, hours=EXTRA_S // 3600
    )
