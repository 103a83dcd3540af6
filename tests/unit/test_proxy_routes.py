"""The route table: who may say what, what counts, and never a wrong desktop."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.consoles import report

from deskfleet.proxy.refusals import Refusal, Refused
from deskfleet.proxy.routes import Route, RouteTable, WrongSender
from deskfleet.schemas.host import Phase
from deskfleet.schemas.messages import SessionChanged
from deskfleet.schemas.session import Outcome, State

S, T = "a" * 32, "b" * 32
RUN, STOP, END, START = Phase.RUNNING, Phase.STOPPING, Phase.ENDED, Phase.STARTING


def table(connected_at: float = -100.0) -> RouteTable:
    routes = RouteTable(keep_s=600.0, settle_s=5.0)
    routes.listening(connected_at)
    return routes


def word(state: State, host: str = "h1", generation: int = 7, sid: str = S) -> SessionChanged:
    outcome = Outcome.STOPPED if state is State.ENDED else None
    return SessionChanged(sid, state, outcome, host, generation)


def refusal(routes: RouteTable, sid: str = S, generation: int = 7, now: float = 1.0) -> Refused:
    with pytest.raises(Refusal) as caught:
        routes.find(sid, generation, now)
    return caught.value.reason


def test_a_running_guest_has_a_route() -> None:
    routes = table()
    assert routes.heartbeat("agent-h1", report(guests={S: (7, RUN), T: (8, START)}), 0.0) == frozenset()
    assert routes.find(S, 7, 1.0) == Route(S, 7, "h1", "127.0.0.1:6080")
    assert routes.find(T, 8, 1.0).generation == 8
    assert routes.size == (1, 2)


def test_another_generation_is_another_start() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    assert refusal(routes, generation=6) is Refused.SESSION_MOVED
    assert refusal(routes, generation=8) is Refused.SESSION_MOVED


@pytest.mark.parametrize("sender", ["", "agent-h2", "scheduler", "h1", "agent-", "agent-h1 ", "AGENT-H1", "agent-h11"])
def test_a_host_speaks_for_itself_only(sender: str) -> None:
    routes = table()
    with pytest.raises(WrongSender):
        routes.heartbeat(sender, report(guests={S: (7, RUN)}), 0.0)
    assert refusal(routes) is Refused.UNKNOWN_SESSION


@pytest.mark.parametrize("sender", ["", "agent-h1", "portal", "Scheduler"])
def test_only_the_scheduler_announces_sessions(sender: str) -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    with pytest.raises(WrongSender):
        routes.announce(sender, word(State.ENDED), 0.0)
    assert routes.find(S, 7, 1.0)


def test_older_reports_change_nothing() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}, seq=5), 0.0)
    for stale in (report(seq=5), report(seq=4)):
        assert routes.heartbeat("agent-h1", stale, 1.0) == frozenset()
        assert routes.find(S, 7, 1.0)
    routes.heartbeat("agent-h1", report(seq=1, incarnation="two", guests={S: (7, RUN)}), 2.0)
    assert routes.heartbeat("agent-h1", report(seq=6, incarnation="one"), 3.0) == frozenset(), "a report of a past life"
    assert routes.find(S, 7, 3.0)
    assert routes.heartbeat("agent-h1", report(seq=2, incarnation="two"), 4.0) == {S}


def test_a_silent_host_keeps_its_routes_for_a_while() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    routes.expire(600.0)
    assert routes.find(S, 7, 600.0)
    routes.expire(600.1)
    assert refusal(routes, now=600.1) is Refused.UNKNOWN_SESSION
    assert routes.size == (0, 0)


def test_the_first_interval_is_not_the_whole_truth() -> None:
    routes = RouteTable(keep_s=600.0, settle_s=5.0)
    assert not routes.ready(1000.0), "before the bus is connected no time counts"
    assert refusal(routes, now=1000.0) is Refused.NOT_READY
    routes.listening(1000.0)
    assert not routes.ready(1004.9)
    assert refusal(routes, now=1004.9) is Refused.NOT_READY
    assert routes.ready(1005.0)
    assert refusal(routes, now=1005.0) is Refused.UNKNOWN_SESSION


def test_a_broker_that_comes_back_leaves_routes_and_readiness_alone() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    routes.listening(50.0)
    assert routes.ready(50.0)
    assert routes.find(S, 7, 50.0)
    assert refusal(routes, sid=T, now=50.0) is Refused.NOT_READY, "it may have started meanwhile"


def test_an_announcement_opens_a_route_before_the_next_heartbeat() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(last_generation=6), 0.0)
    assert not routes.announce("scheduler", word(State.RUNNING), 1.0)
    assert routes.find(S, 7, 1.0).host == "h1"
    routes.heartbeat("agent-h1", report(last_generation=7, seq=2), 2.0)
    assert refusal(routes) is Refused.SESSION_ENDED, "the host has done that command and does not list the guest"


def test_an_announcement_for_an_unknown_host_is_no_route() -> None:
    routes = table()
    routes.announce("scheduler", word(State.RUNNING, host="h9"), 0.0)
    assert refusal(routes) is Refused.UNKNOWN_SESSION


@pytest.mark.parametrize("state", [State.STOPPING, State.ENDED])
def test_the_end_is_final(state: State) -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    assert routes.announce("scheduler", word(state), 1.0)
    assert refusal(routes) is Refused.SESSION_ENDED
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}, seq=2), 2.0)
    assert routes.announce("scheduler", word(State.RUNNING), 3.0), "a late announcement opens nothing"
    assert refusal(routes) is Refused.SESSION_ENDED


def test_a_heartbeat_ends_consoles_when_the_announcement_was_lost() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN), T: (8, RUN)}), 0.0)
    assert routes.heartbeat("agent-h1", report(guests={S: (7, STOP)}, seq=2, last_generation=8), 1.0) == {S, T}
    assert refusal(routes) is Refused.SESSION_ENDED
    assert routes.heartbeat("agent-h1", report(guests={S: (7, END)}, seq=3), 2.0) == {S}
    assert refusal(routes) is Refused.SESSION_ENDED
    assert refusal(routes, sid=T, generation=8) is Refused.UNKNOWN_SESSION


def test_two_hosts_that_claim_one_session_cancel_out() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    routes.heartbeat("agent-h2", report("h2", guests={S: (7, RUN)}), 0.0)
    assert refusal(routes) is Refused.HOST_FAILED
    routes.announce("scheduler", word(State.RUNNING, host="h1"), 1.0)
    assert routes.find(S, 7, 1.0).host == "h1", "the scheduler's word settles it"


def test_a_claim_of_another_generation_does_not_disturb() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    routes.heartbeat("agent-h2", report("h2", guests={S: (9, RUN)}), 0.0)
    assert routes.find(S, 7, 1.0).host == "h1"
    assert routes.find(S, 9, 1.0).host == "h2"


def test_a_lost_announcement_of_a_move_heals_by_heartbeat() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(last_generation=5), 0.0)
    routes.announce("scheduler", word(State.ASSIGNED, "h1", 5), 0.0)
    routes.heartbeat("agent-h2", report("h2", guests={S: (9, RUN)}), 1.0)
    assert routes.find(S, 9, 1.0).host == "h2"


def test_a_guest_left_from_an_earlier_start_on_the_same_host_is_not_it() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (5, RUN)}), 0.0)
    routes.announce("scheduler", word(State.ASSIGNED, "h1", 7), 0.0)
    assert refusal(routes) is Refused.SESSION_MOVED


def test_a_host_without_a_console_address() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}, console=""), 0.0)
    assert refusal(routes) is Refused.HOST_FAILED


def test_announcements_are_forgotten_too() -> None:
    routes = table()
    routes.announce("scheduler", word(State.ENDED), 0.0)
    routes.expire(601.0)
    assert refusal(routes, now=601.0) is Refused.UNKNOWN_SESSION


_GUESTS = st.dictionaries(
    st.sampled_from([S, T]), st.tuples(st.integers(1, 3), st.sampled_from([RUN, STOP, END, START])), max_size=2
)
_STEPS = st.one_of(
    st.tuples(st.sampled_from(["h1", "h2"]), _GUESTS, st.integers(0, 4), st.sampled_from("xy")),
    st.tuples(st.sampled_from(list(State)), st.sampled_from(["h1", "h2", ""]), st.integers(0, 3)),
    st.floats(0, 400),
)


@given(st.lists(_STEPS, max_size=30))
@settings(max_examples=300)
def test_a_route_is_always_backed_by_what_was_said(steps: list[object]) -> None:
    """Whatever comes in whatever order: a route's host has said, or the scheduler has, that it runs this very start."""
    routes, now = table(), 0.0
    said: set[tuple[str, str, int]] = set()
    over = set()
    for step in steps:
        if isinstance(step, float):
            now += step
            routes.expire(now)
        elif len(step) == 4:  # type: ignore[arg-type]
            host, guests, seq, life = step  # type: ignore[misc]
            said |= {(sid, host, generation) for sid, (generation, _) in guests.items()}
            routes.heartbeat(f"agent-{host}", report(host, guests, seq, life), now)
        else:
            state, host, generation = step  # type: ignore[misc]
            said.add((S, host, generation))
            over |= {S} if routes.announce("scheduler", word(state, host, generation), now) else set()
        for sid in (S, T):
            for generation in range(1, 4):
                try:
                    route = routes.find(sid, generation, now)
                except Refusal:
                    continue
                assert (sid, route.host, generation) in said
                assert route.sid == sid
                assert now > 600 or sid not in over
    assert all(hosts for hosts in routes._claims.values())
