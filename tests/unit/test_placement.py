"""Placement: the right host, for a reason; or no host, with a reason each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskfleet.scheduler.placement import (
    Candidate,
    NoFit,
    Placement,
    Policy,
    Usage,
    Want,
    choose,
    free_gpu,
    refusal,
)
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu, HostReport
from deskfleet.schemas.session import Resources

IMAGE = "a" * 64
POLICY = Policy(host_reserve_mib=0, guest_overhead_mib=0)


def gpu(number: int, model: str = "A100", offered: bool = True) -> Gpu:
    address = f"0000:0{number}:00."
    return Gpu(address + "0", model, number, (address + "0", address + "1"), offered)


def host(name: str = "h1", **changes: object) -> Candidate:
    report = HostReport(
        name, "i", 1, "b", 0, False, "127.0.0.1:1", "kvm", 8, 16384, 0.0, 16384, 1 << 20, 1 << 19, (IMAGE,)
    )
    candidate = Candidate(name, report, Usage())
    known = {key: value for key, value in changes.items() if hasattr(candidate, key)}
    seen = {key: value for key, value in changes.items() if key not in known}
    return replace(candidate, report=replace(report, **seen), **known)  # type: ignore[arg-type]


def want(sid: str = "s", **changes: object) -> Want:
    return Want(sid, replace(Resources(2, 2048, 10), **changes), IMAGE)  # type: ignore[arg-type]


def why(candidate: Candidate, wanted: Want | None = None) -> Reason | None:
    verdict = refusal(wanted or want(), candidate, POLICY)
    return verdict.reason if verdict else None


REFUSALS = [
    (host(fresh=False), want(), Reason.SILENT),
    (replace(host(), report=None), want(), Reason.SILENT),
    (host(distrust="no CPU"), want(), Reason.NOT_TRUSTED),
    (host(fenced=True), want(), Reason.FENCED),
    (host(accel="none", problems=("no qemu",)), want(), Reason.NOT_TRUSTED),
    (host(draining=True), want(), Reason.DRAINING),
    (host(images=()), want(), Reason.NO_IMAGE),
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


@pytest.mark.parametrize(("candidate", "wanted", "reason"), REFUSALS, ids=lambda v: str(v)[:20])
def test_each_filter_says_why(candidate: Candidate, wanted: Want, reason: Reason) -> None:
    verdict = refusal(wanted, candidate, POLICY)
    assert verdict is not None and verdict.reason is reason
    assert verdict.sentence.startswith("h1: ") and len(verdict.sentence) > 8
    answer = choose(wanted, [candidate], POLICY)
    assert isinstance(answer, NoFit) and [v.reason for v in answer.verdicts] == [reason]


def test_a_fit_is_exact_at_its_edge() -> None:
    assert why(host(usage=Usage(1, 30, 14336))) is None
    assert why(host(usage=Usage(1, 31, 14336))) is Reason.CPUS_SHORT
    assert why(host(usage=Usage(1, 30, 14337))) is Reason.MEMORY_SHORT


def test_without_hosts_it_says_so() -> None:
    answer = choose(want(), [], POLICY)
    assert isinstance(answer, NoFit) and answer.verdicts[0].reason is Reason.NO_HOSTS


def test_spread_takes_the_emptier_host_and_pack_the_fuller_one() -> None:
    hosts = [host("h1", usage=Usage(2, 4, 8192)), host("h2")]
    assert choose(want(), hosts, POLICY) == Placement("h2")
    assert choose(want(), hosts, replace(POLICY, spread=False)) == Placement("h1")


def test_load_decides_between_equals_only() -> None:
    busy, calm = host("h1", load1=20.0), host("h2", load1=0.1)
    assert choose(want(), [busy, calm], POLICY) == Placement("h2")
    full = host("h2", load1=0.1, usage=Usage(4, 24, 12288))
    assert choose(want(), [busy, full], POLICY) == Placement("h1")


def test_a_gpu_host_is_not_spent_on_a_cpu_job_while_another_fits() -> None:
    with_gpu, without = host("h1", gpus=(gpu(1),)), host("h2", usage=Usage(6, 20, 10000))
    assert choose(want(), [with_gpu, without], POLICY) == Placement("h2")
    assert choose(want(), [with_gpu, host("h2", draining=True)], POLICY) == Placement("h1")


def test_c36_all_functions_of_a_gpu_go_together_and_held_ones_are_passed_over() -> None:
    two = host(gpus=(gpu(1), gpu(2)), gpus_held=frozenset({"0000:01:00.0"}))
    assert choose(want(gpus=1), [two], POLICY) == Placement("h1", ("0000:02:00.0", "0000:02:00.1"))
    assert free_gpu(want(gpus=1, gpu_model="T4"), two) is None


def test_a_host_where_it_failed_comes_last_but_counts() -> None:
    failed, fuller = host("h1", failed_before=True), host("h2", usage=Usage(6, 20, 10000))
    assert choose(want(), [failed, fuller], POLICY) == Placement("h2")
    assert choose(want(), [failed], POLICY) == Placement("h1")


def test_c34_a_burst_on_equal_hosts_spreads_evenly() -> None:
    usage = {f"h{n}": Usage() for n in range(10)}
    for number in range(100):
        hosts = [host(name, usage=used, load1=float(n)) for n, (name, used) in enumerate(usage.items())]
        answer = choose(want(f"s{number}", cpus=1, memory_mib=64), hosts, replace(POLICY, max_load=100))
        assert isinstance(answer, Placement)
        used = usage[answer.host]
        usage[answer.host] = Usage(used.sessions + 1, used.cpus + 1, used.memory_mib + 64)
    counts = Counter({name: used.sessions for name, used in usage.items()})
    # Load may tilt equals by a tenth of a share; nobody gets twice what another gets.
    assert max(counts.values()) <= 2 * min(counts.values())


candidates = st.lists(
    st.builds(
        host,
        name=st.sampled_from([f"h{n}" for n in range(5)]),
        usage=st.builds(Usage, st.integers(0, 300), st.integers(0, 40), st.integers(0, 20000)),
        fresh=st.booleans(),
        draining=st.booleans(),
        load1=st.floats(0, 50),
        memory_free_mib=st.integers(0, 16384),
        disk_free_mib=st.integers(0, 1 << 19),
        gpus=st.sampled_from([(), (gpu(1),), (gpu(1), gpu(2, "T4"))]),
        gpus_held=st.sampled_from([frozenset(), frozenset({"0000:01:00.0"})]),
    ),
    max_size=6,
    unique_by=lambda candidate: candidate.name,
)


@given(candidates, st.integers(1, 8), st.integers(64, 16384), st.integers(0, 1))
def test_the_answer_always_fits_and_a_refusal_covers_every_host(
    hosts: list[Candidate], cpus: int, memory_mib: int, gpus: int
) -> None:
    wanted = want(cpus=cpus, memory_mib=memory_mib, gpus=gpus)
    answer = choose(wanted, hosts, POLICY)
    if isinstance(answer, NoFit):
        assert {v.host for v in answer.verdicts} == ({h.name for h in hosts} or {"-"})
        assert all(refusal(wanted, h, POLICY) for h in hosts)
    else:
        chosen = next(h for h in hosts if h.name == answer.host)
        assert refusal(wanted, chosen, POLICY) is None
        assert bool(answer.gpu_addresses) == bool(gpus)
        assert not chosen.gpus_held.intersection(answer.gpu_addresses)
    assert choose(wanted, list(reversed(hosts)), POLICY) == answer or isinstance(answer, NoFit)
