"""The pages of shared desktops: the owner's, with links and who is there, and the guest's."""

from __future__ import annotations

import re

from flask import Blueprint, jsonify, redirect, render_template, request, session, url_for
from werkzeug.wrappers import Response

from deskfleet.portal import actions
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import gettext
from deskfleet.portal.login_pages import Page
from deskfleet.portal.services import services
from deskfleet.portal.shares import Audience, Share
from deskfleet.portal.views import checked
from deskfleet.portal.web import mine, public, someone

sharing = Blueprint("sharing", __name__)

#: How long links may last, in seconds, as far as the site allows.
LIFETIMES = (3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)
#: Links that one browser may have opened; the oldest is forgotten.
_MOST_OPENED = 10
_OPENED = "opened"
_NAME = re.compile(r"[0-9a-f]{16}")
_LONGEST_PASSPHRASE = 200


def _owner(sid: str, **more: object) -> str:
    desktop, settings = mine(checked(sid)), services().settings
    return render_template(
        "share.html",
        desktop=desktop,
        audiences=[Audience.SIGNED_IN] + ([Audience.ANYBODY] if settings.sharing == "anybody" else []),
        allowed=settings.sharing != "off",
        lifetimes=[seconds for seconds in LIFETIMES if seconds <= settings.share_max_s] or [settings.share_max_s],
        **_links(sid),
        **more,
    )


def _links(sid: str) -> dict[str, object]:
    shares = services().shares.of(sid)
    return {"shares": shares, "consoles": services().grants.consoles(sid), "names": {one.grant for one in shares}}


@sharing.get("/desktops/<sid>/share")
def share(sid: str) -> Page:
    """The links of one's own desktop, and who has it open."""
    return _owner(sid)


@sharing.get("/desktops/<sid>/share/part")
def share_part(sid: str) -> Page:
    """The part of the page that changes."""
    return render_template("_share.html", desktop=mine(checked(sid)), **_links(sid))


@sharing.post("/desktops/<sid>/share")
def make(sid: str) -> Page:
    """Make a link. It is on the answer, and nowhere else."""
    mine(checked(sid))
    try:
        audience = Audience(request.form.get("audience", ""))
        lifetime_s = int(request.form.get("lifetime_s", ""))
        if lifetime_s not in LIFETIMES and lifetime_s != services().settings.share_max_s:
            raise ValueError
    except ValueError:
        raise Problem(
            Refused.BAD_FIELDS, details=[gettext("audience, lifetime_s: pick one of those offered")]
        ) from None
    passphrase = request.form.get("passphrase", "")[:_LONGEST_PASSPHRASE]
    try:
        secret, made = actions.share(
            checked(sid), audience, lifetime_s, passphrase, watch=request.form.get("mode", "full") != "full"
        )
    except Problem as problem:
        return _owner(sid, problem=problem), int(problem.status)
    link = services().settings.origin + url_for("sharing.link", link=secret)
    return _owner(sid, link=link, made=made)


@sharing.post("/desktops/<sid>/share/<name>/revoke")
def revoke(sid: str, name: str) -> Response:
    """Take a link back."""
    actions.unshare(checked(sid), name)
    return redirect(url_for("sharing.share", sid=sid), 303)


@sharing.get("/shared")
@public
def link() -> Page:
    """What a link opens, before it is opened: programs that look at links in mails open nothing."""
    secret = request.args.get("link", "")
    found = services().shares.find(secret)
    if found is not None and found.audience is Audience.SIGNED_IN and someone() is None:
        return redirect(url_for("pages.login", next=url_for("sharing.link", link=secret)))
    if found is None:
        raise Problem(Refused.BAD_LINK)
    return render_template("shared.html", share=found, desktop=actions.shared_desktop(found), secret=secret)


@sharing.post("/shared")
@public
def open_link() -> Page:
    """Open a link."""
    secret = request.form.get("link", "")
    try:
        found = actions.open_link(secret, request.form.get("passphrase", "")[:_LONGEST_PASSPHRASE])
    except Problem as problem:
        known = services().shares.find(secret)
        if known is None or problem.reason is Refused.BAD_LINK:
            raise
        page = render_template(
            "shared.html", share=known, desktop=actions.shared_desktop(known), secret=secret, problem=problem
        )
        return page, int(problem.status)
    opened = [name for name in session.get(_OPENED, []) if name != found.name]
    session[_OPENED] = [*opened, found.name][-_MOST_OPENED:]
    return redirect(url_for("sharing.desktop", name=found.name), 303)


def _opened(name: str) -> Share:
    """A link that this browser has opened, as long as it opens anything. Raises Problem."""
    known = _NAME.fullmatch(name) and name in session.get(_OPENED, [])
    found = services().shares.named(name) if known else None
    if found is None:
        raise Problem(Refused.BAD_LINK)
    return found


@sharing.get("/shared/<name>")
@public
def desktop(name: str) -> Page:
    """The screen of somebody else's desktop."""
    found = actions.shared_desktop(_opened(name))
    if found.over or found.waiting:
        raise Problem(Refused.NOT_RUNNING, found.sentence)
    return render_template("desktop.html", desktop=found, guest=name, hours=0, extra_s=0)


@sharing.post("/shared/<name>/ticket")
@public
def ticket(name: str) -> Response:
    """A ticket for it."""
    return jsonify(actions.shared_ticket(_opened(name)))


@sharing.get("/shared/<name>/state")
@public
def state(name: str) -> Response:
    """How long it lasts."""
    found = actions.shared_desktop(_opened(name))
    return jsonify(state=found.shown, time_left_s=found.time_left_s)
