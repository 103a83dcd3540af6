"""Console tickets: a signed, short-lived right to open one desktop once.

The portal signs, the proxy verifies, the host makes it single-use by its nonce. Signing is itsdangerous'
(HMAC with a timestamp); several keys may be given so that an old one can be retired without cutting anybody off.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from itsdangerous import BadSignature, TimestampSigner, URLSafeTimedSerializer

from deskfleet.schemas.errors import TicketError
from deskfleet.schemas.host import HOST

LIFETIME_S = 30
#: By how much the clock of whoever verifies may be behind that of whoever has signed.
SKEW_S = 5
SID = re.compile(r"[0-9a-f]{32}")
NONCE = re.compile(r"[0-9a-f]{32}")
GRANT = re.compile(r"[a-z]{4,8}-[0-9a-f]{16}")


class Mode(StrEnum):
    """What the holder may do. Watching only is not offered until the proxy enforces it."""

    FULL = "full"


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right of `user` to open the desktop `sid` where `host` has started it under `generation`; `nonce` is 32 hex
    digits. `grant` names what the right comes from, a login or a share: when that ends, the consoles end with it."""

    sid: str
    user: str
    grant: str
    host: str
    generation: int
    mode: Mode
    nonce: str


class _Signer(TimestampSigner):
    """Stamps with the time of a given clock."""

    def __init__(self, *args: Any, wall: Callable[[], float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._wall = wall

    def get_timestamp(self) -> int:
        """Whole seconds since 1970 UTC."""
        return int(self._wall())


class Tickets:
    """Signs and verifies tickets. The last key signs; every key verifies. `wall` are seconds since 1970 UTC."""

    def __init__(self, keys: Sequence[str], wall: Callable[[], float] = time.time) -> None:
        if not keys or any(len(key) < 32 for key in keys):
            raise TicketError("each ticket key must have at least 32 characters")
        self._wall = wall
        self._serializer = URLSafeTimedSerializer(
            list(keys), salt="deskfleet.console.3", signer=_Signer, signer_kwargs={"wall": wall}
        )

    def sign(self, ticket: Ticket) -> str:
        """The ticket as text that is safe in a URL."""
        content = [
            ticket.sid,
            ticket.user,
            ticket.grant,
            ticket.host,
            ticket.generation,
            ticket.mode.value,
            ticket.nonce,
        ]
        return str(self._serializer.dumps(content))

    def verify(self, text: str) -> Ticket:
        """The ticket that `text` holds.

        Raises:
            TicketError: forged, older than `LIFETIME_S`, from further in the future than `SKEW_S`, or malformed; which
                one is not told apart, since only an attacker would profit.
        """
        try:
            content, signed_at = self._serializer.loads(text, return_timestamp=True)
            # The age is judged here: given a `max_age`, itsdangerous refuses whatever its own clock is behind of.
            if not -SKEW_S <= int(self._wall()) - signed_at.timestamp() <= LIFETIME_S:
                raise ValueError
            sid, user, grant, host, generation, mode, nonce = content
            if not all(p.fullmatch(t) for p, t in ((SID, sid), (GRANT, grant), (HOST, host), (NONCE, nonce))):
                raise ValueError
            if not isinstance(generation, int):
                raise ValueError
            return Ticket(sid, str(user), grant, host, generation, Mode(mode), nonce)
        except (BadSignature, ValueError, TypeError, UnicodeError, OverflowError):
            raise TicketError("this ticket is not valid or no longer valid") from None
