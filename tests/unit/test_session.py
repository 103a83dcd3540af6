"""Session life: every pair of state and event is either in the table or refused without a change."""

from __future__ import annotations

from itertools import product

import pytest

from deskfleet.schemas.errors import SENTENCES, IllegalTransition, Reason
from deskfleet.schemas.session import (
    TRANSITIONS,
    Event,
    Outcome,
    Resources,
    Session,
    State,
    advance,
    next_state,
    place,
)


def a_session(state: State = State.QUEUED) -> Session:
    placed = state not in (State.QUEUED, State.ENDED)
    return Session(
        sid="a" * 32,
        user="ann",
        machine="tiny",
        resources=Resources(1, 128, 1),
        persistent=False,
        lifetime_s=60,
        state=state,
        host="h1" if placed else "",
        generation=3 if placed else 0,
        gpu_addresses=("0000:01:00.0",) if placed else (),
        outcome=Outcome.EXPIRED if state is State.STOPPING else None,
        reason=Reason.EXPIRED if state is State.STOPPING else None,
    )


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_pair_is_listed_or_refused(state: State, event: Event) -> None:
    before = a_session(state)
    if (state, event) in TRANSITIONS:
        after = advance(before, event, outcome=Outcome.FAILED)
        assert after.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition):
            advance(before, event, outcome=Outcome.FAILED)
    assert before == a_session(state)


def test_ended_is_final_and_can_be_reached_from_everywhere() -> None:
    assert not [event for state, event in TRANSITIONS if state is State.ENDED]
    reached = {State.QUEUED}
    for _ in State:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(State)
    for state in set(State) - {State.ENDED}:
        seen = {state}
        for _ in State:
            seen |= {after for (before, _), after in TRANSITIONS.items() if before in seen}
        assert State.ENDED in seen


def test_a_session_that_ran_never_waits_again() -> None:
    seen = {State.RUNNING}
    for _ in State:
        seen |= {after for (before, _), after in TRANSITIONS.items() if before in seen}
    assert State.QUEUED not in seen


def test_an_end_needs_an_outcome() -> None:
    with pytest.raises(IllegalTransition, match="outcome"):
        advance(a_session(State.RUNNING), Event.GONE)


def test_back_in_the_queue_nothing_is_promised() -> None:
    after = advance(a_session(State.STARTING), Event.RETRY, reason=Reason.QEMU_EXITED, detail="h1: it fell")
    assert (after.host, after.generation, after.gpu_addresses, after.outcome) == ("", 0, (), None)
    assert after.reason is Reason.QEMU_EXITED


def test_the_reason_of_a_stop_outlives_what_the_host_says_of_the_end() -> None:
    after = advance(a_session(State.STOPPING), Event.GONE, outcome=Outcome.GUEST_OFF, reason=Reason.GUEST_OFF)
    assert (after.outcome, after.reason) == (Outcome.EXPIRED, Reason.EXPIRED)


def test_place_takes_a_queued_session_only() -> None:
    placed = place(a_session(), "h2", 9, ("0000:02:00.0",))
    assert (placed.state, placed.host, placed.generation) == (State.ASSIGNED, "h2", 9)
    assert placed.on_host
    with pytest.raises(IllegalTransition):
        place(placed, "h3", 10)


def test_an_unknown_pair_names_both() -> None:
    with pytest.raises(IllegalTransition, match="ended can't take place"):
        next_state(State.ENDED, Event.PLACE)


def test_every_reason_has_a_sentence_for_people() -> None:
    assert set(SENTENCES) == set(Reason)
    assert all(text.endswith(".") and text[0].isupper() for text in SENTENCES.values())
