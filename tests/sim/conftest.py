"""What the simulator says at the end of a run: how many walks, how many planted mistakes it has caught."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

_PLANTED = "test_a_planted_mistake_is_caught["


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """Walks are full of trouble, and nobody reads what the services log about it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Add up what the workers have recorded."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    calls = [report for report in reports if isinstance(report, pytest.TestReport) and report.when == "call"]
    walks = [dict(report.user_properties) for report in calls if "seeds" in dict(report.user_properties)]
    if walks:
        kinds = {kind for walk in walks for kind in walk["met"]}
        seeds, failed = sum(walk["seeds"] for walk in walks), sum(walk["failed"] for walk in walks)
        longest = max(walk["longest"] for walk in walks)
        terminalreporter.write_line(
            f"{seeds} seeds, {failed} failed; {len(kinds)} kinds of faults; longest recovery {longest:.0f} s"
        )
    planted = [report for report in calls if _PLANTED in report.nodeid]
    if planted:
        caught = sum(report.passed for report in planted)
        terminalreporter.write_line(f"{caught} of {len(planted)} caught")
