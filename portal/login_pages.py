"""The pages of the ways to log in that take more than a name and a password."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, make_response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from deskfleet.portal import signing_in
from deskfleet.portal.errors import Problem
from deskfleet.portal.services import services
from deskfleet.portal.web import public, someone

sign_in = Blueprint("sign_in", __name__)

#: What a view may return: a text, a text with its status, or a whole response.
Page = str | tuple[str, int] | Response


def local(target: str) -> str:
    """Where to go after the login: an address on this portal, or its start page.

    Browsers read a backslash as a slash and drop tabs and line ends (URL Standard, 4.4), so none of these may be in it.
    """
    plain = target.isascii() and target.isprintable() and not set(target) & {"\\", " "}
    home = url_for("pages.home")
    return target if plain and target.startswith(home) and not target.startswith("//") else home


def login_page(target: str, problem: Problem | None = None, **filled: Any) -> Response:
    """The login page, with what was wrong."""
    parts = services()
    page = render_template(
        "login.html",
        next=target,
        problem=problem,
        passwords=parts.chain.passwords,
        domains=parts.codes.domains if parts.codes else (),
        provider=parts.oidc.title if parts.oidc else "",
        out="out" in request.args,
        asked=None,
        **filled,
    )
    return _answer(page, problem)


def _code_page(problem: Problem | None = None) -> Response:
    return _answer(render_template("login.html", asked=signing_in.code_asked(), problem=problem), problem)


def _answer(page: str, problem: Problem | None) -> Response:
    response = make_response(page, int(problem.status) if problem else 200)
    if problem and problem.wait_s:
        response.headers["Retry-After"] = str(problem.wait_s)
    return response


@sign_in.post("/login/mail")
@public
def mail() -> Page:
    """Have a code sent by mail."""
    target, address = local(request.form.get("next", "/")), request.form.get("address", "").strip(" ")
    try:
        signing_in.ask_code(address, target)
    except Problem as problem:
        return login_page(target, problem, address=address)
    return redirect(url_for("sign_in.code"), 303)


@sign_in.route("/login/code", methods=["GET", "POST"])
@public
def code() -> Page:
    """Ask for the code that was sent, and log in by it. Looking at this page changes nothing."""
    if request.method == "POST":
        try:
            return redirect(local(signing_in.use_code(request.form.get("code", ""))), 303)
        except Problem as problem:
            return _code_page(problem)
    if someone() or not signing_in.code_asked():
        return redirect(url_for("pages.login"))
    return _code_page()


@sign_in.get("/login/oidc")
@public
def oidc() -> Page:
    """Go to the provider of OpenID Connect. A link, since our policy lets no form lead to another site."""
    target = local(request.args.get("next", "/"))
    try:
        return redirect(signing_in.begin_oidc(target))
    except Problem as problem:
        return login_page(target, problem)


@sign_in.get("/login/oidc/return")
@public
def oidc_return() -> Page:
    """Come back from there."""
    try:
        return redirect(local(signing_in.finish_oidc(request.args)))
    except Problem as problem:
        return login_page(url_for("pages.home"), problem)
