"""Why a console connection was refused: one table from reason to HTTP status and sentence.

A refusal is a small HTTP answer with a JSON body; the connection closes after it.
"""

from __future__ import annotations

import json
from enum import StrEnum
from http import HTTPStatus

from deskfleet.schemas.errors import DeskfleetError


class Refused(StrEnum):
    """The machine-readable half of a refusal; also the label under which it is counted."""

    BAD_REQUEST = "bad_request"
    HEAD_TOO_LARGE = "head_too_large"
    HEAD_TIMEOUT = "head_timeout"
    NO_SUCH_PATH = "no_such_path"
    BAD_ORIGIN = "bad_origin"
    BAD_TICKET = "bad_ticket"
    REVOKED = "revoked"
    TICKET_USED = "ticket_used"
    SESSION_MOVED = "session_moved"
    SESSION_ENDED = "session_ended"
    SESSION_FULL = "session_full"
    PROXY_FULL = "proxy_full"
    NOT_READY = "not_ready"
    HOST_SILENT = "host_silent"
    HOST_FULL = "host_full"
    HOST_FAILED = "host_failed"
    HOST_TIMEOUT = "host_timeout"


ANSWERS: dict[Refused, tuple[HTTPStatus, str]] = {
    Refused.BAD_REQUEST: (HTTPStatus.BAD_REQUEST, "This is not a WebSocket request that the console accepts."),
    Refused.HEAD_TOO_LARGE: (
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        "The request is too long. Clear this site's cookies and try again.",
    ),
    Refused.HEAD_TIMEOUT: (HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time. Try again."),
    Refused.NO_SUCH_PATH: (HTTPStatus.NOT_FOUND, "Nothing is served here. Open the desktop from its page."),
    Refused.BAD_ORIGIN: (
        HTTPStatus.FORBIDDEN,
        "This page may not open a console. Open the desktop from the portal.",
    ),
    Refused.BAD_TICKET: (HTTPStatus.FORBIDDEN, "The console ticket is not valid any more. Reload the desktop's page."),
    Refused.REVOKED: (HTTPStatus.FORBIDDEN, "The right to open this desktop was taken back."),
    Refused.TICKET_USED: (HTTPStatus.FORBIDDEN, "The console ticket was used before. Reload the desktop's page."),
    Refused.SESSION_MOVED: (
        HTTPStatus.CONFLICT,
        "The desktop was started again after this ticket was made. Reload the desktop's page.",
    ),
    Refused.SESSION_ENDED: (HTTPStatus.CONFLICT, "The desktop has ended."),
    Refused.SESSION_FULL: (
        HTTPStatus.TOO_MANY_REQUESTS,
        "Too many consoles of this desktop are open. Close one and try again.",
    ),
    Refused.PROXY_FULL: (HTTPStatus.SERVICE_UNAVAILABLE, "Too many consoles are open. Try again in a moment."),
    Refused.NOT_READY: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The console service has just started and does not know all hosts yet. Try again in a moment.",
    ),
    Refused.HOST_SILENT: (
        HTTPStatus.BAD_GATEWAY,
        "The desktop's host has not reported for a while. Try again; if it persists, tell an administrator.",
    ),
    Refused.HOST_FULL: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "Too many consoles are open on the desktop's host. Try again later.",
    ),
    Refused.HOST_FAILED: (
        HTTPStatus.BAD_GATEWAY,
        "The desktop's host can't be reached. Try again; if it persists, tell an administrator.",
    ),
    Refused.HOST_TIMEOUT: (
        HTTPStatus.GATEWAY_TIMEOUT,
        "The desktop's host did not answer in time. Try again; if it persists, tell an administrator.",
    ),
}


class Refusal(DeskfleetError):
    """Raised when a connection is refused; `detail` is for the log and never holds a ticket or a query."""

    def __init__(self, reason: Refused, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


def answer(refusal: Refusal) -> bytes:
    """The HTTP answer. Only a malformed request is told the detail: it is about the request itself, not about us."""
    status, sentence = ANSWERS[refusal.reason]
    if refusal.reason is Refused.BAD_REQUEST and refusal.detail:
        sentence += f" Problem: {refusal.detail}."
    body = json.dumps({"reason": refusal.reason.value, "message": sentence}).encode()
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    ).encode() + body
