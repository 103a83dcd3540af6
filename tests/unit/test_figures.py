"""The scheduler's metrics, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from support.hosts import POLICY
from support.portals import World
from support.scheduling import Control

from deskfleet.scheduler.figures import Figures
from deskfleet.schemas.session import Birth

DASHBOARDS = Path(__file__).parents[2] / "deploy" / "grafana"


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
    # From the first look that finds it, a second after it came.
    assert 'deskfleet_scheduler_queue_age_seconds{queue_class="normal"} 9.0' in text
    assert re.search(r'refusals_total\{reason="draining"\} [1-9]', text)
    assert re.search(r'decision_seconds_bucket\{le="\+Inf"\} [1-9]', text)
    assert 'wait_seconds_bucket{le="0.1"} 4.0' in text


def test_starts_are_counted_by_how_a_desktop_came_to_be(control: Control) -> None:
    times = control.scheduler.decisions.stats.started[Birth.FORKED]
    for seconds in (0.05, 0.1, 0.15, 9000.0):
        times.add(seconds)
    text = scrape(control)
    for line in (
        'start_seconds_bucket{birth="forked",le="0.1"} 2.0',
        'start_seconds_bucket{birth="forked",le="7200.0"} 3.0',
        'start_seconds_bucket{birth="forked",le="+Inf"} 4.0',
        'start_seconds_count{birth="booted"} 0.0',
    ):
        assert f"deskfleet_scheduler_{line}" in text, line


def test_one_that_stands_by_shows_that_and_nothing_else(control: Control) -> None:
    assert [line for line in scrape(control, leads=False).splitlines() if line[0] != "#"] == [
        "deskfleet_scheduler_leader 0.0"
    ]


def expressions(dashboard: str) -> tuple[set[str], set[str]]:
    """The metrics that a dashboard asks for, and the labels that it shows."""
    targets = [t for panel in json.loads((DASHBOARDS / dashboard).read_text())["panels"] for t in panel["targets"]]
    names = {name for target in targets for name in re.findall(r"deskfleet_\w+", target["expr"])}
    return names, {label for target in targets for label in re.findall(r"{{(\w+)}}", target["legendFormat"])}


def names_in(text: str) -> set[str]:
    return {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def test_the_dashboard_asks_for_metrics_that_there_are(control: Control) -> None:
    control.host("h1").broken = True
    control.launch()
    control.drain("h1")
    control.launch("bo")
    text = scrape(control)
    asked, labels = expressions("scheduler.json")
    assert asked and asked <= names_in(text), asked - names_in(text)
    assert all(f'{label}="' in text for label in labels), labels


def test_so_does_the_portals(control: Control, tmp_path: Path) -> None:
    world = World(tmp_path)
    counts = world.portal.counts
    counts.logins.labels("local", "ok").inc()
    counts.launches.labels("page").inc()
    text = scrape(control) + generate_latest(world.portal.metrics.registry).decode()
    world.close()
    asked, labels = expressions("portal.json")
    assert asked and asked <= names_in(text), asked - names_in(text)
    assert all(f'{label}="' in text for label in labels), labels
