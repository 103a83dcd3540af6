"""A harness that finds nothing proves nothing: each typical mistake must be caught, within 200 walks."""

from __future__ import annotations

import pytest
from sim.mistakes import MISTAKES, made
from sim.shrink import symptom
from sim.walk import Walk

WITHIN = 200


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    with made(MISTAKES[mistake]):
        assert any(symptom(Walk(seed)) for seed in range(WITHIN)), f"not caught within {WITHIN} walks"


def test_there_are_mistakes_enough() -> None:
    assert len(MISTAKES) >= 25
