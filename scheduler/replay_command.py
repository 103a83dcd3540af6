"""deskfleet-replay --config FILE: the requests that the ledger has recorded, under this policy and under another."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from sqlalchemy import Connection, select
from sqlalchemy.exc import DBAPIError

from deskfleet.ledger import tables
from deskfleet.ledger.engine import LedgerError, check_revision, open_engine
from deskfleet.ledger.reader import all_hosts
from deskfleet.ledger.rows import to_session
from deskfleet.runtime.service import Clock, SystemClock
from deskfleet.runtime.settings import SettingsError, load
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.policy import Policy
from deskfleet.scheduler.replay import Request, Result, replay
from deskfleet.scheduler.settings import SchedulerSchema
from deskfleet.schemas.catalogue import Catalogue
from deskfleet.schemas.config import SECTIONS, LedgerSchema, MachinesSchema
from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.host import HostReport
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.session import Event, Outcome, Session, State

_DAY_S = 24 * 3600.0
_EPILOG = """Without --policy, --weight and --set the other policy is tried: pack where the settings say spread, and the
other way round. A request that never ran is taken to run as long as the median of those that did; a desktop that
still runs, to the end of its lifetime. Hosts are those that the ledger holds a report of and that are not declared
dead. Requests are left out whose machine the catalogue does not offer, or not in that size. Exit status: 0 done, 2 not
possible as it is set up."""


class ReplayError(DeskfleetError):
    """Raised when there is nothing to play, or nothing to compare."""


@dataclass(frozen=True, slots=True)
class Record:
    """What the ledger holds: requests that can be played, how many can't, and the hosts."""

    requests: list[Request]
    left_out: int
    hosts: list[HostReport]


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    """Compare two policies; 0 when done, 2 with a sentence when that is not possible."""
    options = _parser().parse_args(arguments)
    try:
        policy, tried, machines, url = _settings(options)
        since = (clock or SystemClock()).wall() - options.since * _DAY_S if options.since is not None else 0.0
        record = _read(url, since, machines)
        results = [replay(record.requests, record.hosts, machines, rules) for rules in (policy, tried)]
    except (SettingsError, LedgerError, ReplayError, OSError) as error:
        print(f"deskfleet-replay: {error}", file=sys.stderr)
        return 2
    print(_json(record, policy, tried, results) if options.json else _table(record, policy, tried, results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deskfleet-replay", description="Plays recorded requests under another policy.", epilog=_EPILOG
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/deskfleet/deskfleet.toml"))
    parser.add_argument("--since", type=_days, metavar="DAYS", help="only the requests of the last so many days")
    parser.add_argument("--policy", choices=("spread", "pack"))
    parser.add_argument("--weight", type=_pair, action="append", default=[], metavar="memory=2", help="cpus, idle, too")
    parser.add_argument(
        "--set", type=_pair, action="append", default=[], metavar="KEY=VALUE", help="any key of [scheduler], a.b=c"
    )
    parser.add_argument("--json", action="store_true", help="for scripts; shares are between 0 and 1")
    return parser


def _days(text: str) -> float:
    days = float(text)
    if not 0 < days < float("inf"):
        raise argparse.ArgumentTypeError("must be more than 0")
    return days


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _settings(options: argparse.Namespace) -> tuple[Policy, Policy, Mapping[str, Machine], str]:
    """The policy as it is set, the one to try, the catalogue, the ledger's address."""
    schemas = {"scheduler": SchedulerSchema(), "ledger": LedgerSchema(), "machines": MachinesSchema()}
    settings = load(options.config, schemas, os.environ, SECTIONS)
    rules: Settings = settings["scheduler"]["settings"]
    changes = [*options.set, *((f"weights.{name}", value) for name, value in options.weight)]
    changes += [("policy", options.policy)] if options.policy else []
    tried = replace(rules.policy, spread=not rules.policy.spread)
    if changes:
        # Checked like any other settings: the environment may override each key.
        more = {f"DESKFLEET_SCHEDULER__{key.replace('.', '__').upper()}": value for key, value in changes}
        again: Settings = load(options.config, schemas, {**os.environ, **more}, SECTIONS)["scheduler"]["settings"]
        tried = again.policy
        if tried == rules.policy:
            raise ReplayError("what is to be tried changes nothing of placement or queue: there is nothing to compare")
    machines = Catalogue(Path(settings["machines"]["catalogue"])).machines()
    return rules.policy, tried, machines, settings["ledger"]["url"]


def _read(url: str, since: float, machines: Mapping[str, Machine]) -> Record:
    engine = open_engine(url, read_only=True)
    try:
        check_revision(engine)
        with engine.connect() as connection:
            sessions = _sessions(connection, since)
            held = _held(connection, since)
            hosts = [host.report for host in all_hosts(connection) if host.report and not host.dead]
    except DBAPIError as error:
        raise ReplayError(f"the ledger can't be read: {error.orig}") from None
    finally:
        engine.dispose()
    if not sessions:
        raise ReplayError("the ledger holds no request of that time" if since else "the ledger holds no request")
    if not hosts:
        raise ReplayError("the ledger holds no report of a host: there is nothing to place on")
    usable = [session for session in sessions if _offered(session, machines)]
    if not usable:
        raise ReplayError("no recorded request asks for a machine that the catalogue offers in that size")
    return Record(_requests(usable, held), len(sessions) - len(usable), hosts)


def _offered(session: Session, machines: Mapping[str, Machine]) -> bool:
    machine = machines.get(session.machine)
    return machine is not None and not machine.problems(session.resources)


def _sessions(connection: Connection, since: float) -> list[Session]:
    table = tables.session
    query = select(table).where(table.c.created_at >= since).order_by(table.c.created_at, table.c.ordinal)
    return [to_session(row) for row in connection.execute(query).mappings()]


def _held(connection: Connection, since: float) -> dict[str, float]:
    """For how many seconds each session that has ended held its last host, from the command to the end."""
    event, session = tables.session_event, tables.session
    query = (
        select(event.c.sid, event.c.at, event.c.event, event.c.state)
        .join(session, session.c.sid == event.c.sid)
        .where(session.c.created_at >= since)
        .order_by(event.c.id)
    )
    placed: dict[str, float] = {}
    held: dict[str, float] = {}
    ran: set[str] = set()
    for row in connection.execute(query):
        if row.event == Event.PLACE.value:
            placed.setdefault(row.sid, row.at)  # a command that is sent again is no new start
        elif row.state == State.QUEUED.value:
            placed.pop(row.sid, None)
        elif row.state == State.RUNNING.value:
            ran.add(row.sid)
        elif row.state == State.ENDED.value and row.sid in placed and row.sid in ran:
            held[row.sid] = max(0.0, row.at - placed[row.sid])
    return held


def _requests(sessions: Sequence[Session], held: Mapping[str, float]) -> list[Request]:
    usual = median(held.values()) if held else None
    first = sessions[0].created_at
    return [
        Request(
            _asked(session),
            session.created_at - first,
            _holds(session, held, usual),
            # Who cancelled while waiting would not have waited longer.
            max(0.0, session.changed_at - session.created_at) if _cancelled(session) else session.wait_s,
        )
        for session in sessions
    ]


def _cancelled(session: Session) -> bool:
    return session.outcome is Outcome.CANCELLED


def _holds(session: Session, held: Mapping[str, float], usual: float | None) -> float:
    if session.sid in held:
        return held[session.sid]
    if session.on_host or usual is None:
        return session.lifetime_s
    return min(usual, session.lifetime_s)


def _asked(session: Session) -> Session:
    """The session as it was asked for."""
    return Session(
        session.sid, session.user, session.machine, session.resources, session.persistent, session.lifetime_s,
        wait_s=session.wait_s, groups=session.groups,
    )  # fmt: skip


def _name(policy: Policy) -> str:
    return "spread" if policy.spread else "pack"


def _json(record: Record, policy: Policy, tried: Policy, results: Sequence[Result]) -> str:
    now, then = ({"policy": _name(rules), **r.figures()} for rules, r in zip((policy, tried), results, strict=True))
    return json.dumps(
        {
            "requests": len(record.requests),
            "left_out": record.left_out,
            "hosts": len(record.hosts),
            "span_s": round(results[0].span_s, 1),
            "as_set": now,
            "tried": then,
        }
    )


_ROWS = (
    ("placed", "placed", "{:.0f}"),
    ("refused (never fits)", "refused", "{:.0f}"),
    ("gave up waiting", "gave_up", "{:.0f}"),
    ("wait p50, s", "wait_p50_s", "{:.1f}"),
    ("wait p99, s", "wait_p99_s", "{:.1f}"),
    ("CPUs promised, mean", "cpus_mean", "{:.1%}"),
    ("CPUs promised, peak", "cpus_peak", "{:.1%}"),
    ("memory promised, mean", "memory_mean", "{:.1%}"),
    ("memory promised, peak", "memory_peak", "{:.1%}"),
    ("hosts used", "hosts_used", "{:.0f}"),
    ("hosts in use, mean", "hosts_mean", "{:.1f}"),
    ("hosts in use, peak", "hosts_peak", "{:.0f}"),
)


def _table(record: Record, policy: Policy, tried: Policy, results: Sequence[Result]) -> str:
    left_out = f" ({record.left_out} left out)" if record.left_out else ""
    span = results[0].span_s / _DAY_S
    lines = [f"{len(record.requests)} requests{left_out} of {span:.1f} days on {len(record.hosts)} hosts", ""]
    lines += [f"{'':24} {'as set':>10} {'tried':>10}", f"{'policy':24} {_name(policy):>10} {_name(tried):>10}"]
    before, after = (result.figures() for result in results)
    for title, key, shape in _ROWS:
        lines.append(f"{title:24} {shape.format(before[key]):>10} {shape.format(after[key]):>10}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
