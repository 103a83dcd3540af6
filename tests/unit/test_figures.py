"""The scheduler's metrics, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from support.hosts import POLICY
from support.scheduling import Control

from deskfleet.scheduler.figures import Figures

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "scheduler.json"


@pytest.fixture
def control() -> Control:
    return Control(POLICY)


def scrape(control: Control, leads: bool = True) -> str:
    registry = CollectorRegistry()
    leading = control.scheduler if leads else None
    registry.register(Figures(lambda: leading, POLICY, control.clock, "deskfleet_scheduler"))
    return generate_latest(registry).decode()


def test_queue_hosts_sessions_and_decisions_are_counted(control: Control) -> None:
    control.host("h1", cpus=1)
    for _ in range(4):
        control.launch(cpus=1)
    control.host("h2").cut()
    control.wait(20)
    text = scrape(control)
    for line in (
        "deskfleet_scheduler_leader 1.0",
        'deskfleet_scheduler_sessions{state="running"} 4.0',
        'deskfleet_scheduler_sessions{state="queued"} 0.0',
        'deskfleet_scheduler_hosts{state="open"} 1.0',
        'deskfleet_scheduler_hosts{state="silent"} 1.0',
        "deskfleet_scheduler_placements_total 4.0",
    ):
        assert line in text, line
    control.drain("h1")
    control.launch("cy")
    control.wait(10)
    text = scrape(control)
    assert 'deskfleet_scheduler_queue_length{queue_class="normal"} 1.0' in text
    assert 'deskfleet_scheduler_queue_age_seconds{queue_class="normal"} 1' in text
    assert re.search(r'refusals_total\{reason="draining"\} [1-9]', text)
    assert re.search(r'decision_seconds_bucket\{le="\+Inf"\} [1-9]', text)


def test_one_that_stands_by_shows_that_and_nothing_else(control: Control) -> None:
    assert [line for line in scrape(control, leads=False).splitlines() if line[0] != "#"] == [
        "deskfleet_scheduler_leader 0.0"
    ]


def test_the_dashboard_asks_for_metrics_that_there_are(control: Control) -> None:
    control.host("h1").broken = True
    control.launch()
    control.drain("h1")
    control.launch("bo")
    text = scrape(control)
    shown = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in shown["panels"]
        for target in panel["targets"]
        for name in re.findall(r"deskfleet_\w+", target["expr"])
    }
    known = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert asked and asked <= known, asked - known
    labels = {
        label
        for panel in shown["panels"]
        for t in panel["targets"]
        for label in re.findall(r"{{(\w+)}}", t["legendFormat"])
    }
    assert all(f'{label}="' in text for label in labels), labels
