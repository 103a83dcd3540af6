"""The queue, on the real scheduler: whose turn it is, what is kept for whom, and what people are told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.hosts import MACHINE, POLICY, gpu
from support.scheduling import Control

from deskfleet.portal.details import form_of
from deskfleet.scheduler import waiting
from deskfleet.scheduler.filters import Want
from deskfleet.scheduler.policy import Caps, Pool, QueueClass
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.messages import HostFence, VmStop
from deskfleet.schemas.session import Outcome
from deskfleet.schemas.verdict import Outlook

ONE_EACH = replace(POLICY, cpu_overcommit=1.0)


def reasons(control: Control, sid: str) -> list[tuple[str, Reason]]:
    return [(verdict.host, verdict.reason) for verdict in control.told(sid).verdicts]


def test_who_does_not_fit_waits_with_a_place_a_reason_and_the_end_of_a_lease_as_estimate() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=2)
    first = control.launch(cpus=2, lifetime_s=600)
    assert control.state(first) == "running"
    control.wait(60)
    second, third = control.launch("bo", cpus=2, lifetime_s=300), control.launch("cy", cpus=2)
    control.wait(6)
    told = control.told(second)
    assert (told.place, control.told(third).place) == (1, 2)
    assert told.estimate_s is not None and abs(told.estimate_s - 534) <= 6
    later = control.told(third).estimate_s
    assert later is not None and abs(later - 834) <= 6, "after the one before it"
    assert reasons(control, second) == [("h1", Reason.CPUS_SHORT)]
    assert control.told(second).verdicts[0].sentence == "h1: 0 of 2 CPUs free, 2 wanted"
    control.wait(540)
    assert control.state(second) == "running" and control.told(third).place == 1


def test_an_estimate_is_unknown_when_no_lease_end_can_tell() -> None:
    control = Control(ONE_EACH)
    host = control.host(cpus=2)
    control.launch(cpus=2)
    waiting = control.launch("bo", cpus=2)
    host.cut()
    control.wait(20)
    assert control.told(waiting).estimate_s is None
    assert reasons(control, waiting) == [("h1", Reason.SILENT)]


def test_a_wait_can_be_cancelled_and_ends_at_its_deadline() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=1)
    control.launch()
    cancelled, late = control.launch("bo"), control.launch("cy", wait_s=30)
    control.stop(cancelled, "bo")
    assert control.session(cancelled).outcome is Outcome.CANCELLED
    control.wait(35)
    ended = control.session(late)
    assert (ended.outcome, ended.reason) == (Outcome.NO_CAPACITY, Reason.WAITED_TOO_LONG)


def test_who_comes_while_the_leader_is_paused_has_not_waited_for_the_pause() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=1)
    control.launch()
    before = control.launch("bo", wait_s=60)
    control.wait(2)
    control.clock.now += 40.0  # the leader stands still, and goes on with what came meanwhile
    after = control.launch("cy", wait_s=30)
    control.wait(10)
    assert control.state(before) == control.state(after) == "queued"
    control.wait(12)
    assert (control.state(before), control.state(after)) == ("ended", "queued"), "it has waited for all of it"
    control.wait(10)
    assert control.state(after) == "ended"


def test_a_deadline_counts_waiting_and_not_the_date() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=1)
    control.launch()
    waiting = control.launch("bo", wait_s=60)
    for shift in (86_400.0, -86_400.0, 6e8):
        control.clock.shift = shift
        control.wait(15)
    assert control.state(waiting) == "queued"


def test_classes_go_in_their_order() -> None:
    classes = (QueueClass("course", groups=("students",)), QueueClass("staff", users=("prof",)))
    control = Control(replace(ONE_EACH, classes=classes))
    control.host(cpus=1)
    running = control.launch("zed", lifetime_s=100)
    usual, staff, course = control.launch("ann"), control.launch("prof"), control.launch("bo", groups=("students",))
    control.wait(6)
    assert [control.told(sid).place for sid in (usual, staff, course)] == [3, 2, 1]
    assert control.session(course).queue_class == "course" and control.session(usual).queue_class == "normal"
    control.stop(running, "zed")
    assert control.state(course) == "running"


def test_within_a_class_who_has_least_goes_first_whoever_asked_first() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=5)
    held = [control.launch("ann") for _ in range(4)] + [control.launch("bo")]
    greedy = [control.launch("ann") for _ in range(3)]
    modest, new = control.launch("bo"), control.launch("cy")
    control.wait(6)
    assert [control.told(sid).place for sid in (new, modest, *greedy)] == [1, 2, 3, 4, 5]
    control.stop(held[0])
    assert control.state(new) == "running"
    control.stop(held[1])
    assert control.state(modest) == "running" and {control.state(sid) for sid in greedy} == {"queued"}


def test_a_cap_keeps_a_person_waiting_and_nobody_else() -> None:
    caps = replace(POLICY, user_caps=Caps(sessions=2), group_caps=(("students", Caps(cpus=3)),))
    control = Control(caps)
    control.host(cpus=8)
    first, second, third = control.launch("ann"), control.launch("ann"), control.launch("ann")
    other = control.launch("bo")
    assert [control.state(sid) for sid in (first, second, third, other)] == ["running", "running", "queued", "running"]
    assert control.told(third).verdicts[0].sentence == "you have 2 of 2 desktops in use, 1 wanted"
    students = [control.launch(name, cpus=2, groups=("students",)) for name in ("cy", "di")]
    assert [control.state(sid) for sid in students] == ["running", "queued"]
    assert reasons(control, students[1]) == [("", Reason.GROUP_CAP)]
    control.stop(first)
    assert control.state(third) == "running"


def test_more_than_a_cap_allows_at_all_is_refused_at_once() -> None:
    control = Control(replace(POLICY, user_caps=Caps(cpus=2)))
    control.host(cpus=8)
    sid = control.launch(cpus=4)
    assert (control.session(sid).outcome, control.session(sid).reason) == (Outcome.REJECTED, Reason.NEVER_FITS)
    assert control.ask(cpus=4).outlook is Outlook.NEVER


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=4)
    control.launch("a", cpus=2, lifetime_s=100)
    control.launch("b", cpus=2, lifetime_s=200)
    large = control.launch("big", cpus=4, lifetime_s=100)
    small = []
    for second in range(300):
        if control.state(large) == "running":
            break
        if second % 10 == 0:
            small.append(control.launch(f"s{second}", cpus=1, lifetime_s=1000))
        control.wait(1)
        if 110 <= second < 195:
            # Two CPUs are free, and kept.
            assert {tuple(reasons(control, sid)) for sid in small} == {(("h1", Reason.RESERVED),)}
    assert control.state(large) == "running" and second <= 205
    assert {control.state(sid) for sid in small} == {"queued"}


def test_small_requests_fill_the_time_until_then_when_they_do_not_delay_it() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=4)
    control.launch("a", cpus=2, lifetime_s=1000)
    large = control.launch("big", cpus=4)
    control.wait(2)
    short, long = control.launch("s", lifetime_s=300), control.launch("l", lifetime_s=3000)
    assert (control.state(large), control.state(short), control.state(long)) == ("queued", "running", "queued")
    assert reasons(control, long) == [("h1", Reason.RESERVED)]


def test_c35_a_waiting_gpu_request_blocks_no_cpu_request_and_no_gpu_is_given_twice() -> None:
    control = Control(POLICY)
    control.host(cpus=8, gpus=(gpu(1),))
    first = control.launch("a", gpus=1, lifetime_s=500)
    waiting = control.launch("b", gpus=1)
    control.wait(2)
    plain = [control.launch(f"p{n}", lifetime_s=36_000) for n in range(5)]
    assert control.state(waiting) == "queued" and {control.state(sid) for sid in plain} == {"running"}
    assert reasons(control, waiting) == [("h1", Reason.GPU_BUSY)]
    estimate = control.told(waiting).estimate_s
    assert estimate is not None and abs(estimate - 500) <= 10
    control.stop(first, "a")
    assert control.session(waiting).gpu_addresses == gpu(1).functions


def test_a_failed_start_goes_to_the_next_host_and_every_reason_is_kept() -> None:
    control = Control(POLICY)
    for name in ("h1", "h2", "h3"):
        control.host(name)
    control.hosts["h1"].broken = control.hosts["h2"].broken = True
    sid = control.launch()
    assert (control.state(sid), control.session(sid).host) == ("running", "h3")
    steps = [(step.event.value, step.host) for step in control.reader.timeline(sid)]
    assert [step for step in steps if step[0] == "place"] == [("place", "h1"), ("place", "h2"), ("place", "h3")]
    assert [step for step in steps if step[0] == "retry"] == [("retry", "h1"), ("retry", "h2")]
    control.hosts["h3"].broken = True
    given_up = control.launch()
    ended = control.session(given_up)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.QEMU_EXITED)
    assert [step.detail for step in control.reader.timeline(given_up)].count("no /dev/kvm") == 2


def test_failed_starts_are_remembered_over_a_restart_of_the_scheduler() -> None:
    control = Control(POLICY, max_attempts=9)
    control.host("h1").broken = True
    sid = control.launch()
    assert control.state(sid) == "queued", "the one host has failed three times and rests"
    control.start()
    failures = control.scheduler.decisions.queue.failures[sid]
    assert [(failure.host, failure.reason) for failure in failures] == [("h1", Reason.QEMU_EXITED)] * 3
    assert failures[0].sentence == "h1: could not start it: no /dev/kvm"
    control.host("h2", cpus=1)
    control.wait(6)
    assert control.session(sid).host == "h2", "though h1 has more room, and rests no more for the new scheduler"


def test_a_host_that_fails_rests_is_tried_by_one_launch_and_rests_longer() -> None:
    control = Control(POLICY, max_attempts=1)
    control.host("h1").broken = True
    for n in range(3):
        control.launch(f"u{n}")
    waiting = [control.launch(f"w{n}") for n in range(3)]
    assert reasons(control, waiting[0]) == [("h1", Reason.RESTING)]
    assert "rests for another 5 min" in control.told(waiting[0]).verdicts[0].detail
    control.wait(305)
    assert [control.state(sid) for sid in waiting] == ["ended", "queued", "queued"], "one launch tries it"
    assert "rests for another 10 min" in control.told(waiting[1]).verdicts[0].detail
    control.hosts["h1"].broken = False
    control.wait(605)
    assert [control.state(sid) for sid in waiting] == ["ended", "running", "running"]


def test_a_broken_image_takes_no_host_out_of_service_for_others() -> None:
    control = Control(POLICY, max_attempts=1)
    control.machines["other"] = replace(MACHINE, name="other", sha256="b" * 64)
    control.host("h1").broken = True
    for n in range(3):
        control.launch(f"u{n}")
    state = control.scheduler.fleet.hosts["h1"]
    assert state.resting.left_s("a" * 64, control.clock.now) is not None
    assert state.resting.left_s("b" * 64, control.clock.now) is None


def test_c41_a_silent_host_gets_nothing_new_and_loses_nothing() -> None:
    control = Control(POLICY)
    host = control.host("h1")
    sid = control.launch()
    control.host("h2", cpus=1)
    before = control.session(sid)
    host.cut()
    control.wait(1800)
    assert control.session(sid) == before, "started nowhere else by itself"
    other = control.launch("bo")
    assert control.session(other).host == "h2"
    host.heal()
    control.wait(10)
    assert control.session(sid) == before


def test_a_host_declared_dead_loses_its_sessions_and_comes_back_clean() -> None:
    control = Control(POLICY)
    host = control.host("h1")
    sid = control.launch()
    control.declare_dead("h1")
    assert control.state(sid) == "running", "a host that answers is not dead"
    host.cut()
    control.wait(30)
    on_its_way = control.scheduler.fleet.hosts["h1"].generation
    control.declare_dead("h1")
    ended = control.session(sid)
    assert (ended.outcome, ended.reason) == (Outcome.LOST, Reason.HOST_DEAD)
    waiting = control.launch("bo")
    control.wait(6)
    assert reasons(control, waiting) == [("h1", Reason.DECLARED_DEAD)]
    assert control.reader.hosts()[0].dead
    host.heal()
    control.wait(12)
    assert any(isinstance(message, VmStop) and message.sid == sid for message in host.told)
    assert any(isinstance(message, HostFence) and message.generation > on_its_way for message in host.told)
    assert not control.reader.hosts()[0].dead and control.state(waiting) == "running"


def test_draining_is_told_and_undone() -> None:
    control = Control(POLICY)
    control.host("h1")
    running = control.launch()
    control.drain("h1", text="new disks at 18:00")
    waiting = control.launch("bo")
    assert (control.state(running), control.state(waiting)) == ("running", "queued")
    assert reasons(control, waiting) == [("h1", Reason.DRAINING)]
    assert control.reader.hosts()[0].message == "new disks at 18:00"
    control.drain("h1", False)
    assert control.state(waiting) == "running"


def test_before_the_click_it_says_now_waits_or_never() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=4)
    control.wait(31)
    now = control.ask(cpus=4)
    assert (now.outlook, now.host) == (Outlook.NOW, "h1") and "most room" in now.why
    control.launch(cpus=4, lifetime_s=600)
    waits = control.ask("bo", cpus=1)
    assert (waits.outlook, waits.place) == (Outlook.WAITS, 1)
    assert waits.estimate_s is not None and abs(waits.estimate_s - 600) <= 5
    never = control.ask(cpus=8)
    assert never.outlook is Outlook.NEVER and never.largest
    assert (never.largest.cpus, never.largest.memory_mib) == (4, 16384)
    assert "the largest that fits is 4 CPUs" in never.verdicts[0].detail
    form = form_of(never.verdicts[0].detail)
    assert form and form_of(form[1]["text"]) and form_of(never.why), "the portal can say it in no other language"
    no_gpu = control.ask(gpus=1)
    assert no_gpu.outlook is Outlook.NEVER and no_gpu.verdicts[0].reason is Reason.GPU_NONE
    sid = control.launch(cpus=8)
    assert control.session(sid).reason is Reason.NEVER_FITS, "and who asks for it all the same is refused at once"


def test_nothing_is_called_impossible_before_hosts_had_time_to_report() -> None:
    control = Control(ONE_EACH)
    control.host(cpus=1)
    sid = control.launch(cpus=8)
    assert control.state(sid) == "queued"
    control.host("h2", cpus=8)
    assert control.state(sid) == "running"


def test_a_label_that_no_host_has_is_named() -> None:
    pools = (Pool("render", ("h2",), ("fast-disk",)),)
    control = Control(replace(POLICY, pools=pools))
    control.machines["tiny"] = replace(MACHINE, labels=("fast-disk",))
    control.host("h1")
    sid = control.launch()
    assert reasons(control, sid) == [("h1", Reason.LABEL_MISSING)]
    control.host("h2")
    assert control.session(sid).host == "h2"


def test_a_running_session_is_let_run_longer_up_to_the_cap_and_estimates_follow() -> None:
    control = Control(ONE_EACH, max_lifetime_s=1000)
    host = control.host(cpus=1)
    sid = control.launch(lifetime_s=300)
    began = control.session(sid).changed_at
    waiting = control.launch("bo", lifetime_s=500)
    control.extend(sid, 600, actor="bo")
    control.extend(sid, 200)
    assert control.session(sid).lifetime_s == 300, "not by somebody else, and never shorter"
    control.extend(sid, 600)
    assert (control.session(sid).lifetime_s, control.session(sid).changed_at) == (600, began)
    control.wait(6)
    estimate = control.told(waiting).estimate_s
    assert estimate is not None and abs(estimate - 594) <= 2
    control.extend(sid, 10**6)
    assert control.session(sid).lifetime_s == 1000
    control.wait(990)
    assert control.state(sid) == "running"
    control.wait(20)
    assert control.session(sid).outcome is Outcome.EXPIRED and control.state(waiting) == "running"
    assert host.guests[sid][0].phase.value == "ended"


def test_an_extension_that_was_lost_on_its_way_is_told_again() -> None:
    control = Control(POLICY)
    host = control.host("h1")
    sid = control.launch(lifetime_s=300)
    host.deaf = True
    control.extend(sid, 900)
    control.wait(6)
    assert host.guests[sid][0].lifetime_s == 300
    host.deaf = False
    control.wait(12)
    assert host.guests[sid][0].lifetime_s == 900


def test_more_than_a_group_may_have_at_all_is_refused_at_once() -> None:
    control = Control(replace(POLICY, group_caps=(("students", Caps(cpus=2)),)))
    control.host(cpus=8)
    sid = control.launch(cpus=4, groups=("students",))
    assert control.session(sid).reason is Reason.NEVER_FITS
    assert control.state(control.launch(cpus=4)) == "running", "others are not the group"


def test_a_long_queue_is_told_bit_by_bit_and_everybody_gets_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_TOLD", 3)
    control = Control(ONE_EACH)
    control.host(cpus=1)
    control.launch(lifetime_s=36_000)
    sids = [control.launch(f"u{n:02}") for n in range(10)]
    control.wait(6)
    assert [control.told(sid).place for sid in sids] == list(range(1, 11))


def test_requests_that_no_lease_helps_do_not_keep_room_from_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = waiting.reserve

    def counting(want: Want, *args: object) -> object:
        looked.append(want.sid)
        return real(want, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(waiting, "reserve", counting)
    control = Control(ONE_EACH, settle_s=1e9)
    control.host(cpus=4)
    control.launch("a", cpus=3, lifetime_s=500)
    hopeless = [control.launch(f"h{n}", cpus=5, memory_mib=64 + n) for n in range(6)]
    large = control.launch("big", cpus=4)
    looked.clear()
    control.wait(4)
    small = control.launch("s", cpus=1, lifetime_s=5000)
    assert control.state(small) == "queued" and reasons(control, small) == [("h1", Reason.RESERVED)]
    assert set(looked) <= {*hopeless, large} and len(looked) < 4 * waiting.MOST_PLANS
