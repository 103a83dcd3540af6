"""Typical mistakes, each as a small patch of the product's text. A harness that misses one of them has a hole.

A patch replaces text in one function, and what it does not find is an error: when the product's words change, the
mistake must be written anew.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Patch:
    """`where` is module:function or module:Class.method below deskfleet; each `old` becomes the `new` behind it."""

    where: str
    changes: tuple[tuple[str, str], ...]

    def function(self) -> FunctionType:
        """The function that is patched."""
        module, _, name = self.where.partition(":")
        found: Any = import_module(f"deskfleet.{module}")
        for part in name.split("."):
            found = getattr(found, part)
        found = inspect.unwrap(found)
        assert isinstance(found, FunctionType)
        return found

    def wrong(self) -> Any:
        """The code of the patched function."""
        function = self.function()
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in self.changes:
            assert old in source, f"{self.where} holds no {old!r} any more: write this mistake anew"
            source = source.replace(old, new, 1)
        scope: dict[str, Any] = {}
        flags = __future__.annotations.compiler_flag
        exec(compile(source, self.where, "exec", flags), function.__globals__, scope)
        changed = inspect.unwrap(scope[function.__name__])
        return changed.__code__


def patch(where: str, *changes: tuple[str, str]) -> Patch:
    """A patch of one function."""
    return Patch(where, changes)


@contextmanager
def made(patches: tuple[Patch, ...]) -> Iterator[None]:
    """While the block runs, the product makes this mistake."""
    undo: list[Callable[[], None]] = []
    try:
        for entry in patches:
            function, code = entry.function(), entry.wrong()
            undo.append(lambda function=function, right=function.__code__: setattr(function, "__code__", right))
            function.__code__ = code
        yield
    finally:
        for step in undo:
            step()


_SETTLE = "    for delivery, _ in batch:\n        delivery.ack()\n"
_TRY = "    if self._attempt([self._job(message) for _, message in batch]):\n"
_SOON = "            if self.decisions.queue.soon:\n"
_SEND = "            for message in unit.outbox:\n                self._publish(message)\n"
_AWAY = '        log.warning("the ledger does not answer: %s", type(error.orig).__name__)\n'
_ANY_SESSION = "update(tables.session).where(_SESSION.sid == before.sid).values(session_values(after))"
_ANY_HOST = "update(tables.host).where(_HOST.name == host).values(generation=generation + 1)"
_ONCE = "if connection.execute(once).first() is None:"
_READ = "content, signed_at = self._serializer.loads(text, return_timestamp=True)"
_AGE = "if not -SKEW_S <= int(self._wall()) - signed_at.timestamp() <= LIFETIME_S:"
_LISTED = "listed not in (None, generation)"

MISTAKES: dict[str, tuple[Patch, ...]] = {
    # the scheduler
    "absence is concluded without the command number": (
        patch("scheduler.reconcile:absent", ("session.generation > report.last_generation", "False")),
    ),
    "a session that has run is tried again": (
        patch("scheduler.reconcile:_ended", ("not guest.ran and ", ""), (" and outcome is Outcome.FAILED", "")),
    ),
    "what another host says of a session counts": (
        patch("scheduler.reconcile:on_guest", (" or session.host != host", "")),
    ),
    "strays are left running": (
        patch("scheduler.reconcile:_stray", ("if guest.phase in (Phase.ENDED, Phase.STOPPING)", "if True")),
    ),
    "failures are not counted": (
        patch("scheduler.reconcile:failed_start", ("if counted and session.attempt", "if False and session.attempt")),
    ),
    "a command without an echo is not sent again": (
        patch(
            "scheduler.decisions:Decisions._needs_command",
            ("if session.state not in (State.ASSIGNED, State.STOPPING)", "if True"),
        ),
    ),
    "a stop without an effect is not sent again": (
        patch(
            "scheduler.decisions:Decisions._needs_command", ("(State.ASSIGNED, State.STOPPING)", "(State.ASSIGNED,)")
        ),
    ),
    "a wait ends by the date": (
        patch(
            "scheduler.core:Scheduler.sweep",
            ("self.decisions.overdue(self._clock.monotonic())", "self.decisions.overdue(self._clock.wall())"),
        ),
    ),
    "messages are acknowledged before the commit": (patch("scheduler.core:Scheduler.flush", (_TRY, _SETTLE + _TRY)),),
    "hosts are told before the commit": (patch("scheduler.core:Scheduler._attempt", (_SOON, _SEND + _SOON)),),
    "the cache is kept after a commit that failed": (
        patch("scheduler.core:Scheduler._attempt", (_AWAY + "        self.healthy = False\n", _AWAY)),
    ),
    "any login may say anything": (
        patch("scheduler.core:_vouched", ('return not sender.startswith("agent-")', "return True")),
    ),
    "a host may speak for another": (
        patch("scheduler.core:_vouched", ('return sender == f"agent-{message.host}"', "return True")),
    ),
    "nobody succeeds a dead leader": (
        patch("scheduler.leadership:Leadership._stand_by", ("if not free and ", "if standing.owner or ")),
    ),
    "usage is not given back": (
        patch("scheduler.fleet:Fleet.put", ("if before and before.on_host:", "if before and session.on_host:")),
    ),
    "CPUs are promised without an end": (patch("scheduler.filters:_cpus", ("<= host.cpus_offered", "<= 10**9")),),
    "memory is promised without an end": (patch("scheduler.filters:_memory", ("> host.memory_offered", "> 10**9")),),
    "a drained host gets work": (patch("scheduler.filters:_open", ("if host.draining", "if False")),),
    # the ledger's writer
    "whoever comes last writes": (
        patch("ledger.lease:Lease.prove", ("rowcount != 1", "rowcount < 0")),
        patch("ledger.writer:Transaction.save", ("execute(_SAVE, row)", f"execute({_ANY_SESSION})")),
        patch("ledger.writer:Transaction.claim", ("execute(_CLAIM, row)", f"execute({_ANY_HOST})")),
    ),
    # the agent
    "a start is obeyed whatever its number": (
        patch("agent.core:Agent.start", ("if start.generation <= self.last_generation:", "if False:")),
    ),
    "an agent without a journal obeys at once": (
        patch("agent.core:Agent.recover", ("self.fenced = True", "self.fenced = False")),
    ),
    "the number of a fence is forgotten": (
        patch(
            "agent.core:Agent.fence",
            ("self._journal.set_generation(generation)", "self._journal.set_generation(0)"),
            ("self.last_generation = generation", "pass"),
        ),
    ),
    "a command is acknowledged before it is in the journal": (
        patch("agent.link:Link.on_delivery", ("    match message:", "    delivery.ack()\n    match message:")),
    ),
    "a guest is launched before it is in the journal": (
        patch(
            "agent.core:Agent.start",
            (
                "    try:\n        self._put(entry)",
                "    self._hypervisor.launch(entry)\n    try:\n        self._put(entry)",
            ),
        ),
    ),
    "the agent takes any GPU": (patch("agent.core:Agent._objection", ("if not start.gpu_addresses:", "if True:")),),
    "a stop that overtook its start leaves nothing": (
        patch("agent.core:Agent.stop", ("self._save(self._tombstone(stop, stop.outcome, stop.reason))", "return")),
    ),
    "the agent starts again what has run": (
        patch("agent.core:Agent.start", ("if held and (held.live or held.ran):", "if held and held.live:")),
    ),
    "a restarted agent forgets what it was stopping": (
        patch("agent.core:Agent.recover", ("if entry.phase is Phase.STOPPING:", "if False:")),
    ),
    "a restarted agent ends its guests": (
        patch("agent.core:Agent.recover", ("elif self._hypervisor.adopt(entry):", "elif False:")),
    ),
    "a lifetime has no end": (patch("agent.limits:due", ("if left_s <= 0:", "if False:")),),
    "the grace runs while somebody looks": (patch("agent.limits:count_viewers", ("None if count else now", "now")),),
    "an end is told before it is cleaned up": (
        patch(
            "agent.core:Agent._end",
            (
                "    self._hypervisor.clean(entry.sid)",
                "    self._report(self._seen(replace(entry, phase=Phase.ENDED, outcome=outcome, reason=reason)))\n"
                "    self._hypervisor.clean(entry.sid)",
            ),
        ),
    ),
    "an end is forgotten at once": (
        patch("agent.core:Agent.tick", ("now - e.ended_at > (REMEMBER_RUN_S if e.ran else REMEMBER_S)", "True")),
    ),
    "a template of another qemu is lent": (
        patch("agent.templates:Templates.lend", ("slot.template.seal != self.seal(slot.blueprint)", "False")),
    ),
    "a guest writes into the template that it is a fork of": (
        patch("agent.argv:_frozen", ('"on" if frozen.shared else "off"', '"on"')),
    ),
    "forks have the address that their template would have": (
        patch("agent.argv:card", ("mac_of(start.sid)", "mac_of(start.template or start.sid)")),
    ),
    # the portal
    "sent counts as known": (patch("portal.outbox:_is_open", ("for stage in OPEN", "for stage in (Stage.STORED,)")),),
    "a repeat has an id of its own": (
        patch(
            "portal.outbox:Outbox.sweep",
            ('row["body"].encode()', 'row["body"].replace(row["sid"], row["sid"][::-1]).encode()'),
        ),
    ),
    "a launch is sent and not stored": (
        patch(
            "portal.outbox:Outbox._store_and_send",
            (_ONCE, f"if kind is Kind.STOP and {_ONCE[3:]}"),
        ),
    ),
    "a stop is sent and not stored": (
        patch("portal.outbox:Outbox._store_and_send", (_ONCE, f"if kind is Kind.LAUNCH and {_ONCE[3:]}")),
    ),
    "a ledger that can't be read counts as empty": (
        patch("portal.outbox:Outbox._known", ("        return None\n", "        return set()\n")),
    ),
    # the proxies and the console server
    "a ticket is good for any number": (
        patch("proxy.routes:_check_listed", (_LISTED, "False")),
        patch("proxy.routes:RouteTable.find", ("(word.host, word.generation) != (host, generation)", "False")),
    ),
    "a ticket is good for ever": (patch("schemas.tickets:Tickets.verify", (_AGE, "if False:")),),
    "anybody's signature will do": (
        patch(
            "schemas.tickets:Tickets.verify",
            (_READ, "_, content = self._serializer.loads_unsafe(text)"),
            (_AGE, "if False:"),
        ),
    ),
    "a ticket works twice": (patch("agent.console:SessionToken.lookup", ("os.O_CREAT | os.O_EXCL", "os.O_CREAT")),),
    "consoles outlive their session": (patch("proxy.service:News._take", ("self._server.cut(message.sid)", "pass")),),
    "nobody looks again after dialling": (
        patch(
            "proxy.server:Server._open",
            ("if self._routes.find(ticket.sid, ticket.generation, ticket.host, self._now()) != route:", "if False:"),
        ),
    ),
    "an end can be taken back": (
        patch("proxy.routes:RouteTable.announce", (" or (old is not None and old.over)", "")),
    ),
}
