"""What the agent remembers across its own death: one file a guest, and the highest command number it has processed.

A guest's entry is written, synced and renamed before anything is started for it, so a command that was acknowledged
can't be forgotten, and a command that comes twice is recognised.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from deskfleet.schemas.errors import DecodeError, DeskfleetError, Reason
from deskfleet.schemas.host import GuestReport, Phase
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.session import Birth, Outcome
from deskfleet.schemas.tickets import SID
from deskfleet.schemas.wire import REGISTRY, decode_as

_START = "vm.start.v1"


class JournalError(DeskfleetError):
    """Raised when the journal can't be written or read; nothing may be started then."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One guest. `start` is None for a stop that came before its start. `ready_at` and `ended_at` are seconds on
    the boot-time clock, which only means something under the same `boot_id`."""

    sid: str
    generation: int
    boot_id: str
    phase: Phase
    start: VmStart | None = None
    ran: bool = False
    ready_at: float = 0.0
    ended_at: float = 0.0
    outcome: Outcome | None = None
    reason: Reason | None = None
    detail: str = ""
    birth: Birth | None = None

    @property
    def live(self) -> bool:
        """Whether the guest may have processes and files."""
        return self.phase is not Phase.ENDED

    def report(self, now: float, viewers: int = 0) -> GuestReport:
        """The entry as others may see it, at `now` on the boot-time clock."""
        left_s = lifetime_s = None
        if self.phase is Phase.RUNNING and self.start:
            lifetime_s = self.start.lifetime_s
            left_s = max(0.0, self.ready_at + lifetime_s - now)
        return GuestReport(
            sid=self.sid,
            generation=self.generation,
            phase=self.phase,
            ran=self.ran,
            viewers=viewers,
            outcome=self.outcome,
            reason=self.reason,
            detail=self.detail[:4000],
            left_s=left_s,
            lifetime_s=lifetime_s,
            birth=self.birth,
        )


class Journal(Protocol):
    """Where entries live. Every method either took effect durably or raised JournalError."""

    def load(self) -> tuple[dict[str, Entry], int | None]:
        """All entries, and the stored command number; None when there is no journal yet."""

    def put(self, entry: Entry) -> None:
        """Store an entry, replacing the one of the same sid."""

    def forget(self, sid: str) -> None:
        """Drop an entry; no error when there is none."""

    def set_generation(self, generation: int) -> None:
        """Store the command number."""


class FileJournal:
    """A journal in a folder: `<sid>.json` each, and `host.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> tuple[dict[str, Entry], int | None]:
        """Read everything back; half-written files of a crash are removed.

        Raises:
            JournalError: an entry is damaged. It names the file: guessing could start a guest twice.
        """
        entries: dict[str, Entry] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in sorted(self._folder.iterdir()):
                if path.suffix == ".tmp":
                    path.unlink()
                elif SID.fullmatch(path.stem) and path.suffix == ".json":
                    entries[path.stem] = _from_json(json.loads(path.read_text()))
            host = self._folder / "host.json"
            stored = json.loads(host.read_text())["last_generation"] if host.exists() else None
        except OSError as error:
            raise JournalError(f"the journal {self._folder} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, DecodeError) as error:
            raise JournalError(f"the journal {self._folder} is damaged: {error}") from error
        return entries, stored

    def put(self, entry: Entry) -> None:
        """Store an entry (write, sync, rename, sync the folder)."""
        self._write(f"{entry.sid}.json", _to_json(entry))

    def forget(self, sid: str) -> None:
        """Drop an entry."""
        try:
            (self._folder / f"{sid}.json").unlink(missing_ok=True)
        except OSError as error:
            raise JournalError(f"the journal can't be written: {error.strerror}") from error

    def set_generation(self, generation: int) -> None:
        """Store the command number."""
        self._write("host.json", {"last_generation": generation})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        path = self._folder / name
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise JournalError(f"the journal can't be written: {error.strerror}") from error


def _to_json(entry: Entry) -> dict[str, Any]:
    return {
        "sid": entry.sid,
        "generation": entry.generation,
        "boot_id": entry.boot_id,
        "phase": entry.phase.value,
        "start": REGISTRY[_START].dump(entry.start) if entry.start else None,
        "ran": entry.ran,
        "ready_at": entry.ready_at,
        "ended_at": entry.ended_at,
        "outcome": entry.outcome.value if entry.outcome else None,
        "reason": entry.reason.value if entry.reason else None,
        "detail": entry.detail,
        "birth": entry.birth.value if entry.birth else None,
    }


def _from_json(data: dict[str, Any]) -> Entry:
    start = decode_as(VmStart, _START, json.dumps(data["start"]).encode()) if data["start"] else None
    entry = Entry(
        sid=data["sid"],
        generation=data["generation"],
        boot_id=data["boot_id"],
        phase=Phase(data["phase"]),
        start=start,
        ran=bool(data["ran"]),
        ready_at=float(data["ready_at"]),
        ended_at=float(data["ended_at"]),
    )
    return replace(
        entry,
        outcome=Outcome(data["outcome"]) if data["outcome"] else None,
        reason=Reason(data["reason"]) if data["reason"] else None,
        detail=str(data["detail"]),
        birth=Birth(data["birth"]) if data.get("birth") else None,
    )
