"""What an agent does with commands, with news of its guests, and with time. No I/O of its own.

Rules that keep one request to one machine, whatever is lost, repeated or late:
- a start counts only if its generation is higher than every command number this host has processed;
- it is in the journal before anything is made for it;
- a guest that is held already, or has run here, takes the higher number and is never started a second time;
- what ended stays listed for a while, so that a lost report heals with the next heartbeat.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from deskfleet.agent import limits
from deskfleet.agent.journal import Entry, Journal, JournalError
from deskfleet.agent.limits import Watch
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu, GuestReport, Phase
from deskfleet.schemas.messages import (
    HostFence,
    VmExtend,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Birth, Outcome

log = logging.getLogger(__name__)

#: How long an ended guest stays in the heartbeats: long enough for a scheduler that was cut off to hear of one that has
#: run, lest it starts it again. And how many of them at most.
REMEMBER_S = 600.0
REMEMBER_RUN_S = 24 * 3600.0
REMEMBER = 500


class Hypervisor(Protocol):
    """Starts and ends guests. Calls return at once; news comes through the agent's `spawned` … `exited`."""

    def launch(self, entry: Entry) -> None:
        """Make the overlay, start network and qemu. MUST end in `ready` or `failed`."""

    def shutdown(self, entry: Entry) -> None:
        """Power down, then quit, then kill. Idempotent. MUST end in `exited`, also when nothing runs."""

    def adopt(self, entry: Entry) -> bool:
        """Take over a guest that a former agent started; False when it does not run. A guest that was still
        starting ends in `ready` or `failed` as after `launch`."""

    def cpu_s(self, sid: str) -> float | None:
        """CPU seconds that a guest has used so far; None when that can't be told."""

    def touched(self, sid: str) -> int:
        """A number that changes when a person types or points in a guest."""

    def warn(self, entry: Entry, text: str) -> None:
        """Show a text to the person in a guest, as far as the guest's own agent listens."""

    def clean(self, sid: str) -> None:
        """Remove every process, socket and file of a guest that has ended. Idempotent."""


class Agent:
    """The guests of one host. `now` is the boot-time clock in seconds: it goes on while the machine sleeps and is
    the same before and after a restart of the agent."""

    def __init__(
        self,
        boot_id: str,
        journal: Journal,
        hypervisor: Hypervisor,
        report: Callable[[GuestReport], None],
        now: Callable[[], float],
        images: Callable[[], frozenset[str]],
        gpus: Callable[[], tuple[Gpu, ...]],
    ) -> None:
        self._boot_id = boot_id
        self._journal = journal
        self._hypervisor = hypervisor
        self._report = report
        self._now = now
        self._images = images
        self._gpus = gpus
        self._entries: dict[str, Entry] = {}
        self._watch: dict[str, Watch] = {}
        self.last_generation = 0
        #: True until the scheduler said, in this life of the agent, where the numbers are.
        self.fenced = True

    def recover(self) -> None:
        """Read the journal, take over what still runs, finish what was half done. Called once, before any command.

        Raises:
            JournalError: the journal can't be read; the agent must not go on.
        """
        self._entries, stored = self._journal.load()
        # Every command from before counts no more. One that was refused, and whose refusal the disk did not take, must
        # not be obeyed when it is delivered again: the scheduler has sent the session elsewhere since.
        self.fenced = True
        self.last_generation = max([stored or 0, *(entry.generation for entry in self._entries.values())])
        for entry in list(self._entries.values()):
            if entry.boot_id != self._boot_id:
                self._after_reboot(entry)
            elif not entry.live:
                self._hypervisor.clean(entry.sid)
            elif self._hypervisor.adopt(entry):
                self._watch[entry.sid] = Watch(empty_since=self._now())
                if entry.phase is Phase.STOPPING:
                    self._hypervisor.shutdown(entry)
            elif entry.phase is Phase.STOPPING:
                self._end(entry, entry.outcome or Outcome.STOPPED, entry.reason)
            elif entry.ran:
                self._end(entry, Outcome.GUEST_OFF, Reason.GUEST_OFF, "it ended while the agent was away")
            else:
                self._end(entry, Outcome.FAILED, Reason.AGENT_RESTARTED)

    def _after_reboot(self, entry: Entry) -> None:
        if not entry.live:
            # The boot-time clock has started anew, and so does the time for which it is remembered.
            self._put(replace(entry, boot_id=self._boot_id, ended_at=self._now()))
            self._hypervisor.clean(entry.sid)
        else:
            moved = replace(entry, boot_id=self._boot_id)
            self._end(moved, Outcome.LOST if entry.ran else Outcome.FAILED, Reason.HOST_REBOOTED)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything the agent remembers."""
        return tuple(self._entries.values())

    def guests(self) -> tuple[GuestReport, ...]:
        """The guests as they stand in a heartbeat: live ones and those that ended lately."""
        return tuple(self._seen(entry) for entry in self._entries.values())

    def _seen(self, entry: Entry) -> GuestReport:
        watch = self._watch.get(entry.sid)
        return entry.report(self._now(), watch.viewers if watch else 0)

    def _put(self, entry: Entry) -> None:
        self._journal.put(entry)
        self._entries[entry.sid] = entry
        self.last_generation = max(self.last_generation, entry.generation)

    def _save(self, entry: Entry) -> None:
        """Store a step that has happened anyway: when the disk refuses, what is in memory still counts, and a
        restart finds the truth by looking at the processes."""
        try:
            self._put(entry)
        except JournalError as error:
            log.error("%s", error)
            self._entries[entry.sid] = entry
            self.last_generation = max(self.last_generation, entry.generation)
        self._report(self._seen(entry))

    # --- commands -------------------------------------------------------------------------------------------

    def fence(self, fence: HostFence) -> None:
        """Learn where the numbers are: nothing starts any more under this one or a lower one. An agent that begins
        waits for it; one whose host was declared dead is told which commands are void."""
        if not self.fenced and fence.generation <= self.last_generation:
            return
        generation = max(fence.generation, self.last_generation)
        try:
            self._journal.set_generation(generation)
        except JournalError as error:
            log.error("%s", error)
            return
        self.last_generation = generation
        self.fenced = False

    def start(self, start: VmStart) -> None:
        """Start a guest, or say why not."""
        held = self._entries.get(start.sid)
        if held and (held.live or held.ran):
            # Also when it has run and ended: its end did not reach the scheduler before it asked again.
            self._save(replace(held, generation=max(held.generation, start.generation)))
            return
        if self.fenced:
            self._report(_refused(start, Reason.FENCED))
            return
        if start.generation <= self.last_generation:
            same = held and held.generation >= start.generation
            self._report(self._seen(held) if held and same else _refused(start, Reason.STALE))
            return
        problem = self._objection(start)
        if problem:
            self._save(self._tombstone(start, Outcome.FAILED, *problem))
            return
        entry = Entry(start.sid, start.generation, self._boot_id, Phase.STARTING, start)
        try:
            self._put(entry)
        except JournalError as error:
            # Nothing may run that the journal does not know. The refusal itself can only be kept in memory.
            self._save(self._tombstone(start, Outcome.FAILED, Reason.STATE_UNWRITABLE, str(error)))
            return
        self._watch[start.sid] = Watch()
        self._report(self._seen(entry))
        self._hypervisor.launch(entry)

    def _objection(self, start: VmStart) -> tuple[Reason, str] | None:
        if start.sha256 not in self._images():
            return Reason.IMAGE_MISSING, f"no image with digest {start.sha256[:12]}…"
        if not start.gpu_addresses:
            return None
        wanted = set(start.gpu_addresses)
        taken = {a for e in self._entries.values() if e.live and e.start for a in e.start.gpu_addresses}
        if wanted & taken:
            return Reason.GPU_UNAVAILABLE, f"in use: {', '.join(sorted(wanted & taken))}"
        if not any(gpu.offered and set(gpu.functions) == wanted for gpu in self._gpus()):
            return Reason.GPU_UNAVAILABLE, f"not a whole GPU that is free to give: {', '.join(sorted(wanted))}"
        return None

    def _tombstone(self, command: VmStart | VmStop, outcome: Outcome, reason: Reason, detail: str = "") -> Entry:
        """An ended entry for a command that started nothing; it carries the command's number."""
        return Entry(
            command.sid,
            command.generation,
            self._boot_id,
            Phase.ENDED,
            ended_at=self._now(),
            outcome=outcome,
            reason=reason,
            detail=detail,
        )

    def stop(self, stop: VmStop) -> None:
        """End a guest. A stop that overtook its start leaves its number behind, so the start counts no more."""
        entry = self._entries.get(stop.sid)
        if entry is None or (not entry.live and entry.generation < stop.generation):
            self._save(self._tombstone(stop, stop.outcome, stop.reason))
        elif not entry.live:
            self._report(self._seen(entry))
        elif entry.generation <= stop.generation:
            self._begin_stop(entry, stop.outcome, stop.reason)

    def _begin_stop(self, entry: Entry, outcome: Outcome, reason: Reason) -> None:
        if entry.phase is not Phase.STOPPING:
            entry = replace(entry, phase=Phase.STOPPING, outcome=outcome, reason=reason)
            self._save(entry)
        self._hypervisor.shutdown(entry)

    def extend(self, extend: VmExtend) -> None:
        """Let a guest run longer. What it does not change is answered as well: the scheduler asks until it knows."""
        entry = self._entries.get(extend.sid)
        if entry is None or not entry.live or entry.start is None or entry.generation > extend.generation:
            return
        lifetime_s = max(entry.start.lifetime_s, extend.lifetime_s)
        self._save(replace(entry, start=replace(entry.start, lifetime_s=lifetime_s)))

    # --- news from the hypervisor ---------------------------------------------------------------------------

    def ready(self, sid: str, birth: Birth = Birth.BOOTED) -> None:
        """The guest's display answers."""
        entry = self._entries.get(sid)
        if entry and entry.phase is Phase.STARTING:
            self._save(replace(entry, phase=Phase.RUNNING, ran=True, ready_at=self._now(), birth=birth))
            self._watch.setdefault(sid, Watch()).empty_since = self._now()

    def failed(self, sid: str, reason: Reason, detail: str) -> None:
        """The guest could not be started."""
        entry = self._entries.get(sid)
        if entry and entry.live:
            if entry.phase is Phase.STOPPING:
                self._end(entry, entry.outcome or Outcome.STOPPED, entry.reason)
            else:
                self._end(entry, Outcome.FAILED, reason, detail)

    def exited(self, sid: str, detail: str = "") -> None:
        """The guest's qemu has ended, by our order or by itself."""
        entry = self._entries.get(sid)
        if entry and entry.live:
            if entry.phase is Phase.STOPPING:
                self._end(entry, entry.outcome or Outcome.STOPPED, entry.reason)
            elif entry.phase is Phase.RUNNING:
                self._end(entry, Outcome.GUEST_OFF, Reason.GUEST_OFF, detail)
            else:
                self._end(entry, Outcome.FAILED, Reason.QEMU_EXITED, detail)

    def _end(self, entry: Entry, outcome: Outcome, reason: Reason | None, detail: str = "") -> None:
        # Clean first: once it is reported as ended, its GPU and its memory are given to the next.
        self._hypervisor.clean(entry.sid)
        self._watch.pop(entry.sid, None)
        self._save(
            replace(entry, phase=Phase.ENDED, outcome=outcome, reason=reason, detail=detail, ended_at=self._now())
        )

    def viewers(self, sid: str, count: int) -> None:
        """How many consoles are open on a guest now."""
        watch = self._watch.get(sid)
        if watch:
            limits.count_viewers(watch, count, self._now())

    def says(self, sid: str, text: str) -> None:
        """What people should know of a guest that runs; empty when there is nothing."""
        entry = self._entries.get(sid)
        if entry and entry.phase is Phase.RUNNING and entry.detail != text:
            log.warning("%s: %s", sid, text or "goes on")
            self._save(replace(entry, detail=text))

    # --- time -----------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """End what has reached a limit, and forget what ended long ago."""
        now = self._now()
        for entry in list(self._entries.values()):
            if entry.phase is Phase.RUNNING and entry.start:
                self._apply_limits(entry, entry.start, now)
        ended = sorted((e for e in self._entries.values() if not e.live), key=lambda e: e.ended_at)
        old = [e for e in ended if now - e.ended_at > (REMEMBER_RUN_S if e.ran else REMEMBER_S)]
        old = old or ended[: max(0, len(ended) - REMEMBER)]
        if old and not self.fenced:
            try:
                self._journal.set_generation(self.last_generation)  # it must outlive the entries that carry it
                for entry in old:
                    self._journal.forget(entry.sid)
                    del self._entries[entry.sid]
            except JournalError as error:
                log.error("%s", error)

    def _apply_limits(self, entry: Entry, start: VmStart, now: float) -> None:
        watch, left_s = self._watch[entry.sid], entry.ready_at + start.lifetime_s - now
        if start.idle_s:
            limits.notice_use(watch, self._hypervisor.cpu_s(entry.sid), self._hypervisor.touched(entry.sid), now)
        due = limits.due(start, watch, left_s, now)
        if due:
            self._begin_stop(entry, *due)
            return
        for text in limits.warnings(start, watch, left_s, now):
            self._hypervisor.warn(entry, text)


def _refused(start: VmStart, reason: Reason) -> GuestReport:
    return GuestReport(start.sid, start.generation, Phase.ENDED, outcome=Outcome.FAILED, reason=reason)
