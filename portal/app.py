"""The Flask application: cookies, headers, errors, and what every page may use."""

from __future__ import annotations

import hashlib
import logging
import secrets
from datetime import timedelta
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Response, g, jsonify, redirect, render_template, request, send_from_directory, url_for
from flask_wtf.csrf import CSRFError, CSRFProtect
from sqlalchemy.exc import DBAPIError
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.wrappers import Response as WerkzeugResponse

from deskfleet.portal import api_admin, languages, words
from deskfleet.portal.admin import admin
from deskfleet.portal.admin_lists import lists
from deskfleet.portal.admin_queues import queues
from deskfleet.portal.api import register as register_api
from deskfleet.portal.brand_pages import brand
from deskfleet.portal.errors import ANSWERS, Problem, Refused
from deskfleet.portal.languages import gettext
from deskfleet.portal.login_pages import sign_in
from deskfleet.portal.services import EXTENSION, Services, services
from deskfleet.portal.settings import PortalSettings
from deskfleet.portal.sharing import sharing
from deskfleet.portal.token_pages import tokens
from deskfleet.portal.views import pages
from deskfleet.portal.web import by_token, check_access, public, someone

log = logging.getLogger(__name__)
access = logging.getLogger("deskfleet.portal.access")

_HERE = Path(__file__).parent
_STATIC = _HERE / "static"
_YEAR = timedelta(days=365)
_FOR_EVER = "public, max-age=31536000, immutable"
_MOST_BYTES = 256 * 1024
_MOST_PARTS = 100
_API = "/api/"
#: Their addresses change with what they hold.
_KEPT = ("brand.logo", "brand.accent")


def create_app(parts: Services) -> Flask:
    """The application over these parts. Starts nothing."""
    settings = parts.settings
    # A namespace package has no single folder to guess an instance path from; and nothing is ever read from there.
    app = Flask(__name__, root_path=str(_HERE), instance_path="/nonexistent", static_folder=None)
    app.config.update(
        SECRET_KEY=settings.secret_key.reveal(),
        MAX_CONTENT_LENGTH=_MOST_BYTES,
        MAX_FORM_MEMORY_SIZE=_MOST_BYTES,
        MAX_FORM_PARTS=_MOST_PARTS,
        SESSION_COOKIE_NAME=_cookie_name(settings),
        SESSION_COOKIE_PATH=settings.path or "/",
        SESSION_COOKIE_SECURE=settings.secure,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        # The login in it ends on the server, and long before; that this browser is known to its owner outlives it.
        PERMANENT_SESSION_LIFETIME=_YEAR,
        SESSION_REFRESH_EACH_REQUEST=False,  # else every answer sets it, those that caches keep included
        WTF_CSRF_CHECK_DEFAULT=False,  # checked below, once it is known how the caller proves who it is
        WTF_CSRF_TIME_LIMIT=None,  # it ends with the login
        WTF_CSRF_SSL_STRICT=False,  # it wants a Referer, and our pages tell nobody where people come from
    )
    app.extensions[EXTENSION] = parts
    if parts.headers is not None:
        app.wsgi_app = parts.headers.stripping(app.wsgi_app)  # type: ignore[assignment,method-assign]
    languages.install(app, settings.languages, settings.default_language, _API)
    csrf = CSRFProtect(app)

    @app.before_request
    def _guard() -> None:
        if request.routing_exception is not None:
            return  # there is no such page, which is all that anybody learns
        check_access()
        if request.method not in ("GET", "HEAD", "OPTIONS") and not by_token():
            csrf.protect()

    @app.get("/static/<version>/<path:filename>", endpoint="static")
    @public
    def _static(version: str, filename: str) -> Response:
        answer = send_from_directory(_STATIC, filename)
        # Another version is asked for while portals are being upgraded, one after the other: good enough for once.
        answer.headers["Cache-Control"] = _FOR_EVER if version == release() else "no-cache"
        return answer

    app.after_request(_headers)
    if settings.access_log:
        _log_answers(app)
    app.register_blueprint(brand)
    app.register_blueprint(pages)
    app.register_blueprint(sharing)
    app.register_blueprint(sign_in)
    app.register_blueprint(tokens)
    app.register_blueprint(admin)
    app.register_blueprint(lists)
    app.register_blueprint(queues)
    register_api(app, api_admin.blueprint, root=settings.path)
    _errors(app)
    if settings.path:
        # What lies outside of it is another application's; when it comes here all the same, there is nothing.
        app.wsgi_app = DispatcherMiddleware(NotFound(), {settings.path: app.wsgi_app})  # type: ignore[method-assign]

    @app.context_processor
    def _for_templates() -> dict[str, Any]:
        return {
            "who": someone(),
            "title": settings.title,
            "brand": settings.brand,
            "language": languages.language(),
            "languages": {name: languages.NAMES[name] for name in settings.languages},
            "language_header": languages.HEADER,
            "words": words,
            "now": parts.clock.wall(),
            "asset": asset,
            "here": here,
        }

    return app


def _cookie_name(settings: PortalSettings) -> str:
    """A name that browsers bind to this very host, so that a sibling domain can't plant the cookie (RFC 6265bis,
    4.1.3.2); to a path, they bind none, so that below one only TLS is sure."""
    if not settings.secure:
        return "deskfleet"
    return "__Secure-deskfleet" if settings.path else "__Host-deskfleet"


def here() -> str:
    """The address of the page, to come back to; the start page when it is the answer to a form."""
    if request.method != "GET":
        return url_for("pages.home")
    return request.script_root + request.full_path.rstrip("?")


def asset(name: str) -> str:
    """The address of a static file. It changes with the files, so that browsers may keep them for ever.

    The version stands in the path, not in the query: noVNC's modules load each other by relative addresses.
    """
    return url_for("static", version=release(), filename=name)


@lru_cache(maxsize=1)
def release() -> str:
    """A hash over all static files, names and contents."""
    found = hashlib.sha256()
    for path in sorted(path for path in _STATIC.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(_STATIC)}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:16]


def _log_answers(app: Flask) -> None:
    """A line for each answer: the route, never the address, for that may hold what opens something."""

    @app.before_request
    def _begin() -> None:
        g.begun = services().clock.monotonic()

    @app.after_request
    def _note(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "-"
        took_ms = 1000 * (services().clock.monotonic() - g.begun) if "begun" in g else 0.0
        who = g.who.user if g.get("who") else "-"
        access.info("%s %s %s %d %.0f ms", request.method, route, who, response.status_code, took_ms)
        return response


def _headers(response: Response) -> Response:
    settings = services().settings
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
        f"connect-src 'self' {settings.console_origin}; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    response.headers.setdefault("Content-Security-Policy", policy)
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    if settings.secure:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
    if request.endpoint in _KEPT and response.status_code == HTTPStatus.OK:
        response.headers["Cache-Control"] = _FOR_EVER
    elif request.endpoint != "static":
        # Every answer may depend on who asks; no cache in between may hand it to another.
        response.headers["Cache-Control"] = "no-store"
        response.headers["Vary"] = "Cookie, Authorization, Accept-Language"
    services().counts.requests.labels(request.endpoint or "none", response.status_code).inc()
    return response


def _errors(app: Flask) -> None:
    @app.errorhandler(Problem)
    def _problem(problem: Problem) -> WerkzeugResponse:
        return _answer(problem)

    @app.errorhandler(CSRFError)
    def _csrf(_: CSRFError) -> WerkzeugResponse:
        return _answer(Problem(Refused.STALE_FORM))

    @app.errorhandler(DBAPIError)
    def _database(error: DBAPIError) -> WerkzeugResponse:
        g.setdefault("who", None)  # the page that says so can't ask the database who looks at it
        return _answer(Problem(Refused.RECORDS_AWAY), f"a database does not answer: {type(error.orig).__name__}")

    @app.errorhandler(HTTPException)
    def _http(error: HTTPException) -> WerkzeugResponse:
        status = HTTPStatus(error.code or 500)
        reason = Refused.NOT_FOUND if status is HTTPStatus.NOT_FOUND else Refused.BAD_REQUEST
        message = ""
        if reason is Refused.BAD_REQUEST and request.path.startswith(_API):
            message = f"{status.phrase}. {gettext(ANSWERS[reason][1])}"  # HTTP's own words are English
        answer = _answer(Problem(reason, message), status=status)
        if isinstance(error, MethodNotAllowed):
            answer.headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
        return answer

    @app.errorhandler(Exception)
    def _broken(error: Exception) -> WerkzeugResponse:
        return _answer(Problem(Refused.BROKEN), "a fault of ours", error)


def _answer(
    problem: Problem, cause: str = "", error: Exception | None = None, *, status: HTTPStatus | None = None
) -> WerkzeugResponse:
    """A refusal as JSON for programs and as a page for people; who must log in is sent to do so.

    When it is our fault, a reference leads from what the person sees to the log; nothing else of the fault gets out.
    """
    status = status or problem.status
    reference = ""
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        reference = secrets.token_hex(4)
        log.error("reference %s: %s: %s", reference, request.endpoint, cause or problem.reason, exc_info=error)
    response: WerkzeugResponse
    if request.path.startswith(_API) or request.headers.get("Accept") == "application/json":
        response = jsonify(
            reason=problem.reason.value, message=problem.message, details=list(problem.details), reference=reference
        )
    elif problem.reason is Refused.NOT_LOGGED_IN:
        # Of a fragment that polls, the page around it is what one comes back to.
        around = urlsplit(request.headers.get("HX-Current-URL", "")).path
        target = url_for("pages.login", next=around or here())
        if request.headers.get("HX-Request"):  # a fragment that polls: the whole page has to go
            return Response(status=HTTPStatus.NO_CONTENT, headers={"HX-Redirect": target})
        return redirect(target)
    else:
        text = render_template(
            "error.html",
            status=int(status),
            reason=problem.reason.value,
            message=problem.message,
            details=problem.details,
            reference=reference,
        )
        response = Response(text)
    response.status_code = int(status)
    if problem.wait_s:
        response.headers["Retry-After"] = str(problem.wait_s)
    return response
