"""measures: other people's pages while 50 log in at once against a directory that accepts and says nothing

The real portal under gunicorn, one worker with its 16 threads, its LDAP server silent. Somebody with a local account
reads a page again and again, first alone (the baseline), then while the 50 wait. Each of the 50 must be told within
twice the directory's limit that its password can't be checked.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy"), str(ROOT / "tests")]

from demo.broker import free_port  # noqa: E402
from support.portals import KEY, PASSWORD, World  # noqa: E402

LIMIT_S = 5


def settings(folder: Path, port: int, directory: int) -> str:
    return f"""
[portal]
listen = "127.0.0.1:{port}"
ops_listen = "127.0.0.1:{free_port()}"
public_url = "http://127.0.0.1:{port}"
console_url = "ws://127.0.0.1:6080/console"
broker_url = "amqp://portal:x@127.0.0.1:{free_port()}/"
database = "sqlite:///{folder}/portal.db"
secret_key = "{KEY}"
ticket_keys = ["{KEY}"]
auth = ["ldap", "local"]
[portal.ldap]
servers = ["ldap://127.0.0.1:{directory}"]
base = "dc=example,dc=org"
realm = ""
timeout_s = {LIMIT_S}
[ledger]
url = "sqlite:///{folder}/ledger.db"
[machines]
catalogue = "{folder}/machines"
"""


def form(url: str) -> tuple[requests.Session, str]:
    """A browser with the login page open."""
    browser = requests.Session()
    found = re.search(r'name="csrf_token" value="([^"]+)"', browser.get(f"{url}/login", timeout=60).text)
    assert found
    return browser, found[1]


def read(browser: requests.Session, url: str, until: threading.Event) -> list[float]:
    """How long each look at a page takes, in ms, until somebody says that it is enough."""
    took = []
    while not until.is_set():
        begun = time.monotonic()
        assert browser.get(f"{url}/desktops", timeout=60, allow_redirects=False).status_code == 200
        took.append(1000 * (time.monotonic() - begun))
        time.sleep(0.01)
    return took


def p95(values: list[float]) -> float:
    return round(statistics.quantiles(values, n=20)[-1], 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=50, help="who log in at once (50)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long the page is read alone (5)")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="dfb") as name,
        socket.create_server(("127.0.0.1", 0), backlog=200) as silent,
    ):
        folder, port = Path(name), free_port()
        world = World(folder)
        world.portal.accounts.add("ada", PASSWORD)
        world.close()
        config, url = folder / "deskfleet.toml", f"http://127.0.0.1:{port}"
        config.write_text(settings(folder, port, silent.getsockname()[1]))
        line = [sys.executable, "-m", "deskfleet.portal", "--config", str(config), "--log-level", "error"]
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as portal:
            try:
                deadline = time.monotonic() + 60
                while True:
                    try:
                        crowd = [form(url) for _ in range(options.people)]
                        break
                    except requests.ConnectionError:
                        assert time.monotonic() < deadline and portal.poll() is None
                        time.sleep(0.1)
                ada, token = form(url)
                # The first try waits for the directory, which is asked before the local accounts.
                ada.post(f"{url}/login", data={"user": "ada", "password": PASSWORD, "csrf_token": token}, timeout=60)
                time.sleep(3.0)  # it is tried again: the rest that its failure earned is over
                with ThreadPoolExecutor(options.people + 1) as pool:
                    over = threading.Event()
                    reading = pool.submit(read, ada, url, over)
                    time.sleep(options.seconds)
                    over.set()
                    alone = reading.result()
                    over = threading.Event()
                    reading = pool.submit(read, ada, url, over)

                    def log_in(one: tuple[int, tuple[requests.Session, str]]) -> tuple[int, float]:
                        number, (browser, csrf) = one
                        begun = time.monotonic()
                        data = {"user": f"user{number}", "password": "wrong enough", "csrf_token": csrf}
                        answer = browser.post(f"{url}/login", data=data, timeout=120)
                        return answer.status_code, time.monotonic() - begun

                    answers = list(pool.map(log_in, enumerate(crowd)))
                    over.set()
                    beside = reading.result()
            finally:
                portal.terminate()
    longest_s = max(seconds for _, seconds in answers)
    found = {
        "page_p95_ms_alone": p95(alone),
        "page_p95_ms_beside": p95(beside),
        "page_max_ms_beside": round(max(beside), 1),
        "p95_ratio": round(p95(beside) / p95(alone), 2),
        "longest_login_s": round(longest_s, 1),
        "statuses": sorted({status for status, _ in answers}),
        "looks": [len(alone), len(beside)],
    }
    for key, value in found.items():
        print(f"{key:20} {value}")
    print(json.dumps(found))
    return 0 if found["statuses"] == [503] and longest_s <= 2 * LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
