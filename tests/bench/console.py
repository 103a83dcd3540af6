"""measures: consoles through the proxy: CPU a GB, added delay, memory when idle; beside nginx and websockify

All run in the same rounds, one after the other, against the same far end; medians of the ratios of each round are the
result, as absolute figures are this machine's. The proxy is a real process with a real broker, and checks a fresh
ticket for every connection; nginx (64 KiB buffers) checks nothing. "tls" is with mutual TLS towards the host, as a
fleet runs it. websockify is our console server in front of a unix socket.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "deploy")]

import wsload  # noqa: E402
from demo.broker import free_port  # noqa: E402
from support.console_fleet import KEY, ConsoleFleet, ConsoleHost, Process, Proxy, accepts, until  # noqa: E402
from support.consoles import ticket  # noqa: E402
from wsload import Target  # noqa: E402

from deskfleet.schemas.host import Phase  # noqa: E402
from deskfleet.schemas.tickets import Tickets  # noqa: E402

AIMS = {"cpu_ratio_nginx": 1.3, "added_p50_us": 90.0, "idle_kib": 4.0}
TICKETS = Tickets([KEY])
PLAIN = {"tls_cert": "", "tls_key": "", "tls_ca": ""}


def sid(number: int) -> str:
    return f"{number:032x}"


def by_ticket(first: int, host: str) -> Callable[[int], str]:
    """Requests for the desktops of a host that are numbered from `first`."""
    return lambda number: f"/console?ticket={TICKETS.sign(ticket(sid(first + number), 7, host))}"


def by_token(number: int) -> str:
    return f"/websockify?token={sid(0)}.{ticket(sid(number)).nonce}"


def nginx(folder: Path, name: str, far_port: int, pair: tuple[str, str, str] | None) -> tuple[list[str], int]:
    """A command for an nginx that does the proxy's part without its checks, and its port."""
    port, home = free_port(), folder / name
    home.mkdir()
    tls = ""
    if pair:
        cert, key, authority = pair
        tls = (
            f"proxy_ssl_certificate {cert}; proxy_ssl_certificate_key {key}; "
            f"proxy_ssl_trusted_certificate {authority}; proxy_ssl_verify on; proxy_ssl_name h2; "
            "proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3; "
        )
    temporary = " ".join(
        f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(
        f"daemon off; master_process off; worker_processes 1; worker_rlimit_nofile 20000; pid {home}/pid; "
        f"error_log {home}/error.log; events {{ worker_connections 9000; }} http {{ access_log off; {temporary} "
        f"server {{ listen 127.0.0.1:{port} backlog=4096; tcp_nodelay on; location / {{ "
        f"proxy_pass {'https' if pair else 'http'}://127.0.0.1:{far_port}; proxy_http_version 1.1; {tls}"
        "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade; "
        "proxy_read_timeout 1h; proxy_buffer_size 64k; proxy_buffers 8 64k; } } }\n"
    )
    return ["/usr/sbin/nginx", "-p", str(home), "-e", f"{home}/error.log", "-c", f"{home}/nginx.conf"], port


@contextlib.contextmanager
def stage(folder: Path, consoles: int) -> Iterator[dict[str, Target]]:
    """Everything that is compared, running: by name, in the order of the table."""
    fleet = ConsoleFleet(folder / "fleet")
    started: list[Process] = []

    def start(argv: list[str], name: str) -> int:
        started.append(Process(argv, folder / f"{name}.log"))
        return started[-1].child.pid

    try:
        load = [sys.executable, str(HERE / "wsload.py")]
        server = fleet.authority.issue("h2", "serverAuth")
        client = fleet.authority.issue("proxy", "clientAuth")
        ours = (client.cert, client.key, fleet.authority.ca)
        far, far_tls = free_port(), free_port()
        start([*load, "--port", str(far)], "far")
        start([*load, "--port", str(far_tls), "--tls", server.cert, server.key, fleet.authority.ca], "far-tls")
        targets = {"direct": Target("direct", far, by_ticket(0, "h1"))}
        for suffix, host, port, first, settings, pair in (
            ("", "h1", far, 0, PLAIN, None),
            (" tls", "h2", far_tls, 10_000, {}, ours),
        ):
            wait_for(port)
            proxy = Proxy(fleet, f"proxy{suffix.strip()}", **settings)
            proxy.start()
            assert proxy.process
            started.append(proxy.process)
            feed(fleet, host, port, first, consoles)
            mine = Target(f"deskfleet{suffix}", proxy.port, by_ticket(first, host), (proxy.process.child.pid,))
            wait_for_route(mine)
            argv, nginx_port = nginx(folder, f"nginx{suffix.strip()}", port, pair)
            pids = (start(argv, f"nginx{suffix.strip()}"),)
            theirs = Target(f"nginx{suffix}", nginx_port, by_ticket(first, host), pids)
            wait_for(nginx_port)
            targets |= {mine.name: mine, theirs.name: theirs}
        console = ConsoleHost("h1", folder, None)
        (console.run / sid(0)).mkdir()
        start([*load, "--unix", str(console.run / sid(0) / "vnc.sock")], "display")
        console.start()
        assert console.process
        started.append(console.process)
        targets["websockify"] = Target("websockify", console.port, by_token, (console.process.child.pid,))
        yield targets
    finally:
        for process in reversed(started):
            if process.child.poll() is None:
                process.end()
        fleet.close()


def feed(fleet: ConsoleFleet, name: str, port: int, first: int, consoles: int) -> None:
    """A heartbeat with that many desktops at the far end."""
    host = ConsoleHost(name, fleet.folder, None)
    host.address = f"127.0.0.1:{port}"
    host.guests = {sid(first + number): (7, Phase.RUNNING) for number in range(consoles)}
    host.highest = 7
    fleet.beat(host)


def wait_for(port: int) -> None:
    until(lambda: accepts(port), f"port {port} listens")


def wait_for_route(target: Target) -> None:
    def opens() -> bool:
        with contextlib.suppress(ConnectionError), wsload.connect(target):
            return True
        return False

    until(opens, f"{target.name} has heard of its host")


def measure(
    targets: dict[str, Target], rounds: int, seconds: float, consoles: int
) -> dict[str, dict[str, list[float]]]:
    """Every figure of every target, a value a round."""
    got: dict[str, dict[str, list[float]]] = {name: {} for name in targets}
    for number in range(rounds):
        for name, target in targets.items():
            figures = wsload.bulk(target, 8, seconds) | wsload.ping(target, 1000) | wsload.setup(target, 50)
            for key, value in figures.items():
                got[name].setdefault(key, []).append(value)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    for name, count in (
        ("deskfleet", consoles), ("nginx", consoles), ("deskfleet tls", 500), ("nginx tls", 500), ("websockify", 50),
    ):  # fmt: skip
        for key, value in wsload.idle(targets[name], min(count, consoles)).items():
            got[name][key] = [value]
    return got


def main() -> int:
    """Print a table and, as the last line, one JSON object; 1 when an aim is missed and --strict asks."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each bulk transfer")
    parser.add_argument("--consoles", type=int, default=2000, help="idle at once")
    parser.add_argument("--strict", action="store_true")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with (
        tempfile.TemporaryDirectory(prefix="dfb", ignore_cleanup_errors=True) as folder,
        stage(Path(folder), options.consoles) as targets,
    ):
        got = measure(targets, options.rounds, options.seconds, options.consoles)
    columns = ("mb_s", "cpu_s_gb", "p50_us", "p99_us", "cpu_us_echo", "open_ms", "idle_kib", "used_kib", "alive")
    print(f"{'':16}" + "".join(f"{column:>12}" for column in columns))
    medians = {name: {key: statistics.median(values) for key, values in row.items()} for name, row in got.items()}
    for name, row in medians.items():
        cells = (f"{row[column]:12.2f}" if column in row else f"{'-':>12}" for column in columns)
        print(f"{name:16}" + "".join(cells))

    def ratio(key: str, one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(got[one][key], got[other][key], strict=True)), 3)

    def added(one: str) -> float:
        pairs = zip(got[one]["p50_us"], got["direct"]["p50_us"], strict=True)
        return round(statistics.median(a - b for a, b in pairs), 1)

    result = {
        "cpu_ratio_nginx": ratio("cpu_s_gb", "deskfleet", "nginx"),
        "added_p50_us": added("deskfleet"),
        "idle_kib": round(medians["deskfleet"]["idle_kib"], 2),
        "bulk_ratio_websockify": ratio("mb_s", "deskfleet", "websockify"),
        "consoles": int(medians["deskfleet"]["alive"]),
        "cpu_ratio_websockify": ratio("cpu_s_gb", "deskfleet", "websockify"),
        "cpu_ratio_nginx_tls": ratio("cpu_s_gb", "deskfleet tls", "nginx tls"),
        "added_p50_us_nginx": added("nginx"),
        "idle_kib_tls": round(medians["deskfleet tls"]["idle_kib"], 2),
        "aims": AIMS,
        "raw": {name: {key: round(value, 3) for key, value in row.items()} for name, row in medians.items()},
    }
    missed = [name for name, aim in AIMS.items() if float(result[name]) > aim]  # type: ignore[arg-type]
    missed += ["consoles"] if int(result["consoles"]) < options.consoles else []  # type: ignore[call-overload]
    result["missed"] = missed
    print(json.dumps(result))
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
