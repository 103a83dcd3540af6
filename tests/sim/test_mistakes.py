"""A harness that finds nothing proves nothing: each typical mistake must be caught, within 200 walks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sim.mistakes import MISTAKES, made
from sim.shrink import symptom
from sim.walk import Walk

WITHIN = 300
#: Where each was caught last, to be tried first: it saves most of the time. `python tests/sim/caught.py` looks again.
CAUGHT = json.loads((Path(__file__).parent / "caught.json").read_text())


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    with made(MISTAKES[mistake]):
        seeds = sorted(range(WITHIN), key=lambda seed: seed != CAUGHT.get(mistake))
        assert any(symptom(Walk(seed)) for seed in seeds), f"not caught within {WITHIN} walks"


def test_there_are_mistakes_enough() -> None:
    assert len(MISTAKES) >= 25
