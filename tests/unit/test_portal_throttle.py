"""Guessing gets slow; nobody is kept out by another person's guesses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.portals import World

from deskfleet.portal.throttle import Counter, Throttle, counters


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def guess(world: World, user: str, address: str, seconds: float = 0.0, browser: str = "") -> int:
    world.clock.now += seconds
    return world.portal.throttle.begin(counters(user, address, browser))


def test_the_delay_doubles_up_to_its_cap() -> None:
    counter = Counter("k", free=3, cap=60.0)
    assert [counter.delay(n) for n in (0, 2, 3, 4, 5, 9, 400)] == [0.0, 0.0, 1.0, 2.0, 4.0, 60.0, 60.0]


def test_a_guesser_is_slowed_and_a_refused_try_costs_nothing(world: World) -> None:
    assert [guess(world, "alice", "6.6.6.6") for _ in range(3)] == [0, 0, 0]
    assert guess(world, "alice", "6.6.6.6") == 1
    assert guess(world, "alice", "6.6.6.6") == 1, "who asks too early is not pushed further away"
    assert guess(world, "alice", "6.6.6.6", seconds=1) == 0
    assert guess(world, "alice", "6.6.6.6") == 2


def test_the_owner_elsewhere_gets_in_meanwhile(world: World) -> None:
    for _ in range(40):
        guess(world, "alice", "6.6.6.6")
    assert guess(world, "alice", "9.9.9.9") == 0
    assert guess(world, "bob", "9.9.9.9") == 0


def test_a_known_browser_is_not_touched_by_a_flood_from_everywhere(world: World) -> None:
    for n in range(200):
        guess(world, "alice", f"10.0.{n}.1")
    assert guess(world, "alice", "10.0.7.1") > 0, "the name as a whole is slow now for who failed before"
    assert guess(world, "alice", "10.1.0.1") == 0, "but nobody else can keep its owner out"
    assert guess(world, "alice", "10.1.0.2", browser="b1") == 0
    assert guess(world, "bob", "10.1.0.3") == 0


def test_a_flood_never_delays_a_stranger_for_long(world: World) -> None:
    for n in range(500):
        guess(world, "alice", f"10.0.{n % 250}.{n // 250}", seconds=0.1)
    assert guess(world, "alice", "10.9.9.9") <= 5


def test_one_address_can_not_try_many_names_fast(world: World) -> None:
    waits = [guess(world, f"user{n}", "6.6.6.6") for n in range(100)]
    assert waits[:30] == [0] * 30 and all(waits[31:])


def test_a_right_password_clears_the_persons_own_counter(world: World) -> None:
    against = counters("alice", "9.9.9.9", "")
    for _ in range(3):
        assert world.portal.throttle.begin(against) == 0
    world.clock.now += 60
    assert world.portal.throttle.begin(against) == 0
    world.portal.throttle.forgive(against, all_of_it=True)
    assert [world.portal.throttle.begin(against) for _ in range(3)] == [0, 0, 0]


def test_right_logins_of_ones_own_do_not_free_an_address_for_guessing(world: World) -> None:
    waits = []
    for n in range(60):
        waits.append(guess(world, f"user{n}", "6.6.6.6"))
        mine = counters("mallory", "6.6.6.6", "")
        if world.portal.throttle.begin(mine) == 0:
            world.portal.throttle.forgive(mine, all_of_it=True)
    assert any(waits)


def test_a_check_that_could_not_be_made_counts_nothing(world: World) -> None:
    against = counters("alice", "9.9.9.9", "")
    for _ in range(20):
        assert world.portal.throttle.begin(against) == 0
        world.portal.throttle.forgive(against, all_of_it=False)


def test_failures_are_forgotten(world: World) -> None:
    for _ in range(10):
        guess(world, "alice", "6.6.6.6", seconds=61)
    assert guess(world, "alice", "6.6.6.6", seconds=901) == 0
    assert [guess(world, "alice", "6.6.6.6") for _ in range(2)] == [0, 0]
    world.clock.now += 10_000
    world.portal.prune()
    with world.portal.store.reading() as connection:
        from deskfleet.portal.tables import throttle

        assert connection.execute(throttle.select()).all() == []


def test_a_clock_that_was_set_back_keeps_nobody_waiting_for_it(world: World) -> None:
    for _ in range(3):
        guess(world, "alice", "6.6.6.6")
    assert 0 < guess(world, "alice", "6.6.6.6", seconds=-3600) <= 1
    # After a refusal the time that is left is the plain delay, counted from when it was last right.
    assert guess(world, "alice", "6.6.6.6", seconds=3601) == 0


def test_many_tries_at_once_gain_nothing(world: World) -> None:
    throttle: Throttle = world.portal.throttle
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(throttle.begin(counters("alice", "6.6.6.6", ""))))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(0) == 3 and len(results) == 16


@pytest.mark.parametrize("user", ["\ud800", "", "x" * 10_000, "a\0b"])
def test_any_text_is_countable(world: World, user: str) -> None:
    assert guess(world, user, "1.1.1.1") == 0
