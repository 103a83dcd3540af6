"""measures: the progress poll of 1,000 waiting people on two gunicorn workers, beside a Flask hello page

The real portal with its own database and a ledger on SQLite (its broker is away, which no poll asks); every request is
another person's, with their own cookie and desktop. Throughput is taken by wrk, in turns with the same gunicorn that
serves nothing but "hello": of polls as a page that waits sends them, of which most are answered by nothing new, and of
those that want the whole part. Then 500 people poll every 2 s each, at times that do not depend on the answers, and how
long each waited is counted from when it was due.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy"), str(ROOT / "tests")]

from demo.broker import free_port  # noqa: E402
from sqlalchemy import insert, update  # noqa: E402
from support.portals import KEY, World  # noqa: E402

from deskfleet.ledger.reader import Wait  # noqa: E402
from deskfleet.portal import tables  # noqa: E402
from deskfleet.portal.app import create_app  # noqa: E402
from deskfleet.portal.auth import Identity  # noqa: E402
from deskfleet.schemas.errors import Reason  # noqa: E402
from deskfleet.schemas.session import State  # noqa: E402
from deskfleet.schemas.verdict import Verdict  # noqa: E402

PEOPLE = 1000
POLLING = 500
EVERY_S = 2.0
CONNECTIONS = 16
_YEARS_S = 20 * 366 * 24 * 3600  # the clock that the rows are written by stands still
HELLO = """
from flask import Flask
app = Flask("hello")
@app.get("/")
def hello():
    return "hello"
"""
LUA = """
local requests, n = {}, 0
for line in io.lines("%s") do
  local path, cookie = line:match("(%%S+) (.*)")
  requests[#requests + 1] = wrk.format("GET", path, {["Cookie"] = cookie, ["HX-Request"] = "true"})
end
request = function() n = n %% #requests + 1; return requests[n] end
"""


def people(folder: Path) -> list[tuple[str, str]]:
    """Fill the databases; the path and the cookie of each person's poll."""
    world = World(folder)
    app = create_app(world.portal)
    sign = app.session_interface.get_signing_serializer(app)  # type: ignore[attr-defined]
    world.host("h1")
    polls, rng = [], random.Random(2)
    account = {"password": "", "admin": False, "groups": "[]", "disabled": False, "created_at": 0.0}
    with world.portal.store.writing() as connection:
        connection.execute(insert(tables.account), [account | {"user": f"person{n}"} for n in range(PEOPLE)])
    for number in range(PEOPLE):
        sid, user = f"{number:032x}", f"person{number}"
        # Not all at once: each part is drawn anew once a minute, by the time that its desktop was asked for.
        asked_at = time.time() - rng.uniform(600, 3600)
        session = world.session(sid, user, State.QUEUED, created_at=asked_at, changed_at=asked_at)
        with world.writer.begin() as tx:
            verdicts = (Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free"),)
            tx.explain([(session.sid, Wait(number + 1, 60.0 * number, verdicts), 0.0)])
        secret = world.portal.logins.open(Identity(user, "local"), _YEARS_S)
        polls.append((f"/progress/{sid}/part", f"deskfleet={sign.dumps({'login': secret, 'csrf_token': secret})}"))
    with world.portal.store.writing() as connection:
        connection.execute(update(tables.login).values(used_at=time.time()))
    world.close()
    return polls


@contextmanager
def running(line: list[str], url: str, log: Path) -> Iterator[None]:
    """A server for as long as the block runs."""
    with log.open("wb") as output, subprocess.Popen(line, stdout=output, stderr=output, cwd="/") as process:
        try:
            deadline = time.monotonic() + 60
            while subprocess.run(["curl", "-s", "-o", "/dev/null", url], check=False).returncode != 0:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait()


def wrk(url: str, seconds: int, script: Path | None = None) -> float:
    """Answers a second, all of them good ones."""
    line = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", *(["-s", str(script)] if script else []), url]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in said and "Socket errors" not in said, said
    found = re.search(r"Requests/sec:\s+([0-9.]+)", said)
    assert found, said
    return float(found[1])


def follow(part: str) -> str:
    """What a page polls that shows this."""
    found = re.search(r'hx-get="([^"]+)"', part)
    assert found, part
    return html.unescape(found[1])


def shown(port: int, polls: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same people, each with the page open."""
    found = []
    connection = HTTPConnection("127.0.0.1", port)
    for path, cookie in polls:
        connection.request("GET", path, headers={"Cookie": cookie, "HX-Request": "true"})
        found.append((follow(connection.getresponse().read().decode()), cookie))
    connection.close()
    return found


async def poll(port: int, path: str, cookie: str, begin: float, until: float, waits: list[float]) -> int:
    """One person who polls until a moment; how many answers were the whole part."""
    loop = asyncio.get_running_loop()
    # As a browser does, not before there is something to ask: a thread of gunicorn waits for the first line.
    await asyncio.sleep(max(0.0, begin - loop.time()))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    end = f" HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: {cookie}\r\nHX-Request: true\r\n\r\n"
    due, whole = begin, 0
    while due < until:
        await asyncio.sleep(max(0.0, due - loop.time()))
        writer.write(f"GET {path}{end}".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 204"):
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert head.startswith(b"HTTP/1.1 200") and length, head
            path = follow((await reader.readexactly(int(length[1]))).decode())
            whole += 1
        waits.append(loop.time() - due)
        due += EVERY_S
    writer.close()
    return whole


async def crowd(port: int, polls: list[tuple[str, str]], seconds: float) -> tuple[list[float], int]:
    """How long each poll of everybody took, in seconds, and how many answers were the whole part."""
    waits: list[float] = []
    now, rng = asyncio.get_running_loop().time() + 1, random.Random(1)
    tasks = [
        poll(port, path, cookie, now + rng.uniform(0, EVERY_S), now + seconds, waits)
        for path, cookie in polls[:POLLING]
    ]
    return waits, sum(await asyncio.gather(*tasks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=6, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfp", dir="/tmp") as name:
        folder = Path(name)
        polls = people(folder)
        listing, script = folder / "polls", folder / "polls.lua"
        script.write_text(LUA % listing)
        (folder / "hello.py").write_text(HELLO)
        port, other, ops = free_port(), free_port(), free_port()
        settings = folder / "deskfleet.toml"
        settings.write_text(
            f"""
[portal]
listen = "127.0.0.1:{port}"
ops_listen = "127.0.0.1:{ops}"
workers = 2
public_url = "http://127.0.0.1:{port}"
console_url = "ws://127.0.0.1:8090/console"
broker_url = "amqp://portal:secret@127.0.0.1:1/"
database = "sqlite:///{folder}/portal.db"
secret_key = "{KEY}"
ticket_keys = ["{"t" * 40}"]
auth = ["local"]
[ledger]
url = "sqlite:///{folder}/ledger.db"
[machines]
catalogue = "{folder}/machines"
"""
        )
        python = sys.executable
        portal = [python, "-m", "deskfleet.portal", "--config", str(settings), "--log-level", "error"]
        hello = [python, "-m", "gunicorn", "-b", f"127.0.0.1:{other}", "-w", "2", "-k", "gthread", "--threads", "16"]
        hello += ["--chdir", str(folder), "--keep-alive", "30", "hello:app"]
        theirs, ours, whole = [], [], []
        with running(portal, f"http://127.0.0.1:{port}/login", folder / "portal.log"):

            def take(which: list[tuple[str, str]], seconds: int) -> float:
                listing.write_text("".join(f"{path} {cookie}\n" for path, cookie in which))
                return wrk(f"http://127.0.0.1:{port}", seconds, script)

            take(polls, 2)
            for _ in range(options.turns):
                whole.append(take(polls, options.seconds))
                ours.append(take(shown(port, polls), options.seconds))
                with running(hello, f"http://127.0.0.1:{other}/", folder / "hello.log"):
                    theirs.append(wrk(f"http://127.0.0.1:{other}/", options.seconds))
            waits, drawn = asyncio.run(crowd(port, shown(port, polls), 20.0))
    waits.sort()
    mine, full, plain = (statistics.median(rates) for rates in (ours, whole, theirs))
    p50, p99 = (1000 * waits[int(len(waits) * share)] for share in (0.5, 0.99))
    print(f"\nprogress polls/s {mine:8.0f}   hello pages/s {plain:8.0f}   ratio {mine / plain:.2f}")
    print(f"whole parts/s    {full:8.0f}                               ratio {full / plain:.2f}")
    polled = f"{len(waits)} polls, {drawn} whole parts"
    print(f"{POLLING} people every {EVERY_S:g} s: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({polled})")
    result = {
        "polls_s": round(mine),
        "hello_s": round(plain),
        "poll_ratio_hello": round(mine / plain, 2),
        "whole_ratio_hello": round(full / plain, 2),
        "poll_p50_ms": round(p50, 1),
        "poll_p99_ms": round(p99, 1),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
