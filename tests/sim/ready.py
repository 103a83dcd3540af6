"""What a host keeps ready: the real rules of agent/templates.py, and the real command line and introduction of a fork,
over memory that is only pretended. What a person leaves in memory is their session's id."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskfleet.agent import argv, seal
from deskfleet.agent.fork import introduce
from deskfleet.agent.template_store import TemplateError
from deskfleet.agent.templates import Room, Templates
from deskfleet.schemas.messages import HostTemplates, TemplateOrdered, VmStart
from deskfleet.schemas.session import Birth
from deskfleet.schemas.template import Blueprint

if TYPE_CHECKING:
    from sim.host import Node

_PORTS, _FD, _MIB = 1, 3, 64
_PATHS = argv.Paths(Path("/run"), Path("/disk"), Path("/image"))


@dataclass(eq=False)
class Kept:
    """A template that exists; `memory` is what people have left in it."""

    blueprint: Blueprint
    seal: str
    memory: set[str] = field(default_factory=set)
    mib: int = _MIB
    made_at: int = 0


class _Later:
    """Something that takes its time: whoever awaits it is resumed from outside."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class _Qemu:
    """A fork that is asked for nothing and given devices."""

    def __init__(self) -> None:
        self.devices: list[dict[str, Any]] = []

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        if name == "device_add":
            self.devices.append(arguments or {})
        return []


class Ready:
    """The templates of one life of a host's agent. What was made outlives it, in `node.kept`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.templates = Templates(
            store=self,
            build=self._build,  # type: ignore[arg-type]
            seal=node.seal,
            images=lambda: frozenset({node.world.image}),
            room=lambda: Room(0.0, 1, 1 << 20),
            forks=lambda: Counter(vm.template for vm in node.vms.values() if vm.template),
            now=node.clock.monotonic,
            changed=lambda: None,
        )
        self.templates.recover(lambda _: None)
        self._making: Coroutine[Any, Any, None] | None = None

    def told(self, wish: HostTemplates | TemplateOrdered) -> None:
        """What the scheduler says of them."""
        if isinstance(wish, HostTemplates):
            self.templates.told(wish)
        else:
            self.templates.ordered(wish)

    # --- the store ------------------------------------------------------------------------------------------

    def load(self, _clean: Callable[[str], None]) -> dict[str, Any]:
        return dict(self.node.kept)

    def remove(self, template: Any) -> None:
        if self.node.kept.get(template.blueprint.key) is template:
            del self.node.kept[template.blueprint.key]

    # --- making ---------------------------------------------------------------------------------------------

    async def _build(self, blueprint: Blueprint, mark: str, testing: Callable[[], None]) -> Any:
        for step in (lambda: None, testing):
            step()
            await _Later()
        self.node.kept[blueprint.key] = kept = Kept(blueprint, mark)
        return kept

    def tend(self) -> None:
        """One look, unless one goes on."""
        if self._making is None:
            self._making = self.templates.tend()
            self._go_on(wrong=False)

    def _go_on(self, wrong: bool) -> None:
        from sim.host import Job

        if self._making is None:
            return
        try:
            if wrong:
                self._making.throw(TemplateError("simulated"))
            else:
                self._making.send(None)
        except StopIteration:
            self._making = None
        else:
            self.node.todo.append(Job("template", self._go_on))

    def end(self) -> None:
        """The agent dies: what was in the making is nothing."""
        if self._making is not None:
            self._making.close()

    # --- starting a guest -----------------------------------------------------------------------------------

    def lend(self, start: VmStart) -> tuple[Kept | None, Birth]:
        """What the agent forks, if anything."""
        found, birth = self.templates.lend(start)
        return found, birth  # type: ignore[return-value]

    def booted(self, start: VmStart) -> tuple[set[str], str]:
        """Memory and address of a guest that boots."""
        return set(), _address(_line(start))

    def forked(self, start: VmStart, kept: Kept) -> tuple[set[str], str]:
        """Memory and address of a fork: by its command line it writes into the template's memory or into its own, and
        its card is plugged in once it is one of its own."""
        form = seal.frozen(kept.blueprint, _FD, _PORTS, shared=False, disk=Path("/frozen"))
        line = _line(start, frozen=form)
        (memory,) = [word for word in line if word.startswith("memory-backend-file,")]
        assert not _address(line), "what is in the saved state is everybody's"
        qemu = _Qemu()
        steps = introduce(qemu, None, start, (), network=True, wall=self.node.clock.wall)  # type: ignore[arg-type]
        with contextlib.suppress(StopIteration):
            steps.send(None)
        (address,) = [device["mac"] for device in qemu.devices if "mac" in device]
        return kept.memory if memory.endswith(",share=on") else set(kept.memory), address


def _line(start: VmStart, **form: Any) -> list[str]:
    return argv.qemu(start, _PATHS, accel="tcg", network_fd=_FD, **form)


def _address(line: Iterable[str]) -> str:
    return "".join(found[1] for word in line if (found := re.search(r"\bmac=([0-9a-f:]+)", word)))
