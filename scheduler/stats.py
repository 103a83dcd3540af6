"""What the scheduler counts. Plain figures, so that counting costs a decision nothing; `figures` shows them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from deskfleet.schemas.errors import Reason
from deskfleet.schemas.session import Birth

#: Upper bounds of the buckets in seconds: for one decision, and for what people wait for.
DECISION_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
PEOPLE_S = (0.1, 0.2, 0.5, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)


@dataclass(slots=True)
class Times:
    """How often something took how long: `counts` has a place for each bound, and one for whatever took longer."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        """It took so long once more."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds


@dataclass(slots=True)
class Stats:
    """Since the start of this process: sessions placed, refusals by reason (once each time that they change), failed
    starts by host, how long the transactions with their decisions took, how long people waited for a place, and then
    for a desktop that runs, by how it came to be."""

    placed: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    took: Times = field(default_factory=lambda: Times(DECISION_S))
    waited: Times = field(default_factory=lambda: Times(PEOPLE_S))
    started: dict[Birth, Times] = field(default_factory=lambda: {birth: Times(PEOPLE_S) for birth in Birth})
