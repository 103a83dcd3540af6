"""Random walks through a whole cluster. I1 no lost request, I2 one request one machine, I3 one device one session,
I4 nothing left behind, I5 nothing taken away, I6 the right desktop, I7 tokens end, I10 limits hold, I11 it comes back,
I12 time is only time. More seeds: DESKFLEET_SEEDS=10000."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from sim.shrink import KEPT, keep, load, symptom
from sim.walk import FAULTS, Walk

SEEDS = int(os.environ.get("DESKFLEET_SEEDS", "500"))
CHUNK = 25
REPEATED = range(20)
#: Walks that are made twice, with wrong clocks and with right ones.
TWINS = max(50, SEEDS // 50)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_invariants_hold_on_every_walk(first: int, record_property: Callable[[str, object], None]) -> None:
    failed, longest, met = [], 0.0, set()
    for seed in range(first, min(first + CHUNK, SEEDS)):
        walk = Walk(seed)
        shown = symptom(walk)
        longest = max(longest, walk.world.recovery_s)
        met |= walk.faults
        if shown:
            path = keep(walk, shown)
            failed.append(f"seed {seed} breaks {shown}; again: python tests/sim/shrink.py --replay {path}")
    record_property("seeds", min(CHUNK, SEEDS - first))
    record_property("failed", len(failed))
    record_property("longest", longest)
    record_property("met", sorted(met))
    assert not failed, "\n".join(failed) + "\n" + "\n".join(walk.world.lines[-40:])


def test_what_failed_once_holds_now() -> None:
    kept = sorted(KEPT.glob("*.json"))
    assert {path.name: symptom(load(path)) for path in kept} == {path.name: "" for path in kept}


def test_one_seed_is_one_history_whatever_the_hash_seed() -> None:
    here = [Walk(seed).run() for seed in REPEATED]
    code = f"import sys; sys.path[:0] = {sys.path!r}; from sim.walk import Walk; "
    code += f"print(*[Walk(seed).run() for seed in {REPEATED!r}])"
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )
    assert there.stdout.decode().split() == here
    assert len(set(here)) == len(here)


@pytest.mark.parametrize("first", range(0, TWINS, CHUNK))
def test_clocks_that_are_wrong_change_no_decision(first: int) -> None:
    for seed in range(first, min(first + CHUNK, TWINS)):
        wrong = Walk(seed, faults=Walk.drawn(seed) | {"clock"})
        wrong.run()
        right = Walk(seed, [step for step in wrong.steps if step[0] != "clock"], wrong.faults)
        right.run()
        assert wrong.decisions() == right.decisions(), f"seed {seed}"


def test_every_kind_of_fault_is_drawn() -> None:
    assert set().union(*(Walk.drawn(seed) for seed in range(200))) == set(FAULTS)
