"""A whole fleet for a test: started once, stopped with everything in it, and nothing may be left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from demo.__main__ import build
from demo.fleet import Fleet
from support.guests import short_folder


@contextmanager
def running_fleet(hosts: int = 2, **options: object) -> Iterator[Fleet]:
    """A fleet with the tiny machine. AssertionError when a process, an overlay or a socket outlives it."""
    with short_folder() as folder:
        fleet = Fleet(folder / "f", hosts, **options)  # type: ignore[arg-type]
        build(fleet, "tiny")
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.stop()
            left = fleet.leftovers()
        assert left == []
