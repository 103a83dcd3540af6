"""A burst on a fleet of some size: what it comes to, not how long it takes (bench/scale measures that, and larger)."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.scale import burst
from sqlalchemy import Engine

from deskfleet.ledger.engine import migrate, open_engine


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrate(engine)
    return engine


def test_a_burst_is_placed_whole_once_and_evenly(engine: Engine) -> None:
    made = burst(engine, hosts=200, guests=25, launches=1000)
    assert dict(made.states) == {"running": 1000}
    assert (made.lost, made.twice, made.spread) == (0, 0, 0)
    assert made.counts == [30] * 200


def test_what_does_not_fit_waits_in_order_and_the_rest_is_placed_evenly(engine: Engine) -> None:
    made = burst(engine, hosts=199, guests=25, launches=1000, room=28)
    assert dict(made.states) == {"running": 3 * 199, "queued": 1000 - 3 * 199}
    assert (made.lost, made.twice, made.spread) == (0, 0, 0)
    assert made.places == list(range(1, 1 + 1000 - 3 * 199)), "in the order in which they asked, each with its place"
