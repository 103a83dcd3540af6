"""Hosts that fail launches rest for a while, so that they don't eat one request after the other. Pure.

What rests is a host for one machine image: a broken image fails everywhere, and must not take every host out of
service for everybody. A host that rests for two images rests for all of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from deskfleet.scheduler.policy import Rest


@dataclass(slots=True)
class _Record:
    """One image on one host. `until` is when its rest ends; `rests` counts them; `probe` is the session that tries."""

    failures: list[float] = field(default_factory=list)
    rests: int = 0
    until: float = 0.0
    probe: str = ""


@dataclass(slots=True)
class Resting:
    """What one host has failed at lately; times are monotonic seconds."""

    _records: dict[str, _Record] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._records)

    def failed(self, image: str, sid: str, now: float, rule: Rest) -> bool:
        """A start failed; true when the host begins to rest now. A failed try makes the next rest twice as long."""
        record = self._records.setdefault(image, _Record())
        record.failures = [at for at in record.failures if now - at < rule.window_s] + [now]
        tried = record.probe == sid and record.rests > 0
        record.probe = "" if record.probe == sid else record.probe
        if not tried and (now < record.until or len(record.failures) < rule.failures):
            return False
        record.until = now + min(rule.longest_s, rule.first_s * 2.0**record.rests)
        record.rests += 1
        record.failures.clear()
        return True

    def worked(self, image: str) -> None:
        """A start went well: what was held against the host for this image is forgotten."""
        self._records.pop(image, None)

    def tries(self, image: str, sid: str, now: float) -> None:
        """A launch was placed here: after a rest it is the one that tries, and others wait for what becomes of it."""
        for record in self._counting(image):
            if record.rests and now >= record.until and not record.probe:
                record.probe = sid

    def over(self, sid: str) -> None:
        """A session left the host without a verdict (it was stopped, say): another one may try."""
        for record in self._records.values():
            if record.probe == sid:
                record.probe = ""

    def keep(self, sids: Collection[str]) -> None:
        """Only these sessions are on the host: no other can be the one that tries."""
        for record in self._records.values():
            if record.probe not in sids:
                record.probe = ""

    def left_s(self, image: str, now: float) -> float | None:
        """For how many seconds the host still rests for this image; 0 while a launch tries it, None when it is open."""
        longest: float | None = None
        for record in self._counting(image):
            if not record.rests:
                continue
            if now < record.until:
                longest = max(longest or 0.0, record.until - now)
            elif record.probe:
                longest = longest or 0.0
        return longest

    def _counting(self, image: str) -> list[_Record]:
        """The records that count for an image: its own, and all of them when two images rest here."""
        resting = [record for record in self._records.values() if record.rests]
        if len(resting) >= 2:
            return resting
        own = self._records.get(image)
        return [own] if own else []
