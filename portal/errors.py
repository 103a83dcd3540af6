"""How the portal refuses: one table from reason to HTTP status and sentence, for pages and for the HTTP API."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from http import HTTPStatus

from deskfleet.portal.languages import N_, gettext
from deskfleet.portal.words import duration
from deskfleet.schemas.errors import SENTENCES, DeskfleetError, Reason


class Refused(StrEnum):
    """The machine-readable half of a refusal."""

    BAD_REQUEST = "bad_request"
    BAD_FIELDS = "bad_fields"
    STALE_FORM = "stale_form"
    FOREIGN_PAGE = "foreign_page"
    NOT_LOGGED_IN = "not_logged_in"
    WRONG_PASSWORD = "wrong_password"  # noqa: S105  a reason, not a password
    LOGIN_UNAVAILABLE = "login_unavailable"
    LOGIN_REFUSED = "login_refused"
    BAD_ADDRESS = "bad_address"
    CODE_WRONG = "code_wrong"
    CODE_EXPIRED = "code_expired"
    CODE_USED_UP = "code_used_up"
    MAIL_UNAVAILABLE = "mail_unavailable"
    SINGLE_SHOT_ONLY = "single_shot_only"
    SLOW_DOWN = "slow_down"
    NOT_ALLOWED = "not_allowed"
    NOT_FOUND = "not_found"
    NO_SUCH_DESKTOP = "no_such_desktop"
    NO_SUCH_HOST = "no_such_host"
    UNKNOWN_MACHINE = "unknown_machine"
    BAD_RESOURCES = "bad_resources"
    NEVER_FITS = "never_fits"
    SID_TAKEN = "sid_taken"
    TOO_MANY_REQUESTS = "too_many_requests"
    NOT_RUNNING = "not_running"
    LONGEST = "longest"
    SHARING_OFF = "sharing_off"
    WATCH_ONLY = "watch_only"
    TOO_MANY_LINKS = "too_many_links"
    BAD_LINK = "bad_link"
    WRONG_PASSPHRASE = "wrong_passphrase"  # noqa: S105
    ENDED = "ended"
    NO_SUCH_LETTER = "no_such_letter"
    NOT_REPLAYABLE = "not_replayable"
    NOT_CONFIRMED = "not_confirmed"
    COOKIE_NEEDED = "cookie_needed"
    OUT_OF_SCOPE = "out_of_scope"
    TOO_MANY_TOKENS = "too_many_tokens"
    QUEUE_AWAY = "queue_away"
    RECORDS_AWAY = "records_away"
    BROKEN = "broken"


ANSWERS: dict[Refused, tuple[HTTPStatus, str]] = {
    Refused.BAD_REQUEST: (HTTPStatus.BAD_REQUEST, N_("The portal does not understand this request.")),
    Refused.BAD_FIELDS: (HTTPStatus.UNPROCESSABLE_ENTITY, N_("Something in this request is missing or not valid.")),
    Refused.STALE_FORM: (
        HTTPStatus.BAD_REQUEST,
        N_("This page was open for too long or belongs to another login. Go back, reload it and try again."),
    ),
    Refused.FOREIGN_PAGE: (HTTPStatus.FORBIDDEN, N_("Another site may not do this. Open the portal and do it there.")),
    Refused.NOT_LOGGED_IN: (HTTPStatus.UNAUTHORIZED, N_("Log in first.")),
    Refused.WRONG_PASSWORD: (HTTPStatus.UNAUTHORIZED, N_("Name or password is wrong.")),
    Refused.LONGEST: (
        HTTPStatus.CONFLICT,
        N_("This desktop lasts as long as any may already. Save your work, and start another when it has ended."),
    ),
    Refused.SHARING_OFF: (HTTPStatus.FORBIDDEN, N_("This site does not allow that desktops are shared in this way.")),
    Refused.WATCH_ONLY: (
        HTTPStatus.UNPROCESSABLE_ENTITY,
        N_("Links for watching only can't be made yet: nothing would keep the guest from typing. Nothing was shared."),
    ),
    Refused.TOO_MANY_LINKS: (HTTPStatus.CONFLICT, N_("This desktop has very many links. Take one back first.")),
    Refused.BAD_LINK: (
        HTTPStatus.NOT_FOUND,
        N_("This link opens nothing: its time is over, it was taken back, or it is not complete. Ask for a new one."),
    ),
    Refused.WRONG_PASSPHRASE: (HTTPStatus.UNAUTHORIZED, N_("The passphrase is wrong. Ask whoever gave you the link.")),
    Refused.LOGIN_UNAVAILABLE: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        N_("Your password can't be checked at the moment. It is not your fault; try again in a minute."),
    ),
    Refused.LOGIN_REFUSED: (
        HTTPStatus.FORBIDDEN,
        N_("You could not be logged in this way. Try again; if it persists, ask an administrator whether you may."),
    ),
    Refused.BAD_ADDRESS: (HTTPStatus.BAD_REQUEST, N_("This is not a mail address. Type one, such as ada@example.org.")),
    Refused.CODE_WRONG: (HTTPStatus.UNAUTHORIZED, N_("The code is wrong. Look at the newest mail, and type it again.")),
    Refused.CODE_EXPIRED: (HTTPStatus.UNAUTHORIZED, N_("This code is not good any more. Ask for a new one.")),
    Refused.CODE_USED_UP: (
        HTTPStatus.UNAUTHORIZED,
        N_("This code has been used, or typed wrongly too often. Ask for a new one."),
    ),
    Refused.MAIL_UNAVAILABLE: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        N_("No mails can be sent at the moment. It is not your fault; try again in a minute."),
    ),
    Refused.SINGLE_SHOT_ONLY: (
        HTTPStatus.UNPROCESSABLE_ENTITY,
        N_(
            "Who logs in by a code that comes by mail gets single-shot desktops only: "
            "they end when nobody looks at them."
        ),
    ),
    Refused.SLOW_DOWN: (HTTPStatus.TOO_MANY_REQUESTS, N_("Too many tries.")),
    Refused.NOT_ALLOWED: (HTTPStatus.FORBIDDEN, N_("Your account may not do this. Ask an administrator.")),
    Refused.NOT_FOUND: (HTTPStatus.NOT_FOUND, N_("There is no such page.")),
    Refused.NO_SUCH_DESKTOP: (
        HTTPStatus.NOT_FOUND,
        N_("You have no such desktop. It may be another person's; your own stand under My desktops."),
    ),
    Refused.NO_SUCH_HOST: (HTTPStatus.NOT_FOUND, N_("No host of this name has ever reported.")),
    Refused.UNKNOWN_MACHINE: (
        HTTPStatus.NOT_FOUND,
        N_("There is no such machine, or your account may not use it. Pick one from the launch page."),
    ),
    Refused.BAD_RESOURCES: (
        HTTPStatus.UNPROCESSABLE_ENTITY,
        N_("The size asked for is outside what this machine allows."),
    ),
    Refused.NEVER_FITS: (HTTPStatus.UNPROCESSABLE_ENTITY, SENTENCES[Reason.NEVER_FITS]),
    Refused.SID_TAKEN: (HTTPStatus.CONFLICT, N_("This id is taken. Use a new one for a new desktop.")),
    Refused.TOO_MANY_REQUESTS: (
        HTTPStatus.TOO_MANY_REQUESTS,
        N_("You have too many requests that have not been taken up yet. Wait for them, or stop some."),
    ),
    Refused.NOT_RUNNING: (HTTPStatus.CONFLICT, N_("The desktop is not running yet.")),
    Refused.ENDED: (HTTPStatus.CONFLICT, N_("The desktop has ended.")),
    Refused.NO_SUCH_LETTER: (
        HTTPStatus.NOT_FOUND,
        N_("There is no such dead letter any more: it was sent again, discarded, or became too old."),
    ),
    Refused.NOT_REPLAYABLE: (HTTPStatus.CONFLICT, N_("This dead letter can't be sent again.")),
    Refused.NOT_CONFIRMED: (
        HTTPStatus.CONFLICT,
        N_("Nothing was done: what was typed is not what is there now. Look again, and confirm what you see."),
    ),
    Refused.COOKIE_NEEDED: (
        HTTPStatus.FORBIDDEN,
        N_("A token can't make or remove tokens. Log in with your password."),
    ),
    Refused.OUT_OF_SCOPE: (
        HTTPStatus.FORBIDDEN,
        N_("This token is not good for that. Make one with the scope it needs."),
    ),
    Refused.TOO_MANY_TOKENS: (HTTPStatus.CONFLICT, N_("You have very many tokens. Remove one first.")),
    Refused.QUEUE_AWAY: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        N_("The message queue can't be reached, so nothing was changed. Try again in a moment."),
    ),
    Refused.RECORDS_AWAY: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        N_("The records can't be read at the moment. Desktops that run keep running; try again in a moment."),
    ),
    Refused.BROKEN: (
        HTTPStatus.INTERNAL_SERVER_ERROR,
        N_("Something went wrong in the portal. Try again; if it persists, tell an administrator the reference below."),
    ),
}


class Problem(DeskfleetError):
    """Raised when a request is refused; `message` replaces the reason's own sentence, `details` go below it.

    Both are in the language of who asks.
    """

    def __init__(self, reason: Refused, message: str = "", details: Sequence[str] = (), wait_s: int = 0) -> None:
        self.reason = reason
        self.status, sentence = ANSWERS[reason]
        self.message = message or gettext(sentence)
        self.details = tuple(details)
        self.wait_s = wait_s
        super().__init__(f"{reason}: {self.message}")


def slow_down(wait_s: int) -> Problem:
    """The refusal of somebody who tried too often; `wait_s` is when they may try again, in seconds."""
    message = gettext("Too many tries. Try again in %(time)s.", time=duration(wait_s))
    return Problem(Refused.SLOW_DOWN, message, wait_s=wait_s)
