"""The page of access tokens, by which programs act for a person."""

from __future__ import annotations

from flask import Blueprint, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from deskfleet.portal import actions
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import N_, gettext
from deskfleet.portal.logins import TokenInfo
from deskfleet.portal.scopes import Scope
from deskfleet.portal.web import person, whole

Page = str | tuple[str, int] | Response

tokens = Blueprint("tokens", __name__, url_prefix="/tokens")

#: For how many days a token may be made by the page.
DAYS = (7, 30, 90, 365)
LONGEST_LABEL = 80

MEANINGS = {
    Scope.DESKTOPS_READ: N_("see your desktops"),
    Scope.DESKTOPS: N_("launch, use and stop your desktops"),
    Scope.FLEET_READ: N_("see the whole fleet, as you do as an administrator"),
    Scope.FLEET: N_("do everything that you may as an administrator"),
}


def _page(problem: Problem | None = None, secret: str = "", made: TokenInfo | None = None) -> str:
    admin = person().admin
    offered = [scope for scope in Scope if admin or not scope.startswith("fleet")]
    return render_template(
        "tokens.html",
        tokens=actions.tokens(),
        meanings=MEANINGS,
        offered=offered,
        days=DAYS,
        longest=LONGEST_LABEL,
        problem=problem,
        secret=secret,
        made=made,
        label=request.form.get("label", "") if problem else "",
    )


@tokens.get("/")
def page() -> str:
    """A person's tokens."""
    return _page()


@tokens.post("/")
def make() -> Page:
    """A new one; its secret is on this page and nowhere else."""
    label = " ".join(request.form.get("label", "").split())
    try:
        scopes = [scope for scope in Scope if scope in request.form.getlist("scope")]
        if not label or len(label) > LONGEST_LABEL or not scopes or whole(request.form, "days") not in DAYS:
            raise Problem(Refused.BAD_FIELDS, gettext("Say what the token is for, and tick what it may do."))
        secret, made = actions.make_token(label, whole(request.form, "days"), scopes)
    except Problem as problem:
        return _page(problem), int(problem.status)
    return _page(secret=secret, made=made)


@tokens.post("/<name>/remove")
def remove(name: str) -> Response:
    """Remove one."""
    actions.drop_token(name)
    return redirect(url_for("tokens.page"), 303)
