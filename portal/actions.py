"""What people do, whether by a page or by the API: every change goes through here, is audited and counted."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Collection

from deskfleet.portal import words
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem, Refused, slow_down
from deskfleet.portal.languages import english, gettext
from deskfleet.portal.launching import Wish, prepare
from deskfleet.portal.logins import TokenInfo
from deskfleet.portal.scopes import Scope, stored
from deskfleet.portal.services import services
from deskfleet.portal.shares import MOST as MOST_LINKS
from deskfleet.portal.shares import Audience, Share
from deskfleet.portal.throttle import counters
from deskfleet.portal.web import by_token, client_address, grant, mine, own_desktop, person, someone
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.template import TemplateOrder
from deskfleet.schemas.tickets import LIFETIME_S, Mode, Ticket
from deskfleet.schemas.verdict import Forecast

#: So many threads wait for desktops that are forked, each for so many looks.
_waiting = threading.BoundedSemaphore(4)
_LOOKS, _LOOK_S = 50, 0.02

#: Unanswered requests that one person may have: enough for a class, too few to fill the disk.
MOST_WAITING = 20
#: Access tokens that one person may have.
MOST_TOKENS = 50
_DAY_S = 24 * 3600


def launch(wish: Wish, sid: str, via: str) -> tuple[LaunchRequested, bool]:
    """Store a launch and begin to send it; the second value is False when this very request was stored before.

    Raises:
        Problem: not possible as asked or on any host, the sid is somebody else's, or too many requests wait.
    """
    parts, who = services(), person()
    message = prepare(sid, wish, who, parts.catalogue.machines(), parts.settings)
    known = parts.desktops.owner(sid)
    if known is not None:
        if known != who.user:
            raise Problem(Refused.SID_TAKEN)
        return message, False
    if parts.outbox.waiting(who.user) >= MOST_WAITING:
        raise Problem(Refused.TOO_MANY_REQUESTS)
    # When nobody can tell, the launch is stored all the same: the scheduler judges it when it comes.
    forecast = parts.forecasts.never(message)
    if forecast is not None:
        parts.counts.never.inc()
        raise Problem(Refused.NEVER_FITS, words.never(forecast))
    new = parts.outbox.launch(message)
    if new:
        parts.counts.launches.labels(via).inc()
        accepted = parts.settings.brand.terms_name
        detail = f"{wish.machine}, terms {accepted}" if accepted else wish.machine
        parts.audit.note(who.user, client_address(), "launch", sid, detail)
    return message, new


def foresee(wish: Wish) -> tuple[LaunchRequested, Forecast | None]:
    """What a wish amounts to, and what would become of it now; None when nobody can tell. Nothing is stored.

    Raises:
        Problem: not possible as asked.
    """
    parts = services()
    message = prepare(secrets.token_hex(16), wish, person(), parts.catalogue.machines(), parts.settings)
    forecast = parts.forecasts.ask(message)
    parts.counts.forecasts.labels(forecast.outlook.value if forecast else "unknown").inc()
    return message, forecast


def stop(sid: str) -> Desktop:
    """Store a stop and begin to send it. Nothing happens to a desktop that has ended."""
    desktop, who = own_desktop(sid), person()
    if not desktop.over:
        services().outbox.stop(sid, who.user, who.admin)
        services().audit.note(who.user, client_address(), "stop", sid, f"of {desktop.user}")
    return services().desktops.find(sid) or desktop


def extend(sid: str, extra_s: int) -> Desktop:
    """Ask that a running desktop lasts `extra_s` seconds longer, up to what the site allows.

    Raises:
        Problem: it does not run, lasts as long as it may already, or the queue can't be reached.
    """
    desktop, who, parts = own_desktop(sid), person(), services()
    if desktop.over:
        raise Problem(Refused.ENDED, desktop.sentence)
    if not desktop.running or desktop.unsure:
        raise Problem(Refused.NOT_RUNNING, desktop.sentence)
    # In all, not so much more: the same click twice asks for the same.
    lifetime_s = min(desktop.lifetime_s + extra_s, parts.settings.lifetime_max_s)
    if lifetime_s <= desktop.lifetime_s:
        raise Problem(Refused.LONGEST)
    parts.fleet.extend(sid, who.user, who.admin, lifetime_s)
    with english():
        detail = f"to {words.duration(lifetime_s)}, of {desktop.user}"
    parts.audit.note(who.user, client_address(), "extend", sid, detail)
    return desktop


def ticket(sid: str) -> dict[str, object]:
    """A fresh ticket for the console of a running desktop.

    Raises:
        Problem: it does not run yet, or not any more.
    """
    desktop, who, parts = own_desktop(sid), person(), services()
    if desktop.user != who.user:
        parts.audit.note(who.user, client_address(), "console", sid, f"of {desktop.user}")
    return _ticket(desktop, who.user, grant())


def _ticket(desktop: Desktop, user: str, by: str) -> dict[str, object]:
    parts = services()
    if desktop.over:
        raise Problem(Refused.ENDED, desktop.sentence)
    if not desktop.running or desktop.unsure:
        raise Problem(Refused.NOT_RUNNING, desktop.sentence)
    right = Ticket(desktop.sid, user, by, desktop.host, desktop.generation, Mode.FULL, secrets.token_hex(16))
    signed = parts.tickets.sign(right)
    parts.counts.tickets.inc()
    return {
        "ticket": signed,
        "console_url": parts.settings.console_url,
        "generation": desktop.generation,
        "expires_in_s": LIFETIME_S,
    }


def share(sid: str, audience: Audience, lifetime_s: int, passphrase: str, *, watch: bool) -> tuple[str, Share]:
    """Make a link by which others may open one's own desktop: its secret, and what is kept of it.

    Raises:
        Problem: it is not one's own or has ended, the site does not allow it, or it could not be enforced.
    """
    desktop, who, parts = mine(sid), person(), services()
    if desktop.over:
        raise Problem(Refused.ENDED, desktop.sentence)
    if parts.settings.sharing == "off" or (audience is Audience.ANYBODY and parts.settings.sharing != "anybody"):
        raise Problem(Refused.SHARING_OFF)
    if watch:
        raise Problem(Refused.WATCH_ONLY)
    if len(parts.shares.of(sid)) >= MOST_LINKS:
        raise Problem(Refused.TOO_MANY_LINKS)
    secret, made = parts.shares.make(sid, who.user, audience, min(lifetime_s, parts.settings.share_max_s), passphrase)
    parts.audit.note(who.user, client_address(), "share", sid, f"{made.name}, {audience.value}")
    return secret, made


def unshare(sid: str, name: str) -> None:
    """Take a link back; what is open by it is cut. An administrator may do that for anybody. Raises Problem."""
    desktop = own_desktop(sid)
    if not services().shares.revoke(sid, name):
        raise Problem(Refused.BAD_LINK)
    services().audit.note(person().user, client_address(), "unshare", sid, f"{name}, of {desktop.user}")


def open_link(secret: str, passphrase: str) -> Share:
    """Look at a link, and check its passphrase.

    Raises:
        Problem: it opens nothing, needs a login or another passphrase, or was tried too often.
    """
    parts = services()
    found = parts.shares.find(secret)
    if found is None or not _audience_allows(found):
        raise Problem(Refused.BAD_LINK)
    if found.locked:
        against = counters(found.grant, client_address(), "")
        wait_s = parts.throttle.begin(against)
        if wait_s:
            raise slow_down(wait_s)
        if not parts.shares.opens(found, passphrase):
            raise Problem(Refused.WRONG_PASSPHRASE)
        parts.throttle.forgive(against, all_of_it=True)
    return found


def shared_desktop(found: Share) -> Desktop:
    """The desktop of a link that was opened. Raises Problem when it is gone, or its owner no longer the same."""
    desktop = services().desktops.find(found.sid)
    if desktop is None or desktop.user != found.owner or not _audience_allows(found):
        raise Problem(Refused.BAD_LINK)
    return desktop


def _audience_allows(found: Share) -> bool:
    """Whether the site and the link let whoever asks in."""
    sharing = services().settings.sharing
    if sharing == "off" or (found.audience is Audience.ANYBODY and sharing != "anybody"):
        return False
    return found.audience is Audience.ANYBODY or someone() is not None


def shared_ticket(found: Share) -> dict[str, object]:
    """A fresh ticket for the desktop of a link that was opened. Raises Problem."""
    who = someone()
    desktop = shared_desktop(found)
    services().audit.note(who.user if who else "guest", client_address(), "shared console", found.sid, found.name)
    return _ticket(desktop, who.user if who else "guest", found.grant)


def runs_soon(sid: str) -> bool:
    """Whether a desktop that was just asked for runs within a second: one that is forked does, and then nobody needs to
    be shown how it starts. A few threads of the portal at most wait like that; who comes then watches the page."""
    if not _waiting.acquire(blocking=False):
        return False
    try:
        for _ in range(_LOOKS):
            desktop = services().desktops.find(sid)
            if desktop is None or not desktop.waiting:
                return desktop is not None and desktop.running and not desktop.host_silent
            time.sleep(_LOOK_S)
    finally:
        _waiting.release()
    return False


def _by_login() -> str:
    """Who is logged in, not by a token: one that leaked must not make others that outlive it. Raises Problem."""
    if by_token():
        raise Problem(Refused.COOKIE_NEEDED)
    return person().user


def tokens() -> list[TokenInfo]:
    """The access tokens of whoever asks, without their secrets. Raises Problem."""
    return services().logins.tokens_of(_by_login())


def make_token(label: str, days: int, scopes: Collection[Scope]) -> tuple[str, TokenInfo]:
    """A new access token of whoever asks: its secret, and what is kept of it. Raises Problem."""
    user, parts = _by_login(), services()
    if len(tokens()) >= MOST_TOKENS:
        raise Problem(Refused.TOO_MANY_TOKENS)
    secret, info = parts.logins.make_token(person(), label, days * _DAY_S, scopes)
    parts.audit.note(user, client_address(), "token made", info.name, f"{stored(info.scopes)}: {info.label}")
    return secret, info


def drop_token(name: str) -> None:
    """Remove an access token of whoever asks; it is worth nothing from then on. Raises Problem."""
    user = _by_login()
    if not services().logins.drop_token(user, name):
        raise Problem(Refused.NOT_FOUND, gettext("You have no token of this name."))
    services().audit.note(user, client_address(), "token removed", name)


def order_template(host: str, key: str, order: TemplateOrder) -> None:
    """Have a host's template made anew, or removed. Raises Problem."""
    who = person()
    services().fleet.order_template(host, key, order, who.user)
    services().audit.note(who.user, client_address(), f"{order} template", host, key)


def drain(host: str, draining: bool, text: str = "") -> None:
    """Take a host out of placement, or put it back; `text` is for the people who use it. Raises Problem."""
    who = person()
    services().fleet.drain(host, draining, who.user, text)
    services().audit.note(who.user, client_address(), "drain" if draining else "undrain", host, text)


def declare_dead(host: str) -> None:
    """Give up what a host runs, because it surely does not run. Raises Problem."""
    who = person()
    services().fleet.declare_dead(host, who.user)
    services().audit.note(who.user, client_address(), "declare dead", host)
