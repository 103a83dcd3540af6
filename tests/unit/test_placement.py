"""Placement: the right host, for a reason; or no host, with a reason each."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hosts import IMAGE, NOW, POLICY, gpu, host, index, moment, report, want

from deskfleet.portal.details import form_of
from deskfleet.scheduler.filters import FILTERS, Reservation, Want, free_gpu, objection, verdict
from deskfleet.scheduler.hosts import HostState, Usage
from deskfleet.scheduler.placement import MOST_VERDICTS, NoFit, Placement, choose, explain, naive, score, terms, why
from deskfleet.scheduler.policy import Policy, Pool, Weights
from deskfleet.schemas.errors import SENTENCES, Reason
from deskfleet.schemas.host import Fetch, FetchState, HostBeat
from deskfleet.schemas.template import TemplateReport, TemplateState

LAB = Pool("lab", ("h1", "lab-*"), ("fast",), ("staff",), exclusive=True)
COURSE = Pool("course", ("h2",), (), ("students",), confine=True)
POOLS = replace(POLICY, pools=(LAB, COURSE))


def failing(state: HostState) -> HostState:
    for number in range(3):
        state.resting.failed(want().sha256, f"s{number}", NOW, POLICY.rest)
    return state


def kept(name: str = "h1", at: float = NOW + 600, **slack: object) -> Reservation:
    return replace(Reservation("big", name, at, 0, 0.0, 0), **slack)  # type: ignore[arg-type]


REFUSALS = [
    (host(dead=True), want(), Reason.DECLARED_DEAD),
    (host(heard=None), want(), Reason.SILENT),
    (host(heard=NOW - 16), want(), Reason.SILENT),
    (HostState("h1"), want(), Reason.SILENT),
    (host(cpus=0), want(), Reason.NOT_TRUSTED),
    (host(cpus=1_000_000), want(), Reason.NOT_TRUSTED),
    (host(memory_mib=1 << 40, memory_free_mib=1 << 20), want(), Reason.NOT_TRUSTED),
    (host(memory_free_mib=1 << 20), want(), Reason.NOT_TRUSTED),
    (host(accel="none", problems=("no qemu",)), want(), Reason.NOT_TRUSTED),
    (host(fenced=True), want(), Reason.FENCED),
    (host(draining=True), want(), Reason.DRAINING),
    (host(), want(labels=frozenset({"fast"})), Reason.LABEL_MISSING),
    (host(policy=POOLS), want(), Reason.WRONG_POOL),
    (host(policy=POOLS), want(admitted=frozenset({"course"}), confined=frozenset({"course"})), Reason.WRONG_POOL),
    (host(images=()), want(), Reason.NO_IMAGE),
    (host(images=(), fetches=()), want(), Reason.IMAGE_FETCHABLE),
    (host(images=(), fetches=(Fetch(IMAGE, FetchState.WAITING),)), want(), Reason.IMAGE_FETCHING),
    (host(images=(), fetches=(Fetch(IMAGE, FetchState.FETCHING, 40),)), want(), Reason.IMAGE_FETCHING),
    (host(images=(), fetches=(Fetch(IMAGE, FetchState.FAILED),)), want(), Reason.NO_IMAGE),
    (failing(host()), want(), Reason.RESTING),
    (host(usage=Usage(200, 0, 0)), want(), Reason.SESSIONS_FULL),
    (host(usage=Usage(1, 31, 0)), want(), Reason.CPUS_SHORT),
    (host(usage=Usage(1, 0, 15000)), want(), Reason.MEMORY_SHORT),
    (host(memory_free_mib=1000), want(), Reason.MEMORY_SHORT),
    (host(disk_free_mib=5000), want(), Reason.DISK_SHORT),
    (host(load1=33.0), want(), Reason.LOAD_HIGH),
    (host(), want(gpus=1), Reason.GPU_NONE),
    (host(gpus=(gpu(1, offered=False),)), want(gpus=1), Reason.GPU_NONE),
    (host(gpus=(gpu(1, "T4"),)), want(gpus=1, gpu_model="A100"), Reason.GPU_NONE),
    (host(gpus=(gpu(1),), gpus_held=frozenset({"0000:01:00.1"})), want(gpus=1), Reason.GPU_BUSY),
]


@pytest.mark.parametrize(("state", "wanted", "reason"), REFUSALS, ids=lambda v: str(v)[:20])
def test_each_filter_says_why(state: HostState, wanted: Want, reason: Reason) -> None:
    if state.report and state.report.gpus:
        state.take(state.report, state.heard or NOW, POLICY)
    found = verdict(wanted, state, moment())
    assert found is not None and found.reason is reason
    assert found.sentence.startswith("h1: ") and len(found.sentence) > 8
    assert form_of(found.detail), "the portal can say it in no other language"
    assert isinstance(choose(wanted, [state], moment()), NoFit)
    assert [entry.reason for entry in explain(wanted, [state], moment())] == [reason]


def test_every_reason_of_a_filter_is_met_above_or_below() -> None:
    assert len(FILTERS) == 13
    found = verdict(want(), host(), moment(POLICY, NOW, kept()))
    assert found is not None and found.reason is Reason.RESERVED and form_of(found.detail)


def test_a_fit_is_exact_at_its_edge() -> None:
    assert objection(want(), host(usage=Usage(1, 30, 14336)), moment()) is None
    assert objection(want(), host(usage=Usage(1, 31, 14336)), moment()) is Reason.CPUS_SHORT
    assert objection(want(), host(usage=Usage(1, 30, 14337)), moment()) is Reason.MEMORY_SHORT


def test_without_hosts_it_says_so() -> None:
    (only,) = explain(want(), [], moment())
    assert only.reason is Reason.NO_HOSTS and form_of(only.detail)


def test_many_hosts_are_told_by_reason_and_number() -> None:
    hosts = [host(f"h{n}", draining=n < 5, images=()) for n in range(MOST_VERDICTS + 1)]
    first, second = explain(want(), hosts, moment())
    assert (first.reason, second.reason) == (Reason.NO_IMAGE, Reason.DRAINING)
    assert first.sentence == f"{MOST_VERDICTS - 4} hosts: {SENTENCES[Reason.NO_IMAGE]}"


def chosen(wanted: Want, hosts: list[HostState], policy: Policy = POLICY) -> str | None:
    answer = choose(wanted, index(hosts, policy).walk(wanted), moment(policy))
    return answer.host if isinstance(answer, Placement) else None


def test_spread_takes_the_emptier_host_and_pack_the_fuller_one() -> None:
    hosts = [host("h1", usage=Usage(2, 4, 8192)), host("h2")]
    assert chosen(want(), hosts) == "h2"
    assert chosen(want(), hosts, replace(POLICY, spread=False)) == "h1"


def test_weights_decide_what_counts() -> None:
    hosts = [host("h1", usage=Usage(1, 20, 0)), host("h2", usage=Usage(1, 0, 8000))]
    assert chosen(want(), hosts, replace(POLICY, weights=Weights(1.0, 0.0, 0.0))) == "h1"
    assert chosen(want(), hosts, replace(POLICY, weights=Weights(0.0, 1.0, 0.0))) == "h2"


def test_load_decides_between_equals() -> None:
    busy, calm = host("h1", load1=20.0), host("h2", load1=0.1)
    assert chosen(want(), [busy, calm]) == "h2"
    full = host("h2", load1=0.1, usage=Usage(4, 24, 12288))
    assert chosen(want(), [busy, full]) == "h1"


def test_a_score_is_told_term_by_term_and_in_words() -> None:
    state = host(usage=Usage(1, 8, 4096), load1=16.0)
    parts = {term.name: (term.weight, term.value) for term in terms(state, POLICY)}
    assert parts == {"memory": (1.0, 0.75), "cpus": (1.0, 0.75), "idle": (0.2, 0.5)}
    assert score(state, POLICY) == 1.6
    assert why(state, POLICY) == "most room: 75% of its memory and 75% of its CPUs free, load 16.0"


def test_a_gpu_host_is_not_spent_on_a_cpu_job_while_another_fits() -> None:
    with_gpu, without = host("h1", policy=POLICY), host("h2", usage=Usage(6, 20, 10000))
    with_gpu.take(report("h1", seq=2, gpus=(gpu(1),)), NOW, POLICY)
    assert chosen(want(), [with_gpu, without]) == "h2"
    without.draining = True
    assert chosen(want(), [with_gpu, without]) == "h1"


def test_c36_all_functions_of_a_gpu_go_together_and_held_ones_are_passed_over() -> None:
    two = host()
    two.take(report(seq=2, gpus=(gpu(1), gpu(2))), NOW, POLICY)
    two.gpus_held = frozenset({"0000:01:00.0"})
    answer = choose(want(gpus=1), [two], moment())
    assert isinstance(answer, Placement) and answer.gpu_addresses == ("0000:02:00.0", "0000:02:00.1")
    assert free_gpu(want(gpus=1, gpu_model="T4"), two, moment()) is None
    assert chosen(want(gpus=1, gpu_model="T4"), [two]) is None, "never a machine without the GPU that was asked for"


def test_a_host_where_it_failed_comes_last_but_counts() -> None:
    failed, fuller = host("h1"), host("h2", usage=Usage(6, 20, 10000))
    again = want(avoid=frozenset({"h1"}))
    assert chosen(again, [failed, fuller]) == "h2"
    assert chosen(again, [failed]) == "h1"


def test_pools_keep_people_out_and_in() -> None:
    h1, h2, h3 = (host(name, policy=POOLS) for name in ("h1", "h2", "h3"))
    staff = want(admitted=POOLS.admitted(["staff"]), confined=POOLS.confined(["staff"]))
    student = want(admitted=POOLS.admitted(["students"]), confined=POOLS.confined(["students"]))
    open_to = {
        name: [state.name for state in (h1, h2, h3) if objection(wanted, state, moment(POOLS)) is None]
        for name, wanted in (("staff", staff), ("student", student), ("other", want()))
    }
    assert open_to == {"staff": ["h1", "h2", "h3"], "student": ["h2"], "other": ["h2", "h3"]}
    fast = want(admitted=staff.admitted, labels=frozenset({"fast"}))
    assert [s.name for s in (h1, h2, h3) if objection(fast, s, moment(POOLS)) is None] == ["h1"]


def test_room_that_is_kept_is_given_to_nobody_whom_it_would_delay() -> None:
    short, long = want(lifetime_s=500.0), want(lifetime_s=700.0)
    at = moment(POLICY, NOW, kept(at=NOW + 600))
    assert objection(short, host(), at) is None and objection(long, host(), at) is Reason.RESERVED
    assert objection(replace(long, sid="big"), host(), at) is None, "but to whom it is kept for"
    roomy = kept(at=NOW + 600, sessions=1, cpus=2.0, memory_mib=2048)
    assert objection(long, host(), moment(POLICY, NOW, roomy)) is None, "what is left beside it may be used"
    roomy.spend(long, NOW, 0)
    assert objection(long, host(), moment(POLICY, NOW, roomy)) is Reason.RESERVED, "once"


def test_a_gpu_that_is_waited_for_blocks_no_request_without_gpu() -> None:
    state = host()
    state.take(report(seq=2, gpus=(gpu(1),)), NOW, POLICY)
    at = moment(POLICY, NOW, kept(gpu=frozenset(gpu(1).functions), for_gpu=True))
    assert objection(want(), state, at) is None
    assert objection(want(gpus=1), state, at) is Reason.GPU_BUSY


def test_c34_a_burst_on_equal_hosts_spreads_within_one_of_even() -> None:
    hosts = [host(f"h{n}") for n in range(10)]
    made = index(hosts)
    for number in range(104):
        wanted = want(f"s{number}", cpus=1, memory_mib=64)
        answer = choose(wanted, made.walk(wanted), moment())
        assert isinstance(answer, Placement)
        state = next(state for state in hosts if state.name == answer.host)
        state.usage = Usage(state.usage.sessions + 1, state.usage.cpus + 1, state.usage.memory_mib + 64)
        made.put(state)
    assert Counter(state.usage.sessions for state in hosts) == {10: 6, 11: 4}


def test_c34_a_host_that_grows_while_it_runs_is_not_believed_until_its_agent_starts_anew() -> None:
    state = host()
    state.take(report(seq=2, cpus=512), NOW, POLICY)
    assert "grew" in state.distrust
    state.take(report(seq=3, cpus=512), NOW, POLICY)
    assert "grew" in state.distrust, "saying it twice makes it no truer"
    state.take(report(seq=1, incarnation="j", cpus=512), NOW, POLICY)
    assert state.distrust == ""


def test_c34_a_small_heartbeat_with_impossible_figures_is_not_believed_either() -> None:
    state = host(digest="0" * 16)
    assert state.report
    beat = HostBeat("h1", "i", 2, 0, False, "127.0.0.1:1", 0.0, 1 << 30, 1 << 19, "0" * 16)
    state.take_beat(beat, state.report, NOW, POLICY)
    assert objection(want(), state, moment()) is Reason.NOT_TRUSTED
    state.take_beat(replace(beat, seq=3, memory_free_mib=16000), state.report, NOW, POLICY)
    assert objection(want(), state, moment()) is None


@given(st.integers(0, 1 << 32), st.booleans())
def test_the_index_always_answers_as_a_look_at_every_host_does(seed: int, spread: bool) -> None:
    rng = random.Random(seed)
    policy = replace(POOLS, spread=spread)
    hosts = []
    for number in range(12):
        gpus = rng.choice([(), (), (gpu(1),), (gpu(1), gpu(2, "T4"))])
        state = host(rng.choice(["h", "lab-"]) + str(number), policy=policy, draining=rng.random() < 0.1)
        ready = rng.choice([(), (), ("t1",), ("t1", "t2")])
        templates = tuple(TemplateReport(key, "tiny", "", 1, 64, TemplateState.READY, serving=True) for key in ready)
        state.take(
            report(
                state.name,
                seq=2,
                gpus=gpus,
                load1=rng.uniform(0, 40),
                memory_free_mib=rng.randint(0, 16384),
                templates=templates,
            ),
            NOW - rng.choice([0, 0, 0, 20]),
            policy,
        )
        hosts.append(state)
    made = index(hosts, policy)
    for step in range(30):
        staff = rng.random() < 0.3
        wanted = want(
            f"s{step}",
            cpus=rng.randint(1, 8),
            memory_mib=rng.choice([64, 2048, 8192]),
            gpus=int(rng.random() < 0.3),
            gpu_model=rng.choice(["", "", "T4"]),
            admitted=policy.admitted(["staff"] if staff else []),
            labels=frozenset({"fast"}) if rng.random() < 0.2 else frozenset(),
            avoid=frozenset(rng.sample([state.name for state in hosts], 2)),
            template=rng.choice(["", "t1", "t2"]),
        )
        best = naive(wanted, hosts, moment(policy))
        answer = choose(wanted, made.walk(wanted), moment(policy))
        assert (answer.host if isinstance(answer, Placement) else None) == (best.name if best else None)
        if isinstance(answer, Placement):
            assert best and bool(answer.gpu_addresses) == bool(wanted.resources.gpus)
            assert not best.gpus_held.intersection(answer.gpu_addresses)
            size = wanted.resources
            used = best.usage
            best.usage = Usage(used.sessions + 1, used.cpus + size.cpus, used.memory_mib + size.memory_mib)
            best.gpus_held |= frozenset(answer.gpu_addresses)
            made.put(best)
        else:
            assert all(verdict(wanted, state, moment(policy)) for state in hosts)
