"""Random walks through a whole cluster: I1 (no lost request), I2 (one request, one machine), I3 (one GPU, one
session), I4 (nothing left behind), I5 (nothing taken away), I10 (limits hold). More seeds: DESKFLEET_SEEDS=10000."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from sim.walk import Walk
from sim.world import Violation

from deskfleet.agent import core
from deskfleet.agent.journal import Entry
from deskfleet.scheduler import decisions, reconcile
from deskfleet.schemas.messages import VmStart

SEEDS = int(os.environ.get("DESKFLEET_SEEDS", "500"))
CHUNK = 25


def walk(seed: int) -> str:
    history = Walk(seed)
    try:
        return history.run()
    except Violation as broken:
        steps = "\n".join(history.world.steps[-60:])
        raise AssertionError(
            f"seed {seed}: {broken}\nlast steps (python tests/sim/walk.py --seeds 1 --first {seed}):\n{steps}"
        ) from broken


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_invariants_hold_on_every_walk(first: int) -> None:
    for seed in range(first, min(first + CHUNK, SEEDS)):
        walk(seed)


@pytest.mark.parametrize("seed", range(5))
def test_one_seed_is_one_history(seed: int) -> None:
    assert walk(seed) == walk(seed)


# A harness that finds nothing proves nothing: each of these mistakes must be caught.


def absent_without_generation(sessions, report, max_attempts):  # type: ignore[no-untyped-def]
    listed = {guest.sid for guest in report.guests}
    for session in sessions:
        if session.host == report.host and session.on_host and session.sid not in listed:
            yield reconcile.failed_start(session, reconcile.Reason.ABSENT, "", max_attempts)


def start_whatever_the_number(self: core.Agent, start: VmStart) -> None:
    entry = Entry(start.sid, start.generation, self._boot_id, core.Phase.STARTING, start)
    self._put(entry)
    self._watch[start.sid] = core._Watch()
    self._hypervisor.launch(entry)


def retry_what_has_run(session, guest, max_attempts):  # type: ignore[no-untyped-def]
    return reconcile.failed_start(session, guest.reason, guest.detail, max_attempts)


def never_repeat(self: decisions.Decisions, _session: object, _now: float) -> bool:
    return False


MISTAKES = {
    "absence concluded without the command number": (reconcile, "absent", absent_without_generation),
    "a start is obeyed whatever its number": (core.Agent, "start", start_whatever_the_number),
    "a session that has run is started again": (reconcile, "_ended", retry_what_has_run),
    "a command without an echo is not sent again": (decisions.Decisions, "_needs_command", never_repeat),
}


@pytest.fixture(params=sorted(MISTAKES))
def mistake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    where, name, wrong = MISTAKES[request.param]
    monkeypatch.setattr(where, name, wrong)
    yield request.param


def test_a_planted_mistake_is_caught(mistake: str) -> None:
    for seed in range(200):
        try:
            Walk(seed).run()
        except Exception:  # noqa: BLE001  however it shows
            return
    pytest.fail(f"not caught within 200 seeds: {mistake}")
