"""Everything that can happen in a walk. A step is data, a name and its arguments, so that a walk can be written down
and repeated; a step that has become pointless because others were left out does nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sim.control import KEYS
from sim.host import Node
from sim.process import Clock
from sim.world import World

from deskfleet.portal.launching import Wish
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.memory_queues import Pending
from deskfleet.schemas import topology
from deskfleet.schemas.host import GuestReport, Phase
from deskfleet.schemas.messages import StopRequested, VmReport
from deskfleet.schemas.session import Outcome
from deskfleet.schemas.tickets import Mode, Ticket, Tickets
from deskfleet.schemas.wire import encode

Step = tuple[Any, ...]


class Steps:
    """The things that happen, by the name of the step. Each returns a word for the log."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: Tickets that people hold, and messages that are under way for a long time.
        self.tickets: list[str] = []
        self.late: list[Pending] = []

    def do(self, step: Step) -> None:
        """One thing happens."""
        name, *arguments = step
        action = getattr(self, name)
        word = self.world.guard(lambda: action(*arguments))
        line = f"{self.world.time.now:.1f} {' '.join(map(str, step))} {word}"
        self.world.lines.append(line)
        self.world.evidence.note(line)
        self.world.evidence.check()

    # --- what goes on anyway --------------------------------------------------------------------------------

    def deliver(self, queue: str, count: int) -> None:
        """The broker hands out messages of a queue."""
        if queue in self.world.broker.queues():
            for _ in range(count):
                if not self.world.broker.deliver_one(queue):
                    return

    def work(self, host: str, index: int, wrong: bool) -> None:
        """A hypervisor does one thing; with `wrong` it fails, or hangs."""
        node = self.world.nodes[host]
        if node.todo and node.alive and not node.paused:
            node.todo.pop(index % len(node.todo)).work(wrong)

    def flush(self, name: str) -> None:
        """A process does what it put off."""
        self.world.processes[name].flush()

    def wait(self, seconds: float) -> str:
        return self.world.pass_time(seconds)

    def launch(
        self, sid: str, user: str, machine: str, cpus: int, memory: int, gpus: int, keep: bool, life: int
    ) -> str:
        wish = Wish(machine, cpus, memory, 1, gpus, persistent=keep, lifetime_s=life)
        return self.world.portal.launch(sid, user, wish)

    def again(self, sid: str) -> str:
        """A double click, or a reload of the form's answer."""
        old = self.world.evidence.requests.get(sid)
        if old is None:
            return ""
        size = old.resources
        return self.launch(
            sid, old.user, old.machine, size.cpus, size.memory_mib, size.gpus, old.persistent, old.lifetime_s
        )

    def stop(self, sid: str, admin: bool) -> str:
        old = self.world.evidence.requests.get(sid)
        return self.world.portal.stop(sid, "root" if admin else old.user, admin) if old else ""

    def power_off(self, sid: str) -> str:
        """A person shuts the guest down from inside."""
        for node in self.world.nodes.values():
            vm = node.vms.get(sid)
            if vm and vm.ready and not vm.going_down:
                self.world.evidence.ended_itself.add(sid)
                node.dies(sid)
                return node.host
        return ""

    # --- viewers --------------------------------------------------------------------------------------------

    def ticket(self, sid: str, nonce: str) -> str:
        """A desktop's page fetches a ticket."""
        request = self.world.evidence.requests.get(sid)
        signed = self.world.portal.ticket(sid, request.user, nonce) if request else ""
        return self._keep(signed)

    def _keep(self, signed: str) -> str:
        if signed:
            self.tickets.append(signed)
            self.world.evidence.signed_at[signed] = self.world.time.wall()
        return "signed" if signed else ""

    def knock(self, proxy: str, index: int) -> str:
        """A viewer comes to a proxy with a ticket, a new one or an old one."""
        door = self.world.processes[proxy]
        return door.knock(self.tickets[index]) if index < len(self.tickets) else ""

    def go_on(self, proxy: str, index: int) -> str:
        """The network moves one step for a viewer."""
        door = next(door for door in self.world.proxies if door.name == proxy)
        if not door.opening or not door.alive or door.paused:
            return ""
        return door.go_on(door.opening[index % len(door.opening)])

    def leave(self, proxy: str, index: int) -> None:
        next(door for door in self.world.proxies if door.name == proxy).leave(index)

    def odd_ticket(self, sid: str, nonce: str, what: str) -> str:
        """Somebody holds a ticket that must not work: of an earlier number, for another host, or with a forged key."""
        request = self.world.evidence.requests.get(sid)
        rows = self.world.ledger.rows("SELECT host, generation FROM session WHERE sid = ? AND state = 'running'", sid)
        if not (rows and request):
            return ""
        host, number = rows[0]
        if what == "number":
            number -= 1
        elif what == "host":
            host = min(name for name in self.world.nodes if name != host)
        keys = ["x" * 40] if what == "key" else KEYS
        ticket = Ticket(sid, request.user, "login-" + "0" * 16, host, number, Mode.FULL, nonce)
        return self._keep(Tickets(keys, self.world.portal.clock.wall).sign(ticket))

    # --- messages -------------------------------------------------------------------------------------------

    def _pending(self, queue: str) -> int:
        return len(self.world.broker.pending(queue)) if queue in self.world.broker.queues() else 0

    def drop(self, queue: str, index: int) -> None:
        if count := self._pending(queue):
            self.world.broker.drop(queue, index % count)

    def duplicate(self, queue: str, index: int, copies: int) -> None:
        if count := self._pending(queue):
            for _ in range(copies):
                self.world.broker.duplicate(queue, index % count)

    def reorder(self, queue: str, source: int, target: int) -> None:
        if count := self._pending(queue):
            self.world.broker.move(queue, source % count, target % count)

    def delay(self, queue: str, index: int) -> None:
        """A message is under way for a long time."""
        if count := self._pending(queue):
            self.late.append(self.world.broker.drop(queue, index % count))

    def arrive(self, index: int) -> None:
        """A late message comes after all."""
        if not self.late:
            return
        old = self.late.pop(index % len(self.late))
        if old.expires is None or old.expires > self.world.time.now:
            again = Outgoing(old.exchange, old.routing_key, old.type, old.body, old.correlation_id, old.durable, False)
            self.world.broker.accept(again, old.sender)

    def echo(self, kind: str, key: str, sid: str, index: int) -> None:
        """A message comes once more, long after."""
        copies = [
            m for _, m in self.world.evidence.sent if (m.type, m.routing_key, m.correlation_id) == (kind, key, sid)
        ]
        if copies:
            login = next(login for login, m in self.world.evidence.sent if m is copies[index % len(copies)])
            self.world.broker.accept(replace(copies[index % len(copies)], mandatory=False), login)

    # --- processes and connections --------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        self.world.processes[name].kill()

    def kill_at(self, name: str, points: int) -> None:
        """It will die at a point between two writes, messages or acknowledgements."""
        if self.world.processes[name].alive:
            self.world.processes[name].fuse = points

    def start(self, name: str) -> str:
        process = self.world.processes[name]
        process.start()
        return "" if process.alive else "does not start"

    def pause(self, name: str) -> None:
        self.world.processes[name].pause(self.world.time.now)

    def resume(self, name: str) -> None:
        self.world.processes[name].resume()

    def cut(self, name: str) -> None:
        self.world.processes[name].disconnect()

    def join(self, name: str) -> None:
        if self.world.broker.up:
            self.world.processes[name].reconnect()

    def kill_broker(self) -> None:
        self.world.broker.crash()

    def start_broker(self) -> None:
        self.world.broker.up = True
        for process in self.world.processes.values():
            process.reconnect()

    def block(self, blocked: bool) -> None:
        """An alarm: the broker takes no messages."""
        self.world.broker.blocked = blocked

    # --- administrators -------------------------------------------------------------------------------------

    def declare_dead(self, host: str) -> str:
        """An administrator gives up a host that seems to be dead."""
        self.world.evidence.given_up.add(host)
        return self.world.portal.change_host(lambda fleet: fleet.declare_dead(host, "root"))

    def drain(self, host: str, draining: bool) -> str:
        return self.world.portal.change_host(lambda fleet: fleet.drain(host, draining, "root"))

    # --- stores, disks, devices, clocks ---------------------------------------------------------------------

    def database(self, which: str, away: bool) -> None:
        (self.world.ledger if which == "ledger" else self.world.requests).away = away

    def fail_commit(self, which: str, when: str, least: int) -> None:
        database = self.world.ledger if which == "ledger" else self.world.requests
        database.fail, database.least = when, least

    def disk(self, host: str, trouble: str) -> None:
        self.world.nodes[host].disk.trouble = trouble

    def reboot(self, host: str, power_cut: bool) -> None:
        node = self._breaks(host)
        node.reboot(power_cut)

    def reinstall(self, host: str) -> None:
        """A host is installed anew: no guests, no journal."""
        node = self._breaks(host)
        self.world.evidence.journal_lost(node)
        node.reboot(power_cut=True)
        node.disk.wipe()
        node.files.clear()

    def _breaks(self, host: str) -> Node:
        self.world.evidence.broke(host)
        return self.world.nodes[host]

    def card(self, host: str, index: int, there: bool, bound: bool) -> None:
        """A GPU vanishes, comes back unbound, or is well again."""
        cards = self.world.nodes[host].cards
        if cards:
            cards[index % len(cards)].there, cards[index % len(cards)].bound = there, bound

    def reboot_moved(self, host: str, by: int) -> None:
        """After a reboot the GPUs have other addresses."""
        self.reboot(host, power_cut=False)
        for card in self.world.nodes[host].cards:
            card.slot = card.slot % 4 + by

    def upgrade_qemu(self, host: str) -> None:
        """Another qemu is installed; what runs goes on with the old one."""
        self.world.nodes[host].qemu += 1

    def guest_dies(self, sid: str) -> str:
        """qemu fails while the guest runs."""
        return self.power_off(sid)

    def clock(self, name: str, shift: float, unsteady: bool) -> None:
        """A machine's date is wrong from now on."""
        self._set(self.world.processes[name].clock, shift, unsteady)

    portal_clock = proxy_clock = clock

    @staticmethod
    def _set(clock: Clock, shift: float, unsteady: bool) -> None:
        clock.shift, clock.unsteady = shift, unsteady

    # --- a host that lies -----------------------------------------------------------------------------------

    def forge(self, host: str, sid: str, what: str) -> None:
        """A host's login says what only others may say."""
        rows = self.world.ledger.rows("SELECT host, generation FROM session WHERE sid = ?", sid)
        node = self.world.nodes[host]
        if not rows or not node.connected or (what == "gone" and rows[0][0] in ("", host)):
            return
        victim, number = rows[0]
        if what == "stop":
            kind, body = encode(StopRequested(sid, "root", True))
            message = Outgoing(topology.COMMANDS, "scheduler", kind, body, correlation_id=sid)
        else:
            guest = GuestReport(sid, number, Phase.ENDED, ran=True, outcome=Outcome.GUEST_OFF)
            kind, body = encode(VmReport(victim, guest))
            message = Outgoing(topology.EVENTS, topology.report_key(victim), kind, body, correlation_id=sid)
        assert node._bus
        node._bus.publish(message)
