"""Console tickets: a signed, short-lived right to open one desktop once.

The portal signs, the proxy verifies, the host makes it single-use by its nonce. Signing is itsdangerous'
(HMAC with a timestamp); several keys may be given so that an old one can be retired without cutting anybody off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from itsdangerous import BadSignature, URLSafeTimedSerializer

from deskfleet.schemas.errors import TicketError

LIFETIME_S = 30
SID = re.compile(r"[0-9a-f]{32}")
NONCE = re.compile(r"[0-9a-f]{32}")


class Mode(StrEnum):
    """What the holder may do. Watching only is not offered until the proxy enforces it."""

    FULL = "full"


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right of `user` to open the desktop `sid` as started under `generation`; `nonce` is 32 hex digits."""

    sid: str
    user: str
    generation: int
    mode: Mode
    nonce: str


class Tickets:
    """Signs and verifies tickets. The last key signs; every key verifies."""

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys or any(len(key) < 32 for key in keys):
            raise TicketError("each ticket key must have at least 32 characters")
        self._serializer = URLSafeTimedSerializer(list(keys), salt="deskfleet.console.1")

    def sign(self, ticket: Ticket) -> str:
        """The ticket as text that is safe in a URL."""
        return str(
            self._serializer.dumps([ticket.sid, ticket.user, ticket.generation, ticket.mode.value, ticket.nonce])
        )

    def verify(self, text: str, max_age_s: int = LIFETIME_S) -> Ticket:
        """The ticket that `text` holds.

        Raises:
            TicketError: forged, older than `max_age_s`, from the future, or malformed; which one is not told apart,
                since only an attacker would profit.
        """
        try:
            sid, user, generation, mode, nonce = self._serializer.loads(text, max_age=max_age_s)
            if not (SID.fullmatch(sid) and NONCE.fullmatch(nonce) and isinstance(generation, int)):
                raise ValueError
            return Ticket(sid, str(user), generation, Mode(mode), nonce)
        except (BadSignature, ValueError, TypeError, UnicodeError):
            raise TicketError("this ticket is not valid or no longer valid") from None
