"""What is known from outside, and what must hold at each instant. Nothing here asks the product's opinion: it looks at
the starts and ends of machines, at what was stored, and at what went over the wires.

I1 no lost request, I2 one request one machine, I3 one device one session, I4 nothing left behind, I5 nothing taken
away, I6 the right desktop, I7 tokens end, I10 limits hold, I12 time is only time.
"""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256
from typing import TYPE_CHECKING

from sim.host import CPUS, MEMORY_MIB, Node, Vm
from sim.process import Process, Violation

from deskfleet.agent.core import REMEMBER_RUN_S
from deskfleet.agent.journal import Entry
from deskfleet.runtime.bus import Delivery, Outgoing, Settlement
from deskfleet.schemas import topology
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Phase
from deskfleet.schemas.messages import (
    HostFence,
    LaunchRequested,
    SessionChanged,
    StopRequested,
    VmReport,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import State
from deskfleet.schemas.tickets import LIFETIME_S, Tickets
from deskfleet.schemas.wire import decode

if TYPE_CHECKING:
    from sim.doors import Console, Door
    from sim.ready import Kept
    from sim.world import World

_OVER = (State.STOPPING, State.ENDED)
_BY_TIME = {Reason.EXPIRED, Reason.DISCONNECTED, Reason.NEVER_CONNECTED}


class Evidence:
    """The witness. Every method that the world calls may raise Violation."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.log = sha256()
        self.requests: dict[str, LaunchRequested] = {}
        self.asked_at: dict[str, float] = {}
        self.accepted: set[str] = set()
        self.stop_asked: set[str] = set()
        self.stop_accepted: set[str] = set()
        self.spawns: list[tuple[str, str]] = []
        #: sid -> the host on which it has run, as its journal or the ledger says.
        self.readied: dict[str, str] = {}
        self.ended_itself: set[str] = set()
        #: When machines ended.
        self.gone_at: dict[str, float] = {}
        #: Hosts that lost what they ran, and when last; hosts that an administrator wanted to give up.
        self.upset: dict[str, float] = {}
        self.given_up: set[str] = set()
        #: What the schedulers told the hosts, in order.
        self.decisions: list[tuple[str, str, bytes]] = []
        #: Whatever concerned a session, with the login of who sent it.
        self.sent: list[tuple[str, Outgoing]] = []
        self.uses: Counter[str] = Counter()
        self.signed_at: dict[str, float] = {}
        self._seen_commits = -1
        self._judged: set[str] = set()
        #: At the last look: hosts that take no new sessions, and where sessions were.
        self._shut: set[str] = set()
        self._placed: dict[str, str] = {}

    def note(self, text: str) -> None:
        """A line of the event log."""
        self.log.update(text.encode())

    # --- what people do -------------------------------------------------------------------------------------

    def asked(self, request: LaunchRequested) -> None:
        """Somebody clicked on Launch; whether it was accepted is not known yet."""
        self.requests.setdefault(request.sid, request)
        self.asked_at.setdefault(request.sid, self.world.time.now)

    def swept(self, _portal: Process) -> None:
        """The portal has swept: nothing may be given up that is known, or before its time."""
        query = "SELECT sid, kind FROM portal_request WHERE state = 'expired'"
        for sid, kind in self.world.requests.rows(query):
            if sid in self._judged or kind != "launch":
                continue
            self._judged.add(sid)
            if self.world.ledger.away:
                raise Violation(f"I1: {sid} was given up by the portal, and nobody could know whether it runs")
            if self.world.ledger.rows("SELECT 1 FROM session WHERE sid = ?", sid):
                raise Violation(f"I1: {sid} was told to have come too late, and is known")
            if self.world.time.now - self.asked_at[sid] < self.requests[sid].wait_s:
                raise Violation(f"I12: {sid} was given up by the portal before its time")

    # --- what is kept ready ---------------------------------------------------------------------------------

    def forked(self, node: Node, start: VmStart, kept: Kept) -> None:
        """A guest goes on from a saved state: that of this very machine, by this very qemu."""
        self.uses["forks"] += 1
        if kept.seal != node.seal(kept.blueprint):
            raise Violation(f"I6: {start.sid} is forked from a state of another qemu")
        if (kept.blueprint.machine, kept.blueprint.sha256) != (start.machine, start.sha256):
            raise Violation(f"I6: {start.sid} is forked from another machine than was asked for")

    def born(self, node: Node, vm: Vm) -> None:
        """A guest begins: with nothing of what others did, and an address that nobody else has."""
        if vm.memory:
            raise Violation(f"I6: {vm.sid} begins with what was left by {min(vm.memory)}")
        others = [other for each in self.world.nodes.values() for other in each.vms.values() if other is not vm]
        if any(other.mac == vm.mac for other in others if other.sid != vm.sid):
            raise Violation(f"I6: {vm.sid} on {node.host} has the network address of another guest")

    # --- the wires ------------------------------------------------------------------------------------------

    def published(self, process: Process, message: Outgoing) -> None:
        self.log.update(f"{process.name}>{message.routing_key} {message.type}".encode() + message.body)
        if message.correlation_id:
            self.sent.append((process.login, message))
        if message.exchange == topology.COMMANDS and message.routing_key.startswith("host."):
            self.decisions.append((message.routing_key, message.type, message.body))
            if self.world.ledger.open:
                raise Violation(f"I2: {message.routing_key} is told {message.type}, which is not stored yet")
        elif isinstance(process, Node) and message.type == "vm.report.v1":
            report = decode(message.type, message.body)
            assert isinstance(report, VmReport)
            sid = report.guest.sid
            if sid in process.vms:
                process.vms[sid].numbers.add(report.guest.generation)
            if report.guest.phase is Phase.ENDED and (sid in process.vms or sid in process.files):
                raise Violation(f"I4: {process.host} says that {sid} has ended, and still has its machine or files")

    def delivered(self, process: Process, delivery: Delivery) -> None:
        self.log.update(f"{process.name}<{delivery.queue} {delivery.message_id}".encode())
        if process in self.world.proxies and delivery.type == "session.changed.v1":
            changed = decode(delivery.type, delivery.body)
            if isinstance(changed, SessionChanged) and changed.state in _OVER and delivery.sender == "scheduler":
                next(proxy for proxy in self.world.proxies if proxy is process).told_over.add(changed.sid)

    def settled(self, process: Process, delivery: Delivery, how: Settlement) -> None:
        """What is acknowledged must be stored where it belongs: nobody else has it any more."""
        if how is not Settlement.ACK:
            return
        if delivery.queue == topology.SCHEDULER_COMMANDS:
            if self.world.ledger.open:
                raise Violation(f"I1: {delivery.type} is acknowledged before the commit")
            message = decode(delivery.type, delivery.body)
            if isinstance(message, LaunchRequested | StopRequested) and not self.world.ledger.rows(
                "SELECT 1 FROM session WHERE sid = ?", message.sid
            ):
                raise Violation(f"I1: {delivery.type} of {message.sid} is acknowledged and not stored")
        elif isinstance(process, Node) and delivery.queue == topology.host_queue(process.host):
            command = decode(delivery.type, delivery.body)
            number = command.generation if isinstance(command, VmStart | VmStop | HostFence) else 0
            disk = process.disk
            if isinstance(command, VmStart | HostFence) and process.agent.fenced and not disk.refused:
                known = isinstance(command, VmStart)
            elif isinstance(command, VmStop):
                known = command.sid in disk.entries or number <= disk.number
            else:
                known = number <= disk.number
            if not (known or disk.refused):
                raise Violation(f"I1: {process.host} acknowledged {delivery.type} {number} and has not stored it")

    # --- machines -------------------------------------------------------------------------------------------

    def launch_ordered(self, node: Node, entry: Entry) -> None:
        stored = node.disk.entries.get(entry.sid)
        if stored is None or stored.generation != entry.generation or not stored.live:
            raise Violation(f"I2: {node.host} launches {entry.sid}, which is not in its journal")
        others = [other.generation for sid, other in node.disk.entries.items() if sid != entry.sid]
        if node.disk.generation is None or entry.generation <= max([node.disk.generation, *others]):
            raise Violation(
                f"I2: {node.host} launches {entry.sid} under {entry.generation}, which is not above all others"
            )
        assert entry.start
        offered = {address for gpu in node.seen if gpu.offered for address in gpu.functions}
        held = {address for vm in node.vms.values() for address in vm.gpus}
        if not set(entry.start.gpu_addresses) <= offered - held:
            raise Violation(f"I3: {node.host} gives {entry.sid} a GPU that is not free to give")

    def spawned(self, node: Node, sid: str, gpus: tuple[str, ...]) -> None:
        """The wrapper around qemu: it sees every start, whoever ordered it."""
        self.note(f"spawn {node.host} {sid}")
        self.spawns.append((node.host, sid))
        if sid not in self.requests:
            raise Violation(f"I2: {sid} starts on {node.host}, and nobody asked for it")
        for other in self.world.nodes.values():
            if sid in other.vms:
                raise Violation(f"I2: {sid} starts on {node.host} and runs on {other.host}")
        if sid in self.readied and not self._forgotten(sid):
            raise Violation(f"I2: {sid} starts again on {node.host} after it has run")
        for vm in node.vms.values():
            if set(vm.gpus) & set(gpus):
                raise Violation(f"I3: a GPU of {node.host} is given to {sid} and {vm.sid}")

    def _forgotten(self, sid: str) -> bool:
        """An agent remembers for a day what has run. What nobody has heard of in that time is beyond knowledge."""
        known = self.world.ledger.rows("SELECT 1 FROM session_event WHERE sid = ? AND state = 'running'", sid)
        return not known and self.world.time.now - self.gone_at.get(sid, self.world.time.now) > REMEMBER_RUN_S

    def ready(self, node: Node, sid: str) -> None:
        """It runs, and its journal says so: from now on it may never start again."""
        entry = node.disk.entries.get(sid)
        if entry and entry.ran:
            self.readied[sid] = node.host

    def shutdown_ordered(self, node: Node, vm: Vm, entry: Entry) -> None:
        """Somebody ends a machine. One that runs may only be ended by its people, or by its own limits."""
        self.note(f"shutdown {node.host} {vm.sid} {entry.reason}")
        if not vm.ready or vm.going_down or entry.start is None or vm.known_at is None:
            return
        if entry.reason is Reason.EXPIRED and self.world.time.now - vm.known_at >= entry.start.lifetime_s - 0.001:
            return
        if entry.reason in (Reason.DISCONNECTED, Reason.NEVER_CONNECTED):
            if entry.start.persistent or any(proxy.looking_at(vm) for proxy in self.world.proxies):
                raise Violation(f"I5: {node.host} ends {vm.sid} as {entry.reason}, and somebody looks at it")
            return
        if entry.reason in _BY_TIME or not (vm.sid in self.stop_asked or node.host in self.given_up):
            raise Violation(f"I5: {node.host} ends {vm.sid} ({entry.reason}), which nobody wanted")

    def cleaned(self, node: Node, vm: Vm) -> None:
        """Somebody removes a machine with everything that it has."""
        if not vm.going_down and vm.sid in node.disk.entries:
            raise Violation(f"I5: {node.host} killed {vm.sid}, which was not to be stopped")

    def recovered(self, node: Node) -> None:
        """An agent has read its journal: what it was ending must go on ending."""
        for sid, entry in node.disk.entries.items():
            vm = node.vms.get(sid)
            if vm and entry.phase is Phase.STOPPING and not any(job.sid == sid for job in node.todo):
                raise Violation(f"I4: {node.host} has forgotten that {sid} was to be stopped")

    def broke(self, host: str) -> None:
        """A host loses what it runs, or is given up."""
        self.upset[host] = self.world.time.now

    def journal_lost(self, node: Node) -> None:
        """What ran there and was never reported is beyond anybody's knowledge, and its machine is gone."""
        states = ("running", "stopping", "ended")
        known = {sid for sid, state in self.world.ledger.rows("SELECT sid, state FROM session") if state in states}
        for sid, host in list(self.readied.items()):
            if host == node.host and sid not in known:
                del self.readied[sid]

    # --- consoles -------------------------------------------------------------------------------------------

    def let_in(self, door: Door, sid: str) -> None:
        """A proxy takes a ticket and dials."""
        if sid in door.told_over:
            raise Violation(f"I7: {door.name} lets a viewer in to {sid}, whose end it was told")

    def opened(self, proxy: Process, console: Console) -> None:
        """A viewer sees a desktop."""
        vm, route = console.vm, console.route
        ticket = Tickets(["k" * 40], lambda: self.signed_at[console.viewer.ticket]).verify(console.viewer.ticket)
        self.note(f"open {proxy.name} {ticket.sid}")
        self.uses[ticket.nonce] += 1
        if self.uses[ticket.nonce] > 1:
            raise Violation(f"I7: a ticket of {ticket.sid} works twice")
        if (vm.sid, route.host) != (ticket.sid, ticket.host) or vm.sid not in self.world.nodes[route.host].vms:
            raise Violation(f"I6: {ticket.user} asked for {ticket.sid} and sees {vm.sid} on {route.host}")
        if self.requests[vm.sid].user != ticket.user:
            raise Violation(f"I6: {ticket.user} sees {vm.sid}, which is somebody else's")
        node = self.world.nodes[route.host]
        held = {entry.generation for entry in (*node.agent.entries, *node.disk.entries.values()) if entry.sid == vm.sid}
        # No portal signs a number that a desktop has not run under. This one was made up, and a proxy that has not
        # heard the host's inventory since can't tell; it is the same person's very desktop all the same.
        known = proxy.routes._hosts.get(route.host)
        told = known is not None and known.current and known.last_generation >= ticket.generation
        if ticket.generation not in vm.numbers | held and told:
            raise Violation(f"I7: a ticket of number {ticket.generation} opens {vm.sid} of {vm.numbers | held}")
        age = console.viewer.admitted_at - self.signed_at[console.viewer.ticket]
        if age > LIFETIME_S + 1:
            raise Violation(f"I7: a ticket works after {age:.0f} s")

    # --- what is stored -------------------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold at every instant."""
        for proxy in self.world.proxies:
            for console in proxy.consoles:
                if console.vm.sid in proxy.told_over and not proxy.paused:
                    raise Violation(f"I7: {proxy.name} shows {console.vm.sid}, whose end it was told")
        if self.world.ledger.commits == self._seen_commits:
            return
        self._seen_commits = self.world.ledger.commits
        shut = {host for (host,) in self.world.ledger.rows("SELECT name FROM host WHERE draining OR dead")}
        placed: dict[str, str] = {}
        used: dict[str, list[int]] = {}
        gpus: dict[str, list[str]] = {}
        query = (
            "SELECT sid, state, host, cpus, memory_mib, gpu_addresses, attempt, outcome, reason, wait_s FROM session"
        )
        for sid, state, host, cpus, memory, addresses, attempt, outcome, reason, wait_s in self.world.ledger.rows(
            query
        ):
            if state == "ended":
                self._judge(sid, outcome, reason, host, wait_s)
                continue
            if attempt >= self.world.settings.max_attempts:
                raise Violation(f"I1: {sid} is tried again after {attempt} failures")
            if state == "running":
                self.readied.setdefault(sid, host)
            if state != "queued":
                placed[sid] = host
                if host in self._shut & shut and self._placed.get(sid) != host:
                    raise Violation(f"I10: {sid} was placed on {host}, which is drained or dead")
                usage = used.setdefault(host, [0, 0])
                usage[0] += cpus
                usage[1] += memory + self.world.settings.policy.guest_overhead_mib
                gpus.setdefault(host, []).extend(json.loads(addresses))
        self._shut, self._placed = shut, placed
        for host, (cpus, memory) in used.items():
            if cpus > CPUS * self.world.settings.policy.cpu_overcommit or memory > MEMORY_MIB:
                raise Violation(f"I10: {host} has promised {cpus} CPUs and {memory} MiB")
            if len(gpus[host]) != len(set(gpus[host])):
                raise Violation(f"I3: the ledger gives a GPU of {host} twice")

    def _judge(self, sid: str, outcome: str, reason: str | None, host: str, wait_s: int) -> None:
        """Whether a session ended the way it is said to have ended."""
        if sid in self._judged:
            return
        self._judged.add(sid)
        request = self.requests.get(sid)
        now, asked_at = self.world.time.now, self.asked_at.get(sid, 0.0)
        true = {
            "lost": host in self.given_up
            if reason == "host_dead"
            else self.upset.get(host, -1.0) >= asked_at or now - self.gone_at.get(sid, now) > REMEMBER_RUN_S,
            "guest_off": sid in self.ended_itself,
            "stopped": sid in self.stop_asked,
            "cancelled": sid in self.stop_asked,
            # Waits are counted once a second.
            "no_capacity": now - asked_at >= wait_s - 2.0,
            "rejected": request is not None
            and (request.machine == "gone" or request.resources.cpus > CPUS * 2 or request.resources.gpus > 0),
        }
        if not true.get(outcome, True):
            raise Violation(f"I1: {sid} is said to be {outcome} ({reason}), which is not true")
