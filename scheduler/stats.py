"""What the scheduler counts. Plain figures, so that counting costs a decision nothing; `figures` shows them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from deskfleet.schemas.errors import Reason

#: Upper bounds of the buckets for the time of one decision, in seconds.
BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(slots=True)
class Stats:
    """Since the start of this process: sessions placed, refusals by reason (once each time that they change), failed
    starts by host, and how long the transactions with their decisions took."""

    placed: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    took: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    took_sum_s: float = 0.0

    def took_s(self, seconds: float) -> None:
        """One transaction took so long."""
        place = next((number for number, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))
        self.took[place] += 1
        self.took_sum_s += seconds
