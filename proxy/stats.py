"""What the proxy counts. Plain numbers: the tunnels' own are added up when somebody asks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from deskfleet.proxy.tunnel import Ending


@dataclass(slots=True)
class Stats:
    """Counts since the start; bytes are those of tunnels that have ended."""

    opened: int = 0
    up: int = 0
    down: int = 0
    #: By `tunnel.Ending`.
    endings: Counter[str] = field(default_factory=Counter)
    #: By `refusals.Refused`.
    refused: Counter[str] = field(default_factory=Counter)
    #: Messages of the bus that were dropped, by why.
    dropped: Counter[str] = field(default_factory=Counter)

    def ended(self, ending: Ending, up: int, down: int) -> None:
        """Count a tunnel that is over."""
        self.endings[ending] += 1
        self.up += up
        self.down += down
