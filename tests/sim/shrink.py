"""Failing walks: made as short as they can be, written down, and repeated.

python tests/sim/shrink.py --seeds 1000 --first 500     walk; each failing one is shrunk and written to kept/
python tests/sim/shrink.py --replay FILE                one walk again, from its file, with its log
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sim.process import Violation
from sim.steps import Step
from sim.walk import Walk

KEPT = Path(__file__).parent / "kept"
#: So many repeats are tried to make a walk shorter.
TRIES = 400


def symptom(walk: Walk) -> str:
    """What a walk shows: the number of the invariant that it breaks, another error's name, or nothing."""
    try:
        walk.run()
    except Violation as violation:
        return str(violation).partition(":")[0]
    except Exception as error:  # noqa: BLE001  however it shows
        return type(error).__name__
    return ""


def shrink(walk: Walk, wanted: str) -> list[Step]:
    """The fewest steps that still show the same symptom: kinds of steps are left out first, then steps."""
    tries = 0

    def still(steps: Sequence[Step]) -> bool:
        nonlocal tries
        tries += 1
        return symptom(Walk(walk.seed, steps, walk.faults)) == wanted

    steps = list(walk.steps)
    for kind in sorted({step[0] for step in steps}):
        fewer = [step for step in steps if step[0] != kind]
        if tries < TRIES and still(fewer):
            steps = fewer
    return _halve(steps, still, lambda: tries < TRIES)


def _halve(steps: list[Step], still: Callable[[Sequence[Step]], bool], go_on: Callable[[], bool]) -> list[Step]:
    """Delta debugging: leave out ever smaller runs of steps for as long as that changes nothing."""
    size = max(1, len(steps) // 2)
    while go_on():
        at, before = 0, len(steps)
        while at < len(steps) and go_on():
            fewer = steps[:at] + steps[at + size :]
            if still(fewer):
                steps = fewer
            else:
                at += size
        if size == 1 and len(steps) == before:
            break
        size = max(1, size // 2)
    return steps


def keep(walk: Walk, wanted: str, folder: Path = KEPT) -> Path:
    """Shrink a failing walk and write it down; the file."""
    steps = shrink(walk, wanted)
    path = folder / f"{wanted.lower()}-{walk.seed}.json"
    lines = ",\n  ".join(json.dumps(step, ensure_ascii=False) for step in steps)
    head = json.dumps({"seed": walk.seed, "symptom": wanted, "faults": sorted(walk.faults)}, ensure_ascii=False)
    path.write_text(f'{head[:-1]}, "steps": [\n  {lines}\n]}}\n')
    return path


def load(path: Path) -> Walk:
    """The walk that a file holds."""
    data = json.loads(path.read_text())
    return Walk(data["seed"], [tuple(step) for step in data["steps"]], data["faults"])


def main() -> int:
    """Walk over many seeds, or repeat one walk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--replay", type=Path)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.replay:
        walk = load(options.replay)
        try:
            walk.run()
        finally:
            print("\n".join(walk.world.lines))
        return 0
    begun, bad, longest = time.monotonic(), 0, 0.0
    for seed in range(options.first, options.first + options.seeds):
        walk = Walk(seed)
        shown = symptom(walk)
        longest = max(longest, walk.world.recovery_s)
        if shown:
            bad += 1
            path = keep(walk, shown)
            print(f"seed {seed} breaks {shown}; again: python tests/sim/shrink.py --replay {path}", flush=True)
    took = time.monotonic() - begun
    print(f"{options.seeds} seeds, {bad} failed, longest recovery {longest:.0f} s, {took:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
