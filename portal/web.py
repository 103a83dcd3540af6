"""Who asks, and whether they may: one rule for every page and every API call.

A view needs a login unless it is marked `public`, and an administrator when it is marked `admin_only`; a new view is
closed by default. A Bearer token stands for itself: with one, cookies are not looked at, so no other site can use them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

from flask import current_app, g, request, session

from deskfleet.portal import scopes
from deskfleet.portal.auth import Identity
from deskfleet.portal.auth_header import inside
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.grants import login_grant
from deskfleet.portal.languages import gettext
from deskfleet.portal.scopes import Scope
from deskfleet.portal.services import services

_View = TypeVar("_View", bound=Callable[..., Any])

#: The key of the server-side login's secret in the signed cookie.
LOGIN = "login"
#: By this header the pages' own scripts say that nobody did anything; what htmx asks for carries one of its own.
UNATTENDED = "X-Deskfleet-Unattended"
_BEARER = "Bearer "
_SAFE = ("GET", "HEAD", "OPTIONS")


def public(view: _View) -> _View:
    """Mark a view that needs no login."""
    view.deskfleet_access = "public"  # type: ignore[attr-defined]
    return view


def changes_nothing(view: _View) -> _View:
    """Mark a POST that only asks."""
    view.deskfleet_changes_nothing = True  # type: ignore[attr-defined]
    return view


def admin_only(view: _View) -> _View:
    """Mark a view for administrators."""
    view.deskfleet_access = "admin"  # type: ignore[attr-defined]
    return view


def access(endpoint: str | None) -> str:
    """What a view needs: public, person or admin. Unknown addresses are public, so that they get a plain 404."""
    if endpoint is None or endpoint == "static":
        return "public"
    return cast(str, _mark(endpoint, "deskfleet_access", "person"))


def _mark(endpoint: str, name: str, default: object) -> object:
    view = current_app.view_functions.get(endpoint)
    # A class-based view (flask-smorest) carries the mark on the method.
    methods = getattr(view, "view_class", None)
    marked = getattr(methods, request.method.lower(), view) if methods else view
    return getattr(marked, name, default)


def check_access() -> None:
    """Before each request: refuse who may not. Raises Problem."""
    needed = access(request.endpoint)
    if by_token() and someone() is not None:
        _check_scope(scopes.needed(needed, changes()))
    if needed == "admin":
        administrator()
    elif needed == "person":
        person()


def _check_scope(wanted: Scope | None) -> None:
    """Refuse what the token is not good for. Raises Problem."""
    if wanted is not None and not scopes.allows(g.scopes, wanted):
        services().audit.note(person().user, client_address(), "refused", request.path, f"the token lacks {wanted}")
        message = gettext("This token is not good for that: it needs the scope %(scope)s.", scope=wanted.value)
        raise Problem(Refused.OUT_OF_SCOPE, message)


def changes() -> bool:
    """Whether the request is one that may change something."""
    return request.method not in _SAFE and not _mark(request.endpoint or "", "deskfleet_changes_nothing", False)


def whole(given: Mapping[str, str], name: str, default: int = 0) -> int:
    """A number of a query or a form, as every database takes it; `default` when it is none."""
    text = given.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else default


def by_token() -> bool:
    """Whether the request carries a token of its own."""
    return request.headers.get("Authorization", "").startswith(_BEARER)


def unattended() -> bool:
    """Whether an open page asks by itself, which keeps no login alive: it would do so all night."""
    return (request.method == "GET" and "HX-Request" in request.headers) or UNATTENDED in request.headers


def someone() -> Identity | None:
    """Who asks; None when nobody is logged in. Looked up once a request."""
    if "who" not in g:
        g.who = _look_up()
    return cast("Identity | None", g.who)


def _look_up() -> Identity | None:
    logins = services().logins
    if by_token():
        known = logins.find_token(request.headers["Authorization"].removeprefix(_BEARER).strip())
        if known is None:
            return None
        who, g.scopes = known
        now = services().chain.current(who)
        # Without the scope of an administrator, the token of one is like anybody's.
        fleet = scopes.allows(g.scopes, Scope.FLEET if changes() else Scope.FLEET_READ)
        return now if now is None or fleet else replace(now, admin=False)
    secret = session.get(LOGIN)
    found = logins.find(secret, used=not unattended()) if isinstance(secret, str) else None
    if found is None:
        return None
    headers = services().headers
    if headers is not None and found.method == headers.name:
        # The proxy in front says it anew each time, and may name somebody else by now.
        now = headers.identify(request.environ)
        return services().chain.ranked(now) if now and now.user == found.user else None
    # The account may have been disabled, or lost its rights, since.
    return services().chain.current(found)


def grant() -> str:
    """What the right of whoever asks comes from: the login, or the token that the request carries."""
    if by_token():
        return login_grant(request.headers["Authorization"].removeprefix(_BEARER).strip())
    return login_grant(str(session.get(LOGIN)))


def person() -> Identity:
    """Who asks.

    Raises:
        Problem: nobody is logged in.
    """
    who = someone()
    if who is None:
        raise Problem(Refused.NOT_LOGGED_IN)
    return who


def administrator() -> Identity:
    """Who asks, as an administrator.

    Raises:
        Problem: nobody is logged in, or somebody without the right.
    """
    who = person()
    if not who.admin:
        services().audit.note(who.user, client_address(), "refused", request.path, "not an administrator")
        raise Problem(Refused.NOT_ALLOWED)
    return who


def client_address() -> str:
    """Where the request comes from: X-Forwarded-For only counts from a configured front proxy."""
    peer = request.remote_addr or "-"
    trusted = inside(peer, services().settings.front_proxies)
    forwarded = request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip() if trusted else ""
    return forwarded[:64] or peer


def mine(sid: str) -> Desktop:
    """A desktop of the person's own: what is on its screen is no administrator's business.

    Raises:
        Problem: the same for another person's as for one that does not exist.
    """
    desktop = own_desktop(sid)
    if desktop.user != person().user:
        raise Problem(Refused.NO_SUCH_DESKTOP)
    return desktop


def own_desktop(sid: str) -> Desktop:
    """A desktop that the person may touch: their own, or anybody's for an administrator.

    Raises:
        Problem: the same for another person's as for one that does not exist.
    """
    who = person()
    desktop = services().desktops.find(sid)
    if desktop is None or not (who.admin or desktop.user == who.user):
        if desktop is not None:
            services().audit.note(who.user, client_address(), "refused", sid, f"{request.path} of {desktop.user}")
        raise Problem(Refused.NO_SUCH_DESKTOP)
    return desktop
