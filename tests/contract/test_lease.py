"""The right to decide, on SQLite and PostgreSQL: one leader, and whoever was one changes nothing any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.test_ledger import a_session, postgres, url
from sqlalchemy import Engine

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.lease import Demoted, Lease, Standing
from deskfleet.ledger.reader import Reader
from deskfleet.ledger.writer import Writer

__all__ = ["postgres", "url"]


@pytest.fixture
def engine(url: str, tmp_path: Path) -> Iterator[Engine]:
    engine = open_engine(url)
    migrate(engine)
    yield engine
    engine.dispose()


def test_who_saw_it_first_leads_and_the_other_does_not(engine: Engine) -> None:
    one, two = Lease(engine, "one"), Lease(engine, "two")
    seen = one.look()
    assert seen == Standing(0, 0, "")
    assert one.take(seen) and not two.take(seen)
    assert two.look() == Standing(1, 0, "one")


def test_a_sign_of_life_puts_what_was_seen_before_out_of_force(engine: Engine) -> None:
    one, two = Lease(engine, "one"), Lease(engine, "two")
    one.take(one.look())
    seen = two.look()
    one.renew()
    assert two.look() != seen and not two.take(seen)


def test_c33_who_led_before_changes_nothing_not_even_in_part(engine: Engine) -> None:
    one, two = Lease(engine, "one"), Lease(engine, "two")
    one.take(one.look())
    old, new = Writer(engine, one), Writer(engine, two)
    with old.begin() as tx:
        tx.add(a_session(1))
    assert two.take(two.look())
    with pytest.raises(Demoted), old.begin() as tx:
        tx.add(a_session(2))
    with pytest.raises(Demoted), old.begin() as tx:
        tx.prove()
    with pytest.raises(Demoted):
        one.renew()
    one.release()
    assert two.look().owner == "two", "letting go of what one does not hold frees nothing"
    with new.begin() as tx:
        tx.add(a_session(3))
    assert {session.sid for session in Reader(engine).live()} == {a_session(1).sid, a_session(3).sid}


def test_what_was_let_go_is_free_at_once(engine: Engine) -> None:
    one, two = Lease(engine, "one"), Lease(engine, "two")
    one.take(one.look())
    one.release()
    assert two.look().owner == "" and two.take(two.look())
    two.renew()


def test_a_transaction_that_asks_and_changes_nothing_costs_nothing(engine: Engine) -> None:
    one = Lease(engine, "one")
    one.take(one.look())
    before = one.look()
    with Writer(engine, one).begin():
        pass
    assert one.look() == before
