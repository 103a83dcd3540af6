"""The route table: who may say what, what counts, and never a wrong desktop."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.consoles import report

from deskfleet.proxy.refusals import Refusal, Refused
from deskfleet.proxy.routes import Route, RouteTable, WrongSender
from deskfleet.schemas.host import HostBeat, HostReport, Phase, beat_of
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


def refusal(routes: RouteTable, sid: str = S, generation: int = 7, host: str = "h1", now: float = 1.0) -> Refused:
    with pytest.raises(Refusal) as caught:
        routes.find(sid, generation, host, now)
    return caught.value.reason


def beat(seq: int, told: HostReport | None = None, **changes: object) -> HostBeat:
    """A small heartbeat that stands for a full one, by default for that of a host without guests."""
    return replace(beat_of(told or report()), seq=seq, **changes)  # type: ignore[arg-type]


def test_a_running_guest_has_a_route() -> None:
    routes = table()
    assert routes.heartbeat("agent-h1", report(guests={S: (7, RUN), T: (8, START)}), 0.0) == frozenset()
    assert routes.find(S, 7, "h1", 1.0) == Route(S, 7, "h1", "127.0.0.1:6080")
    assert routes.find(T, 8, "h1", 1.0).generation == 8
    assert routes.size == (1, 2)


def test_another_generation_is_another_start() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    assert refusal(routes, generation=6) is Refused.SESSION_MOVED
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}, seq=2, last_generation=8), 0.0)
    assert refusal(routes, generation=8) is Refused.SESSION_MOVED


def test_the_ticket_says_which_host() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    routes.heartbeat("agent-h2", report("h2", guests={S: (7, RUN)}, console="127.0.0.1:6082"), 0.0)
    assert routes.find(S, 7, "h1", 1.0).address == "127.0.0.1:6080", "what another host claims changes nothing"
    assert routes.find(S, 7, "h2", 1.0).address == "127.0.0.1:6082"
    assert refusal(routes, host="h3") is Refused.HOST_SILENT


def test_a_start_that_its_host_has_not_told_of_yet_is_dialled() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (5, END)}), 0.0)
    assert routes.find(S, 7, "h1", 1.0) == Route(S, 7, "h1", "127.0.0.1:6080")
    assert routes.find(T, 6, "h1", 1.0).generation == 6


def test_a_host_that_only_small_heartbeats_tell_of_is_dialled() -> None:
    """As after a restart of the proxy: the host itself knows what it runs."""
    routes = table()
    assert routes.heartbeat("agent-h1", beat(41, last_generation=9), 0.0) == frozenset()
    assert routes.find(S, 7, "h1", 1.0) == Route(S, 7, "h1", "127.0.0.1:6080")
    assert routes.size == (1, 0)
    routes.announce("scheduler", word(State.ENDED), 2.0)
    assert refusal(routes, now=2.0) is Refused.SESSION_ENDED
    assert routes.heartbeat("agent-h1", report(guests={T: (8, RUN)}, seq=42, last_generation=9), 3.0) == frozenset()
    assert refusal(routes, sid="c" * 32, generation=9, now=3.0) is Refused.SESSION_ENDED


def test_a_small_heartbeat_stands_for_the_last_full_one() -> None:
    routes = table()
    told = report(guests={S: (7, RUN)})
    routes.heartbeat("agent-h1", told, 0.0)
    assert (
        routes.heartbeat("agent-h1", beat(2, told, last_generation=9, console="127.0.0.1:7000"), 400.0) == frozenset()
    )
    assert routes.find(S, 7, "h1", 400.0).address == "127.0.0.1:7000"
    assert refusal(routes, sid=T, generation=9, now=400.0) is Refused.SESSION_ENDED, "the same list, and a newer number"
    routes.expire(1000.0)
    assert routes.find(S, 7, "h1", 1000.0)


def test_a_lost_full_heartbeat_leaves_the_answer_to_the_host_until_the_next() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    lost = report(guests={T: (8, RUN)}, seq=2)
    routes.heartbeat("agent-h1", beat(3, lost), 1.0)
    assert routes.find(S, 7, "h1", 1.0) and routes.find(T, 8, "h1", 1.0)
    assert routes.heartbeat("agent-h1", replace(lost, seq=4), 2.0) == {S}
    assert refusal(routes, now=2.0) is Refused.SESSION_ENDED
    assert routes.find(T, 8, "h1", 2.0)


def test_small_and_full_heartbeats_share_their_numbers() -> None:
    routes = table()
    told = report(guests={S: (7, RUN)}, seq=5)
    routes.heartbeat("agent-h1", told, 0.0)
    routes.heartbeat("agent-h1", beat(6, told), 1.0)
    for late in (beat(6, report()), beat(4, report()), report(seq=6), report(seq=5)):
        assert routes.heartbeat("agent-h1", late, 2.0) == frozenset()
        assert routes.find(S, 7, "h1", 2.0)
    routes.heartbeat("agent-h1", beat(1, told, incarnation="two", console="127.0.0.1:7000"), 3.0)
    routes.heartbeat("agent-h1", beat(7, told, console="127.0.0.1:1"), 4.0)
    assert routes.find(S, 7, "h1", 4.0).address == "127.0.0.1:7000", "a heartbeat of a past life"
    with pytest.raises(WrongSender):
        routes.heartbeat("agent-h2", beat(8), 5.0)


@pytest.mark.parametrize("sender", ["", "agent-h2", "scheduler", "h1", "agent-", "agent-h1 ", "AGENT-H1", "agent-h11"])
def test_a_host_speaks_for_itself_only(sender: str) -> None:
    routes = table()
    with pytest.raises(WrongSender):
        routes.heartbeat(sender, report(guests={S: (7, RUN)}), 0.0)
    assert refusal(routes) is Refused.HOST_SILENT


@pytest.mark.parametrize("sender", ["", "agent-h1", "portal", "Scheduler"])
def test_only_the_scheduler_announces_sessions(sender: str) -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    with pytest.raises(WrongSender):
        routes.announce(sender, word(State.ENDED), 0.0)
    assert routes.find(S, 7, "h1", 1.0)


def test_older_reports_change_nothing() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}, seq=5), 0.0)
    for stale in (report(seq=5), report(seq=4)):
        assert routes.heartbeat("agent-h1", stale, 1.0) == frozenset()
        assert routes.find(S, 7, "h1", 1.0)
    routes.heartbeat("agent-h1", report(seq=1, incarnation="two", guests={S: (7, RUN)}), 2.0)
    assert routes.heartbeat("agent-h1", report(seq=6, incarnation="one"), 3.0) == frozenset(), "a report of a past life"
    assert routes.find(S, 7, "h1", 3.0)
    assert routes.heartbeat("agent-h1", report(seq=2, incarnation="two"), 4.0) == {S}


def test_a_silent_host_keeps_its_routes_for_a_while() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    routes.expire(600.0)
    assert routes.find(S, 7, "h1", 600.0)
    routes.expire(600.1)
    assert refusal(routes, now=600.1) is Refused.HOST_SILENT
    assert routes.size == (0, 0)


def test_the_first_interval_is_not_the_whole_truth() -> None:
    routes = RouteTable(keep_s=600.0, settle_s=5.0)
    assert not routes.ready(1000.0), "before the bus is connected no time counts"
    assert refusal(routes, now=1000.0) is Refused.NOT_READY
    routes.listening(1000.0)
    assert not routes.ready(1004.9)
    assert refusal(routes, now=1004.9) is Refused.NOT_READY
    assert routes.ready(1005.0)
    assert refusal(routes, now=1005.0) is Refused.HOST_SILENT


def test_a_broker_that_comes_back_leaves_routes_and_readiness_alone() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    routes.listening(50.0)
    assert routes.ready(50.0)
    assert routes.find(S, 7, "h1", 50.0)
    assert refusal(routes, host="h2", now=50.0) is Refused.NOT_READY, "it may have come meanwhile"


def test_an_announcement_agrees_with_the_ticket_before_the_next_heartbeat() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(last_generation=6), 0.0)
    assert not routes.announce("scheduler", word(State.RUNNING), 1.0)
    assert routes.find(S, 7, "h1", 1.0).host == "h1"
    routes.heartbeat("agent-h1", report(last_generation=7, seq=2), 2.0)
    assert refusal(routes) is Refused.SESSION_ENDED, "the host has done that command and does not list the guest"


def test_an_announcement_for_an_unknown_host_is_no_route() -> None:
    routes = table()
    routes.announce("scheduler", word(State.RUNNING, host="h9"), 0.0)
    assert refusal(routes, host="h9") is Refused.HOST_SILENT


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
    assert routes.heartbeat("agent-h1", report(guests={S: (7, END)}, seq=3, last_generation=8), 2.0) == {S}
    assert refusal(routes) is Refused.SESSION_ENDED
    assert refusal(routes, sid=T, generation=8) is Refused.SESSION_ENDED


@pytest.mark.parametrize(("host", "generation"), [("h2", 9), ("h2", 7), ("h1", 8), ("", 0)])
def test_a_session_that_was_announced_elsewhere_has_moved(host: str, generation: int) -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}), 0.0)
    routes.announce("scheduler", word(State.ASSIGNED, host, generation), 1.0)
    assert refusal(routes) is Refused.SESSION_MOVED


def test_a_lost_announcement_of_a_move_heals_when_no_older_ticket_can_be_left() -> None:
    """Tickets are as new as the ledger was when they were signed."""
    routes = table()
    routes.heartbeat("agent-h2", report("h2", guests={S: (9, RUN)}), 0.0)
    routes.announce("scheduler", word(State.ASSIGNED, "h1", 5), 0.0)
    assert refusal(routes, generation=9, host="h2", now=35.0) is Refused.SESSION_MOVED
    assert routes.find(S, 9, "h2", 35.1).host == "h2"


def test_a_host_without_a_console_address() -> None:
    routes = table()
    routes.heartbeat("agent-h1", report(guests={S: (7, RUN)}, console=""), 0.0)
    assert refusal(routes) is Refused.HOST_FAILED


def test_announcements_are_forgotten_too() -> None:
    routes = table()
    routes.announce("scheduler", word(State.ENDED), 0.0)
    routes.expire(601.0)
    assert refusal(routes, now=601.0) is Refused.HOST_SILENT


_GUESTS = st.dictionaries(
    st.sampled_from([S, T]), st.tuples(st.integers(1, 3), st.sampled_from([RUN, STOP, END, START])), max_size=2
)
_HOSTS = st.sampled_from(["h1", "h2"])
_STEPS = st.one_of(
    st.tuples(_HOSTS, _GUESTS, st.integers(0, 4), st.sampled_from("xy"), st.booleans()),
    st.tuples(st.sampled_from(list(State)), st.sampled_from(["h1", "h2", ""]), st.integers(0, 3)),
    st.floats(0, 400),
)


@given(st.lists(_STEPS, max_size=30))
@settings(max_examples=300)
def test_a_route_never_contradicts_what_was_said_last(steps: list[object]) -> None:
    """Whatever comes in whatever order: a route leads to the ticket's host, and nothing that was said there last, nor
    by the scheduler lately, speaks against it."""
    routes, now = table(), 0.0
    life: dict[str, tuple[str, int]] = {}
    heard: dict[str, float] = {}
    retired: set[tuple[str, str]] = set()
    lists: dict[str, tuple[HostReport, bool]] = {}
    over = set()
    announced: tuple[str, int, float] | None = None
    for step in steps:
        if isinstance(step, float):
            now += step
            routes.expire(now)
            for host in [host for host, at in heard.items() if now - at > 600]:
                del life[host], heard[host]
                lists.pop(host, None)
                retired = {(other, name) for other, name in retired if other != host}
        elif len(step) == 5:  # type: ignore[arg-type]
            host, guests, seq, incarnation, small = step  # type: ignore[misc]
            told = report(host, guests, seq, incarnation)
            routes.heartbeat(f"agent-{host}", beat_of(told) if small else told, now)
            old = life.get(host, (incarnation, -1))
            if (host, incarnation) not in retired and (incarnation != old[0] or seq > old[1]):
                retired |= {(host, old[0])} - {(host, incarnation)}
                life[host], heard[host] = (incarnation, seq), now
                if not small:
                    lists[host] = told, True
                elif host in lists:
                    known = replace(lists[host][0], last_generation=told.last_generation)
                    lists[host] = known, told.digest == known.digest
        else:
            state, host, generation = step  # type: ignore[misc]
            over |= {S} if routes.announce("scheduler", word(state, host, generation), now) else set()
            announced = host, generation, now
        for sid, host, generation in itertools.product((S, T), ("h1", "h2"), range(1, 4)):
            try:
                route = routes.find(sid, generation, host, now)
            except Refusal:
                continue
            assert (route.sid, route.generation, route.host) == (sid, generation, host)
            assert host in life, "it was heard"
            assert now > 600 or sid not in over
            if sid == S and announced and now - announced[2] <= 35:
                assert announced[:2] == (host, generation)
            told, current = lists.get(host, (report(), False))
            if current and told.last_generation >= generation:
                assert (sid, generation) in {
                    (guest.sid, guest.generation) for guest in told.guests if guest.phase in (START, RUN)
                }
