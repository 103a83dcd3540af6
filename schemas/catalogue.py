"""The catalogue folder, read again when a file in it changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from deskfleet.schemas.errors import MachineError
from deskfleet.schemas.machine import Machine, load_catalogue

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_PICTURE = 512 * 1024


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
        seen = self._look()
        if seen != self._seen:
            self._machines, self.errors = load_catalogue(self._folder)
            self._seen = seen
        return self._machines

    def _look(self) -> frozenset[tuple[str, int, int]]:
        # Pages that poll come by here, so not by Path.glob, which takes several times as long.
        found = set()
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(".toml"):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        found.add((entry.name, status.st_size, status.st_mtime_ns))
        return frozenset(found)

    def pictures(self) -> frozenset[str]:
        """The machines that have a picture: NAME.png beside NAME.toml."""
        return frozenset(path.stem for path in self._folder.glob("*.png"))

    def picture(self, name: str) -> bytes | None:
        """The picture of a machine; None when there is none, or what lies there is no PNG of at most 512 KiB."""
        if name not in self.machines():
            return None
        try:
            with (self._folder / f"{name}.png").open("rb") as file:
                png = file.read(_MOST_PICTURE + 1)
        except OSError:
            return None
        return png if png.startswith(_PNG) and len(png) <= _MOST_PICTURE else None
