"""Write the generated parts of the documents: the state diagram and the tables of messages, queues and reasons.

python docs/generate.py            rewrites what stands between the markers
python docs/generate.py --check    exits 1 when a document is behind the code
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from deskfleet.schemas import topology
from deskfleet.schemas.errors import SENTENCES
from deskfleet.schemas.session import TRANSITIONS, State
from deskfleet.schemas.wire import REGISTRY

DOCS = Path(__file__).parent


def states() -> str:
    """The session's life as a mermaid diagram."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.QUEUED}"]
    lines += [f"    {before} --> {after}: {event}" for (before, event), after in TRANSITIONS.items()]
    return "\n".join([*lines, f"    {State.ENDED} --> [*]", "```"])


def messages() -> str:
    """Every message with its fields."""
    lines = ["| type | what it says | fields |", "| --- | --- | --- |"]
    for kind, schema in REGISTRY.items():
        text = " ".join((schema.target.__doc__ or "").split()).split(". ")[0].rstrip(".")
        lines.append(f"| `{kind}` | {text}. | {', '.join(schema.fields)} |")
    return "\n".join(lines)


def queues() -> str:
    """Every queue, what is bound to it, and its arguments."""
    of_a_process = topology.for_proxy("REPLICA") + topology.for_portal("REPLICA")
    declared = topology.core() + topology.for_host("HOST") + of_a_process
    lines = ["| queue | takes | arguments |", "| --- | --- | --- |"]
    for queue in declared.queues:
        taken = [f"{b.exchange} / `{b.key or '*'}`" for b in declared.bindings if b.queue == queue.name]
        arguments = ", ".join(f"{name.removeprefix('x-')} {value}" for name, value in queue.arguments.items())
        extra = ", exclusive" if queue.exclusive else ""
        lines.append(f"| `{queue.name}` | {'<br>'.join(taken)} | {arguments}{extra} |")
    return "\n".join(lines)


def reasons() -> str:
    """Every machine-readable reason and what a person reads."""
    lines = ["| reason | what a person reads |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{reason}` | {text} |" for reason, text in SENTENCES.items())])


PARTS: dict[str, Callable[[], str]] = {"states": states, "messages": messages, "queues": queues, "reasons": reasons}


def fill(text: str) -> str:
    """A document with its generated parts renewed."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda found, make=make: found[1] + make() + found[2], text)
    return text


def main() -> int:
    """Rewrite, or check."""
    behind = []
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text()
        after = fill(before)
        if before != after:
            behind.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(after)
    if "--check" in sys.argv and behind:
        print(f"behind the code: {', '.join(behind)}; run python docs/generate.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
