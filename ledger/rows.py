"""Rows to domain types and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import RowMapping

from deskfleet.schemas.errors import DecodeError, Reason
from deskfleet.schemas.host import Host, HostReport
from deskfleet.schemas.session import Birth, Outcome, Resources, Session, State
from deskfleet.schemas.verdict import Verdict
from deskfleet.schemas.wire import decode_as

_HEARTBEAT = "host.heartbeat.v1"


def to_session(row: RowMapping) -> Session:
    """The session that a row of the session table holds."""
    return Session(
        sid=row["sid"],
        user=row["user"],
        machine=row["machine"],
        resources=Resources(row["cpus"], row["memory_mib"], row["disk_gib"], row["gpus"], row["gpu_model"]),
        persistent=bool(row["persistent"]),
        lifetime_s=row["lifetime_s"],
        state=State(row["state"]),
        outcome=Outcome(row["outcome"]) if row["outcome"] else None,
        reason=Reason(row["reason"]) if row["reason"] else None,
        detail=row["detail"],
        host=row["host"],
        generation=row["generation"],
        attempt=row["attempt"],
        gpu_addresses=tuple(json.loads(row["gpu_addresses"])),
        wait_s=row["wait_s"],
        waited_s=row["waited_s"],
        groups=tuple(json.loads(row["groups"])),
        queue_class=row["queue_class"],
        birth=Birth(row["birth"]) if row["birth"] else None,
        created_at=row["created_at"],
        changed_at=row["changed_at"],
    )


def session_values(session: Session) -> dict[str, Any]:
    """The columns that change in a session's life."""
    return {
        "state": session.state.value,
        "outcome": session.outcome.value if session.outcome else None,
        "reason": session.reason.value if session.reason else None,
        "detail": session.detail,
        "host": session.host,
        "generation": session.generation,
        "attempt": session.attempt,
        "gpu_addresses": json.dumps(session.gpu_addresses),
        "waited_s": session.waited_s,
        "lifetime_s": session.lifetime_s,
        "birth": session.birth.value if session.birth else "",
        "changed_at": session.changed_at,
    }


def to_host(row: RowMapping, *, with_report: bool = True) -> Host:
    """The host that a row holds. A stored report of an older shape counts as none: the next heartbeat mends it."""
    report = _report(row) if with_report and row["report"] else None
    return Host(
        name=row["name"],
        generation=row["generation"],
        draining=bool(row["draining"]),
        dead=bool(row["dead"]),
        message=row["message"],
        seen_at=row["seen_at"],
        report=report,
    )


def _report(row: RowMapping) -> HostReport | None:
    try:
        report = decode_as(HostReport, _HEARTBEAT, row["report"].encode())
    except DecodeError:
        return None
    if not row["figures"]:
        return report
    load1, memory_free_mib, disk_free_mib = json.loads(row["figures"])
    return replace(report, load1=load1, memory_free_mib=memory_free_mib, disk_free_mib=disk_free_mib)


def figures_text(report: HostReport) -> str:
    """What a small heartbeat changes of a report, as stored beside it."""
    return json.dumps([report.load1, report.memory_free_mib, report.disk_free_mib])


def verdicts_text(verdicts: Sequence[Verdict]) -> str:
    """Verdicts as stored with a session."""
    return json.dumps([[v.host, v.reason.value, v.detail] for v in verdicts])


def to_verdicts(row: RowMapping) -> tuple[Verdict, ...]:
    """The verdicts of the last placement try."""
    return tuple(Verdict(host, Reason(reason), detail) for host, reason, detail in json.loads(row["verdicts"]))
