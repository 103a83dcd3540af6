"""The catalogue folder, read again when a file in it changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deskfleet.schemas.errors import MachineError
from deskfleet.schemas.machine import Machine, load_catalogue


class Catalogue:
    """The machines of one folder. Cheap to ask: files are parsed again only when name, size or time changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: frozenset[tuple[str, int, int]] | None = None
        self._machines: Mapping[str, Machine] = {}
        #: What is wrong with the entries that were left out.
        self.errors: list[MachineError] = []

    def machines(self) -> Mapping[str, Machine]:
        """Every valid entry by name."""
        seen = frozenset(
            (path.name, status.st_size, status.st_mtime_ns)
            for path in self._folder.glob("*.toml")
            if (status := path.stat())
        )
        if seen != self._seen:
            self._machines, self.errors = load_catalogue(self._folder)
            self._seen = seen
        return self._machines
