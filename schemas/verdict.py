"""Why one host did not get one session."""

from __future__ import annotations

from dataclasses import dataclass

from deskfleet.schemas.errors import SENTENCES, Reason


@dataclass(frozen=True, slots=True)
class Verdict:
    """A refusal by one host: machine-readable, with the figures behind it in `detail`."""

    host: str
    reason: Reason
    detail: str = ""

    @property
    def sentence(self) -> str:
        """What a person reads."""
        return f"{self.host}: {self.detail}" if self.detail else f"{self.host}: {SENTENCES[self.reason]}"
