"""Starting the portal: what keeps it from starting is said in one plain line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.portals import KEY, World

from deskfleet.portal import __main__ as program
from deskfleet.portal.store import Store


@pytest.fixture
def config(tmp_path: Path) -> Path:
    world = World(tmp_path)
    world.close()
    path = tmp_path / "deskfleet.toml"
    path.write_text(
        f"""
[portal]
public_url = "http://localhost:8080"
console_url = "ws://localhost:6080/console"
broker_url = "amqp://portal:broker-password@localhost/"
database = "{world.database}"
secret_key = "{KEY}"
ticket_keys = ["{KEY}"]
auth = ["local"]
[ledger]
url = "{world.ledger_url}"
[machines]
catalogue = "{world.catalogue}"
"""
    )
    return path


@pytest.fixture(autouse=True)
def never_listen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    started: list[int] = []
    monkeypatch.setattr(program._Gunicorn, "run", lambda _: started.append(1))
    return started


def run(config: Path, *more: str) -> int:
    return program.main(["--config", str(config), *more])


def test_it_starts_when_all_is_there(config: Path, never_listen: list[int]) -> None:
    assert run(config) == 0 and never_listen == [1]


def test_checking_starts_nothing(config: Path, never_listen: list[int]) -> None:
    assert run(config, "--check") == 0 and never_listen == []


def test_no_way_to_log_in_means_no_portal(
    config: Path, capsys: pytest.CaptureFixture[str], never_listen: list[int]
) -> None:
    config.write_text(config.read_text().replace('auth = ["local"]', "auth = []"))
    assert run(config) == 2 and never_listen == []
    assert "portal.auth: name at least one way to log in" in capsys.readouterr().err


def test_a_database_of_another_time_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = tmp_path / "fresh.db"
    Store(f"sqlite:///{fresh}").close()
    config.write_text(config.read_text().replace("portal.db", "fresh.db"))
    assert run(config) == 2 and "deskfleet migrate" in capsys.readouterr().err


def test_without_the_viewer_it_says_how_to_get_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "_VIEWER", tmp_path / "nothing.js")
    assert run(config) == 2 and "portal/assets/install" in capsys.readouterr().err


@pytest.mark.parametrize("gone", ["ledger.db", "portal.db"])
def test_a_database_that_can_not_be_opened_is_told_without_a_trace(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    config.write_text(config.read_text().replace(gone, f"nowhere/{gone}"))
    assert run(config) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "can't start" in said and len(said.splitlines()) <= 3
