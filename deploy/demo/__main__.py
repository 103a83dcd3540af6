"""bash deploy/try: start a whole fleet here, say where it is, stop it on Ctrl-C."""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from demo.broker import BrokerFailed
from demo.fleet import ROOT, Fleet, FleetError, interruptible

FREE_MIB = 4096
DEFAULT_PORT = 8080


def main() -> int:
    """Run until Ctrl-C; 0 after an orderly stop, 1 when something failed."""
    parser = argparse.ArgumentParser(prog="deploy/try", description="A whole Deskfleet on this machine.")
    parser.add_argument("--state", type=Path, default=Path("/var/tmp/deskfleet-try"), help="folder of all its state")
    parser.add_argument("--hosts", type=int, default=2, help="how many agents to run (2)")
    parser.add_argument("--port", type=int, default=0, help=f"the portal's port ({DEFAULT_PORT}, or a free one)")
    parser.add_argument("--smoke", action="store_true", help="launch a desktop in a browser, look at it, and end")
    parser.add_argument("--screenshot", type=Path, help="where --smoke saves what it saw")
    parser.add_argument("--no-desktop", action="store_true", help="do not build the Linux desktop in the background")
    options = parser.parse_args()
    begun = time.monotonic()
    interruptible()
    fleet = None
    try:
        if not 1 <= options.hosts <= 20:
            raise FleetError("--hosts: from 1 to 20")
        port = _port(options.port)
        options.state.mkdir(parents=True, exist_ok=True, mode=0o711)
        free = shutil.disk_usage(options.state).free >> 20
        if free < FREE_MIB:
            raise FleetError(
                f"{options.state} has {free} MiB free and needs {FREE_MIB}. Make room, or use another --state DIR."
            )
        fleet = Fleet(options.state.resolve(), options.hosts, port, say)
        build(fleet, "tiny")
        fleet.start()
        say(f"everything is up after {time.monotonic() - begun:.1f} s")
        if options.smoke:
            from demo.smoke import smoke  # needs a browser, which only this needs

            return smoke(fleet, options.screenshot or fleet.state / "smoke.png", say)
        welcome(fleet)
        if not options.no_desktop:
            say(
                "  A small Linux desktop is being built in the background; it joins the launch page when it is there.\n"
            )
            threading.Thread(target=build_later, args=(fleet, "desktop"), daemon=True).start()
        watch(fleet)
    except KeyboardInterrupt:
        say("\nstopping …")
        return 0
    except (FleetError, BrokerFailed) as error:
        print(f"try: {error}", file=sys.stderr)
        return 1
    finally:
        if fleet:
            stop(fleet)
    return 0


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, flush=True)


def _port(wanted: int) -> int:
    for port in [wanted] if wanted else [DEFAULT_PORT, 0]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if wanted:
                    raise FleetError(
                        f"port {port}: {error.strerror}. Stop what uses it, or give another --port."
                    ) from None
                say(f"port {port} is in use; taking a free one")
                continue
            return int(probe.getsockname()[1])
    raise FleetError("no free port")


def build(fleet: Fleet, machine: str) -> None:
    """Build a machine's image unless it is there.

    Raises:
        FleetError: it could not be built; with the end of the builder's output.
    """
    line = ["bash", str(ROOT / "deploy/build-machine"), machine, "--out", str(fleet.state)]
    log = fleet.state / "logs" / f"build-{machine}.log"
    begun = time.monotonic()
    with log.open("ab") as output:
        code = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False).returncode
    if code:
        raise FleetError(f"the machine '{machine}' could not be built; see {log}:\n{log.read_text()[-1500:]}")
    if time.monotonic() - begun > 1:
        say(f"the machine '{machine}' is ready ({time.monotonic() - begun:.0f} s)")


def build_later(fleet: Fleet, machine: str) -> None:
    """Build in the background, until a host keeps it ready: a failure is said, and harms nothing else."""
    try:
        build(fleet, machine)
        begun = time.monotonic()
        while not fleet.kept_ready():
            time.sleep(1.0)
        say(f"… and is kept ready ({time.monotonic() - begun:.0f} s): it opens in a moment now")
    except FleetError as error:
        say(str(error))


def welcome(fleet: Fleet) -> None:
    """Where to go, and who to be."""
    say(
        f"\n  Open {fleet.url}\n"
        f"  Sign in as   demo    password {fleet.keys.secret('login-demo', 9)}\n"
        f"  or, to look after it, as   admin   password {fleet.keys.secret('login-admin', 9)}\n"
        f"  Everything is in {fleet.state} (logs in {fleet.state}/logs). Ctrl-C stops it all.\n"
    )


def watch(fleet: Fleet) -> None:
    """Start again what dies, and say so, until Ctrl-C."""
    while True:
        time.sleep(1.0)
        for service in fleet.services.values():
            if not service.running():
                say(f"{service.name} has ended; starting it again. Its log: {service.log}")
                service.start()


def stop(fleet: Fleet) -> None:
    """Stop everything; a second Ctrl-C must not leave half of it running."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fleet.stop()
    left = fleet.leftovers()
    say("stopped." if not left else "stopped, but this is left:\n" + "\n".join(left))


if __name__ == "__main__":
    sys.exit(main())
