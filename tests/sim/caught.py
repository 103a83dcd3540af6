"""Look which walk catches each planted mistake first, and write it to caught.json: python tests/sim/caught.py"""

from __future__ import annotations

import json
import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sim.mistakes import MISTAKES, made
from sim.shrink import symptom
from sim.walk import Walk

WITHIN = 300


def first(mistake: str) -> int | None:
    """The first seed that catches a mistake."""
    logging.disable(logging.CRITICAL)
    with made(MISTAKES[mistake]):
        return next((seed for seed in range(WITHIN) if symptom(Walk(seed))), None)


def main() -> int:
    """Look at all of them, on every core."""
    names = sorted(MISTAKES)
    with ProcessPoolExecutor() as pool:
        caught = dict(zip(names, pool.map(first, names), strict=True))
    found = {name: seed for name, seed in caught.items() if seed is not None}
    (Path(__file__).parent / "caught.json").write_text(json.dumps(found, indent=1) + "\n")
    for name in names:
        print(f"{'never' if caught[name] is None else caught[name]:>5}  {name}")
    print(f"{len(found)} of {len(names)} caught")
    return 0 if len(found) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
