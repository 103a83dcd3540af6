"""Why one host did not get one session, and what would become of a request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from deskfleet.schemas.errors import SENTENCES, Reason
from deskfleet.schemas.session import Resources


@dataclass(frozen=True, slots=True)
class Verdict:
    """A refusal by one host, or by a rule of the queue when `host` is empty: machine-readable, with the figures behind
    it in `detail`."""

    host: str
    reason: Reason
    detail: str = ""

    @property
    def text(self) -> str:
        """Why, without the host."""
        return self.detail or SENTENCES[self.reason]

    @property
    def sentence(self) -> str:
        """What a person reads."""
        return f"{self.host}: {self.text}" if self.host else self.text


class Outlook(StrEnum):
    """What a request can expect."""

    NOW = "now"
    WAITS = "waits"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would become of a request. NOW: on `host`, `why` says what spoke for it; `instant` when it is forked there
    from a template. WAITS: at `place` of the queue (1 = next), for about `estimate_s` seconds at most (None: unknown).
    NEVER: `why` says so, `largest` is the largest size of this machine that some host could give (None: none at all).
    """

    outlook: Outlook
    host: str = ""
    place: int = 0
    estimate_s: float | None = None
    why: str = ""
    largest: Resources | None = None
    verdicts: tuple[Verdict, ...] = ()
    instant: bool = False
