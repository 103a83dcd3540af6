"""Packaging: one namespace, no generic name claimed, every package listed."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("schemas", "runtime", "ledger", "scheduler", "agent", "portal", "proxy")


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_folder_with_an_init_is_a_package_and_no_other() -> None:
    listed = set(settings()["options"]["packages"].split())
    found = set()
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add("deskfleet." + ".".join(init.parent.relative_to(ROOT).parts))
    assert listed == found


def test_a_wheel_claims_one_name_only(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"deskfleet"}
    assert "deskfleet/ledger/migrations/versions/0001_first_tables.py" in names
    assert any(name.endswith("templates/login.html") for name in names)
    assert "deskfleet/portal/translations/fr/LC_MESSAGES/messages.po" in names
    assert not any("axe" in name for name in names), "only tests need it"
    for needed in ("core/rfb.js", "pako/lib/zlib/inflate.js"):
        assert any("static/vendor/" in name and name.endswith(needed) for name in names), f"no {needed} in the wheel"


def test_the_four_services_are_commands() -> None:
    scripts = settings()["options.entry_points"]["console_scripts"]
    for name in ("deskfleet", "deskfleet-portal", "deskfleet-scheduler", "deskfleet-agent", "deskfleet-proxy"):
        assert f"\n{name} =" in scripts
