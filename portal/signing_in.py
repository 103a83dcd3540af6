"""Logging in and out, by every way there is: each ends in a login of its own that the server knows."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping

from flask import request, session

from deskfleet.portal.auth import Answer, Identity, Unavailable, WrongPassword
from deskfleet.portal.email_codes import EmailCodes, Fault
from deskfleet.portal.errors import Problem, Refused, slow_down
from deskfleet.portal.languages import language
from deskfleet.portal.services import services
from deskfleet.portal.throttle import Counter, code_counters, counters, folded
from deskfleet.portal.web import LOGIN, client_address, person

log = logging.getLogger(__name__)

_CODE, _FLOW, _BROWSER, _WAS = "code", "flow", "browser", "was"
_FAULTS = {
    Fault.WRONG: Refused.CODE_WRONG,
    Fault.EXPIRED: Refused.CODE_EXPIRED,
    Fault.USED_UP: Refused.CODE_USED_UP,
}


def log_in(user: str, password: str) -> Identity:
    """Check a password and begin a login under a new session id.

    Raises:
        Problem: wrong, can't be checked now, or tried too often.
    """
    parts = services()
    name = folded(user, parts.settings.realms)
    against = counters(name, client_address(), _known_browser(name))
    _slow_down(against, "password")
    answer = parts.chain.check(user, password)
    if isinstance(answer, Unavailable):
        parts.throttle.forgive(against, all_of_it=False)
        raise Problem(Refused.LOGIN_UNAVAILABLE)
    if isinstance(answer, WrongPassword):
        raise Problem(Refused.WRONG_PASSWORD)
    parts.throttle.forgive(against, all_of_it=True)
    return _enter(answer, name)


def ask_code(typed: str, target: str) -> None:
    """Have a code sent by mail. The answer is the same whether or not the address may be used.

    Raises:
        Problem: not an address, asked for too often, or no mails can be sent.
    """
    codes, parts = _codes(), services()
    address = codes.canonical(typed)
    if address is None:
        raise Problem(Refused.BAD_ADDRESS)
    known = _known_browser(address)
    _slow_down(code_counters(address, client_address(), known), codes.name)
    if codes.in_trouble:
        parts.counts.logins.labels(codes.name, "unavailable").inc()
        raise Problem(Refused.MAIL_UNAVAILABLE)
    session[_CODE] = {"secret": codes.ask(address, bool(known)), "address": address, "next": target}
    parts.counts.logins.labels(codes.name, "asked").inc()


def code_asked() -> Mapping[str, str] | None:
    """What this browser asked a code for: address and next; None when it did not."""
    found = session.get(_CODE)
    return found if isinstance(found, dict) else None


def use_code(typed: str) -> str:
    """Log in by the code that this browser asked for; returns where to go then.

    Raises:
        Problem: wrong, expired, or used before.
    """
    codes, asked, parts = _codes(), code_asked(), services()
    found = codes.redeem(asked["secret"], typed) if asked else Fault.EXPIRED
    if isinstance(found, Fault) or asked is None:
        parts.counts.logins.labels(codes.name, "wrong").inc()
        raise Problem(_FAULTS[found] if isinstance(found, Fault) else Refused.CODE_EXPIRED)
    parts.counts.logins.labels(codes.name, "right").inc()
    _enter(parts.chain.ranked(found), asked["address"])
    return asked["next"]


def begin_oidc(target: str) -> str:
    """Where to send the browser so that the provider asks who it is. Raises Problem."""
    oidc = services().oidc
    if oidc is None:
        raise Problem(Refused.NOT_FOUND)
    begun = oidc.begin()
    if isinstance(begun, Unavailable):
        raise _refusal(begun, oidc.name)
    session[_FLOW] = {**begun.flow, "next": target}
    return begun.url


def finish_oidc(answer: Mapping[str, str]) -> str:
    """Log in whom the provider vouches for; returns where to go then. Raises Problem."""
    oidc = services().oidc
    if oidc is None:
        raise Problem(Refused.NOT_FOUND)
    flow = session.pop(_FLOW, None)  # good once, whatever comes of it
    flow = flow if isinstance(flow, dict) else {}
    identity = _admitted(oidc.finish(flow, answer), oidc.name)
    _enter(identity, folded(identity.user, services().settings.realms))
    return str(flow["next"])


def by_header() -> bool:
    """Log in whom the proxy in front names; False when it names nobody. Raises Problem when the person may not."""
    headers = services().headers
    if headers is None or not headers.named(request.environ):
        return False
    identity = headers.identify(request.environ)
    admitted = _admitted(identity or WrongPassword(), headers.name)
    _enter(admitted, folded(admitted.user, services().settings.realms))
    return True


def log_out() -> None:
    """End the login, on the server too; what the browser kept is worth nothing then."""
    secret = session.get(LOGIN)
    who = person()
    if isinstance(secret, str):
        services().logins.close(secret)
        services().grants.sweep()
    browser = {key: session[key] for key in (_BROWSER, _WAS) if key in session}
    session.clear()
    session.update(browser)
    services().audit.note(who.user, client_address(), "logout")


def _codes() -> EmailCodes:
    codes = services().codes
    if codes is None:
        raise Problem(Refused.NOT_FOUND)
    return codes


def _known_browser(name: str) -> str:
    """The id of this browser when it has logged in by this name before, else empty."""
    return str(session.get(_BROWSER, "")) if session.get(_WAS) == name else ""


def _slow_down(against: tuple[Counter, ...], method: str) -> None:
    wait_s = services().throttle.begin(against)
    if wait_s:
        services().counts.logins.labels(method, "slowed").inc()
        raise slow_down(wait_s)


def _admitted(answer: Answer, method: str) -> Identity:
    """The person that a method without a password vouches for. Raises Problem."""
    if not isinstance(answer, Identity):
        raise _refusal(answer, method)
    services().counts.logins.labels(method, "right").inc()
    return services().chain.ranked(answer)


def _refusal(answer: WrongPassword | Unavailable, method: str) -> Problem:
    away = isinstance(answer, Unavailable)
    services().counts.logins.labels(method, "unavailable" if away else "wrong").inc()
    if isinstance(answer, Unavailable):
        log.warning("the login method %s can't be asked: %s", method, answer.detail)
    return Problem(Refused.LOGIN_UNAVAILABLE if away else Refused.LOGIN_REFUSED)


def _enter(who: Identity, name: str) -> Identity:
    """Begin a login; `name` is what this browser is known by from now on."""
    parts = services()
    old = session.get(LOGIN)
    if isinstance(old, str):
        parts.logins.close(old)
        parts.grants.sweep()
    browser = session.get(_BROWSER) or secrets.token_hex(16)
    session.clear()  # nothing from before the login is good after it, the CSRF token included
    session.update({LOGIN: parts.logins.open(who, parts.settings.login_s), _BROWSER: browser, _WAS: name})
    session.permanent = True
    parts.people.reads(who.user, language())
    parts.audit.note(who.user, client_address(), "login", detail=who.method)
    return who
