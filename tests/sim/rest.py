"""What must be so once nothing moves any more: nothing lost, nothing left over, nothing that waits without need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sim.host import CPUS, MEMORY_MIB

if TYPE_CHECKING:
    from sim.world import World


def unrest(world: World) -> Iterator[str]:
    """What is not at rest, as sentences that begin with the number of the invariant."""
    query = "SELECT sid, state, host, cpus, memory_mib, gpus, gpu_addresses FROM session"
    sessions = {row[0]: row[1:] for row in world.ledger.rows(query)}
    yield from _requests(world, {sid: row[0] for sid, row in sessions.items()})
    running = {(sid, host) for sid, (state, host, *_) in sessions.items() if state == "running"}
    machines = {(sid, node.host) for node in world.nodes.values() for sid in node.vms}
    files = {(sid, node.host) for node in world.nodes.values() for sid in node.files}
    if machines != running:
        missing, odd = sorted(running - machines), sorted(machines - running)
        yield f"I5: the ledger has {missing}, which do not run, and hosts run {odd}"
    if files != running:
        yield f"I4: files are left of {sorted(files - running)}"
    holds = set(world.ledger.rows("SELECT host, address FROM gpu_hold"))
    expected = {(row[1], a) for row in sessions.values() if row[0] == "running" for a in json.loads(row[5])}
    if holds != expected:
        yield f"I4: GPU holds {sorted(holds)}, sessions hold {sorted(expected)}"
    for proxy in world.proxies:
        for console in proxy.consoles:
            if (console.vm.sid, console.route.host) not in running:
                yield f"I7: a console of {console.vm.sid} is open, which does not run"
    for node in world.nodes.values():
        for vm in node.vms.values():
            start = node.disk.entries[vm.sid].start
            if start and vm.known_at is not None and world.time.now - vm.known_at > start.lifetime_s + 15:
                yield f"I5: {vm.sid} runs longer than it may"
    yield from _stuck(world, sessions.values())


def _requests(world: World, states: dict[str, str]) -> Iterator[str]:
    evidence = world.evidence
    closed = {
        row[0]
        for row in world.requests.rows(
            "SELECT sid FROM portal_request WHERE kind = 'launch' AND state IN ('cancelled', 'expired')"
        )
    }
    for sid in evidence.accepted:
        if sid not in states and sid not in closed:
            yield f"I1: {sid} was accepted and is unknown"
    for sid in evidence.stop_accepted:
        if states.get(sid, "ended") != "ended":
            yield f"I1: {sid} was to be stopped and is {states[sid]}"
    for sid, state in states.items():
        if state in ("assigned", "starting", "stopping"):
            yield f"I1: {sid} does not come to rest, it is {state}"


def _stuck(world: World, sessions: object) -> Iterator[str]:
    """Who waits although there is room (I11)."""
    overhead, cpus = world.settings.policy.guest_overhead_mib, CPUS * world.settings.policy.cpu_overcommit
    waiting = []
    free = {name: [cpus, float(MEMORY_MIB), float(len(node.cards))] for name, node in world.nodes.items()}
    for state, host, want_cpus, memory, gpus, _ in sessions:
        want = [want_cpus, memory + overhead, gpus]
        if state == "queued":
            waiting.append(want)
        elif state == "running":
            free[host] = [have - used for have, used in zip(free[host], want, strict=True)]
    fits = [
        any(all(have >= wanted for have, wanted in zip(room, want, strict=True)) for room in free.values())
        for want in waiting
    ]
    # A large request that fits nowhere may have room kept for it.
    if waiting and all(fits):
        yield f"I11: {waiting} wait, and there is room: {free}"
