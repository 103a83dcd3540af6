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

from flask import Flask, Response, g, jsonify, redirect, render_template, request, url_for
from flask_wtf.csrf import CSRFError, CSRFProtect
from sqlalchemy.exc import DBAPIError
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from deskfleet.portal import words
from deskfleet.portal.admin import admin
from deskfleet.portal.api import register as register_api
from deskfleet.portal.errors import ANSWERS, Problem, Refused
from deskfleet.portal.services import EXTENSION, Services, services
from deskfleet.portal.views import pages
from deskfleet.portal.web import by_token, check_access, someone

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_MOST_BYTES = 256 * 1024
_MOST_PARTS = 100
_API = "/api/"


def create_app(parts: Services) -> Flask:
    """The application over these parts. Starts nothing."""
    settings = parts.settings
    # A namespace package has no single folder to guess an instance path from; and nothing is ever read from there.
    app = Flask(__name__, root_path=str(_HERE), instance_path="/nonexistent")
    app.config.update(
        SECRET_KEY=settings.secret_key.reveal(),
        MAX_CONTENT_LENGTH=_MOST_BYTES,
        MAX_FORM_MEMORY_SIZE=_MOST_BYTES,
        MAX_FORM_PARTS=_MOST_PARTS,
        # __Host- binds the cookie to this very host: a sibling domain can't plant one (RFC 6265bis, 4.1.3.2).
        SESSION_COOKIE_NAME="__Host-deskfleet" if settings.secure else "deskfleet",
        SESSION_COOKIE_SECURE=settings.secure,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        PERMANENT_SESSION_LIFETIME=timedelta(seconds=settings.login_s),
        WTF_CSRF_CHECK_DEFAULT=False,  # checked below, once it is known how the caller proves who it is
        WTF_CSRF_TIME_LIMIT=None,  # it ends with the login
        WTF_CSRF_SSL_STRICT=False,  # it wants a Referer, and our pages tell nobody where people come from
        SEND_FILE_MAX_AGE_DEFAULT=timedelta(days=365),
    )
    app.extensions[EXTENSION] = parts
    csrf = CSRFProtect(app)

    @app.before_request
    def _guard() -> None:
        check_access()
        if request.method not in ("GET", "HEAD", "OPTIONS") and not by_token():
            csrf.protect()

    app.after_request(_headers)
    app.register_blueprint(pages)
    app.register_blueprint(admin)
    register_api(app)
    _errors(app)

    @app.context_processor
    def _for_templates() -> dict[str, Any]:
        return {
            "who": someone(),
            "title": settings.title,
            "words": words,
            "now": parts.clock.wall(),
            "asset": asset,
        }

    return app


def asset(name: str) -> str:
    """The address of a static file, with a hash of its content so that it may be kept for ever."""
    return url_for("static", filename=name, v=_hash(name))


@lru_cache(maxsize=256)
def _hash(name: str) -> str:
    return hashlib.sha256((_HERE / "static" / name).read_bytes()).hexdigest()[:12]


def _headers(response: Response) -> Response:
    settings = services().settings
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
        f"connect-src 'self' {settings.console_origin}; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    if settings.secure:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
    if request.endpoint == "static":
        if "v" not in request.args:  # a module that another one imports: no hash in its address, so it is asked again
            response.headers["Cache-Control"] = "no-cache"
    else:
        # Every answer may depend on who asks; no cache in between may hand it to another.
        response.headers["Cache-Control"] = "no-store"
        response.headers["Vary"] = "Cookie, Authorization"
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
        log.error("a database does not answer: %s", type(error.orig).__name__)
        return _answer(Problem(Refused.RECORDS_AWAY))

    @app.errorhandler(HTTPException)
    def _http(error: HTTPException) -> WerkzeugResponse:
        status = HTTPStatus(error.code or 500)
        reason = Refused.NOT_FOUND if status is HTTPStatus.NOT_FOUND else Refused.BAD_REQUEST
        message = "" if reason is Refused.NOT_FOUND else f"{status.phrase}. {ANSWERS[reason][1]}"
        return _answer(Problem(reason, message), status)

    @app.errorhandler(Exception)
    def _broken(error: Exception) -> WerkzeugResponse:
        problem = Problem(Refused.BROKEN)
        g.reference = secrets.token_hex(4)
        log.error("reference %s: %s failed", g.reference, request.endpoint, exc_info=error)
        return _answer(problem)


def _answer(problem: Problem, status: HTTPStatus | None = None) -> WerkzeugResponse:
    """A refusal as JSON for programs and as a page for people; who must log in is sent to do so."""
    status = status or problem.status
    reference = g.get("reference", "")
    response: WerkzeugResponse
    if request.path.startswith(_API):
        response = jsonify(
            reason=problem.reason.value, message=problem.message, details=list(problem.details), reference=reference
        )
    elif problem.reason is Refused.NOT_LOGGED_IN:
        there = request.full_path.rstrip("?") if request.method == "GET" else "/"
        target = url_for("pages.login", next=there)
        if request.headers.get("HX-Request"):  # a fragment that polls: the whole page has to go
            return Response(status=HTTPStatus.NO_CONTENT, headers={"HX-Redirect": target})
        return redirect(target)
    else:
        text = render_template(
            "error.html", status=int(status), message=problem.message, details=problem.details, reference=reference
        )
        response = Response(text)
    response.status_code = int(status)
    if problem.wait_s:
        response.headers["Retry-After"] = str(problem.wait_s)
    return response
