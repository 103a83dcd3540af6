"""A burst on a fleet of some size: what it comes to, not how long it takes (bench/scale measures that, and larger)."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.scale import burst
from sqlalchemy import Engine

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.scheduler import waiting


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


def test_a_queue_of_many_lifetimes_asks_the_hosts_no_more_often_than_one_of_a_few(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five hundred different requests wait: with each batch and each sweep, hosts are looked at for each kind of
    answer that there can be, not for each request. Otherwise a long queue would keep the scheduler from everything."""
    looks: list[str] = []

    def counted(name: str) -> None:
        real = getattr(waiting, name)
        monkeypatch.setattr(waiting, name, lambda *arguments: looks.append(name) or real(*arguments))

    counted("choose")
    counted("explain")
    made = burst(engine, hosts=10, guests=2, launches=500, room=2)
    assert dict(made.states) == {"queued": 500}
    # Five batches and a sweep; before and after room is kept, for those that end before it is needed and the others.
    assert looks.count("choose") <= 6 * 4 and looks.count("explain") <= 6 * 2
