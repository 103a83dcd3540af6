"""What hosts had over time: a sample a minute for a day, and the means of each quarter of an hour for a month.

A minute in which a host was silent has no sample: it is unknown, and a gap in the chart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import delete, func, literal, select

from deskfleet.portal import tables
from deskfleet.portal.fleet import HostView
from deskfleet.portal.store import Store, upsert
from deskfleet.portal.tables import FIGURES
from deskfleet.runtime.service import Clock

_MINUTE, _QUARTER = 60, 900
_DAY = 24 * 3600
#: How many seconds the samples of each step are kept.
_KEPT = {_MINUTE: _DAY + 2 * _QUARTER, _QUARTER: 31 * _DAY}


class Span(StrEnum):
    """How far back a chart goes."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


#: Length and step of each, in seconds.
_SPANS = {Span.HOUR: (3600, _MINUTE), Span.DAY: (_DAY, _MINUTE), Span.MONTH: (30 * _DAY, _QUARTER)}


@dataclass(frozen=True, slots=True)
class Series:
    """A host's figures at regular times (UNIX seconds, `step` seconds apart); None where nothing is known."""

    step: int
    times: list[int]
    figures: dict[str, list[float | None]]


class History:
    """Keeps the figures of hosts. Several portals on one database keep them once."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def due(self) -> bool:
        """Whether nobody has sampled this minute yet."""
        at = self._slot(_MINUTE)
        query = select(literal(1)).where(tables.sample.c.step == _MINUTE, tables.sample.c.at == at).limit(1)
        with self._store.reading() as connection:
            return connection.execute(query).first() is None

    def keep(self, hosts: Iterable[HostView], gpus_used: Mapping[str, int]) -> None:
        """Keep what the hosts report now, and the means of the quarters of an hour that are over."""
        at = self._slot(_MINUTE)
        rows = [
            {
                "host": host.name,
                "step": _MINUTE,
                "at": at,
                "guests": host.guests,
                "gpus": len(report.gpus),
                "gpus_used": gpus_used.get(host.name, 0),
                **{name: getattr(report, name) for name in FIGURES[:6]},
            }
            for host in hosts
            if (report := host.report)
        ]
        with self._store.writing() as connection:
            if rows:
                connection.execute(upsert(connection, tables.sample).on_conflict_do_nothing(), rows)
            column = tables.sample.c
            newest = connection.scalar(select(func.max(column.at)).where(column.step == _QUARTER))
            quarter = (column.at - column.at % _QUARTER).label("quarter")
            means = (
                select(column.host, literal(_QUARTER), quarter, *(func.avg(column[name]) for name in FIGURES))
                .where(column.step == _MINUTE, column.at < self._slot(_QUARTER))
                .where(column.at >= (0 if newest is None else newest + _QUARTER))
                .group_by(column.host, quarter)
            )
            into = upsert(connection, tables.sample).from_select(["host", "step", "at", *FIGURES], means)
            connection.execute(into.on_conflict_do_nothing())

    def of(self, host: str, span: Span) -> Series:
        """The figures of a host up to now."""
        length, step = _SPANS[span]
        # What is not over, or not sampled yet, is left out: a chart should not end in a gap that is none.
        end = self._slot(step)
        begin = end - length
        column = tables.sample.c
        query = select(tables.sample).where(
            column.host == host, column.step == step, column.at >= begin, column.at <= end
        )
        with self._store.reading() as connection:
            found = {row["at"]: row for row in connection.execute(query).mappings()}
        times = list(range(begin, end + (end in found) * step, step))
        return Series(
            step,
            times,
            {name: [round(found[at][name], 2) if at in found else None for at in times] for name in FIGURES},
        )

    def prune(self) -> None:
        """Forget what is too old."""
        column = tables.sample.c
        with self._store.writing() as connection:
            for step, kept_s in _KEPT.items():
                old = delete(tables.sample).where(column.step == step, column.at < self._clock.wall() - kept_s)
                connection.execute(old)

    def _slot(self, step: int) -> int:
        """When the step of now began."""
        return math.floor(self._clock.wall() / step) * step
