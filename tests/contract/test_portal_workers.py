"""Several workers under the real gunicorn are one portal: what they count is added up, and goes with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from demo.broker import free_port
from support.portals import KEY, World

REQUESTS, PATIENCE_S = 60, 60.0


def counted(ops: int) -> float:
    text = requests.get(f"http://127.0.0.1:{ops}/metrics", timeout=10).text
    found = re.findall(r'^deskfleet_portal_http_requests_total\{endpoint="pages.login",.*\} (\S+)$', text, re.M)
    assert text.count("# TYPE deskfleet_portal_http_requests_total") <= 1
    assert re.search(r"^deskfleet_portal_broker_connected 0.0$", text, re.M)
    return sum(map(float, found))


def test_what_two_workers_count_is_one_figure(tmp_path: Path) -> None:
    World(tmp_path).close()
    port, ops, counts = free_port(), free_port(), tmp_path / "tmp"
    login = f"http://127.0.0.1:{port}/login"
    counts.mkdir()
    config = tmp_path / "deskfleet.toml"
    config.write_text(
        f"""
[portal]
listen = "127.0.0.1:{port}"
ops_listen = "127.0.0.1:{ops}"
public_url = "http://localhost:{port}"
console_url = "ws://localhost:6080/console"
broker_url = "amqp://portal:x@127.0.0.1:{free_port()}/"
database = "sqlite:///{tmp_path}/portal.db"
secret_key = "{KEY}"
ticket_keys = ["{KEY}"]
auth = ["local"]
workers = 2
[ledger]
url = "sqlite:///{tmp_path}/ledger.db"
[machines]
catalogue = "{tmp_path}/machines"
"""
    )
    portal = subprocess.Popen(
        [sys.executable, "-m", "deskfleet.portal", "--config", str(config)],
        env={**os.environ, "TMPDIR": str(counts)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                counted(ops)
                before = requests.get(login, timeout=10)
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline and portal.poll() is None, "it does not start"
                time.sleep(0.1)
        assert before.status_code == 200
        begun, both = counted(ops), set()
        while len(both) < 2:  # until each of them has counted something
            assert time.monotonic() < deadline
            with ThreadPoolExecutor(8) as pool:
                answers = pool.map(requests.get, [login] * REQUESTS)
                assert {answer.status_code for answer in answers} == {200}
            assert counted(ops) - begun == REQUESTS
            begun += REQUESTS
            both = {path.stem for path in counts.glob("deskfleet-portal-*/counter_*.db")}
    finally:
        portal.send_signal(signal.SIGTERM)
        assert portal.wait(30) == 0
    assert list(counts.iterdir()) == []
