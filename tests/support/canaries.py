"""Looks for secrets wherever a fleet leaves anything: files, their names, and what other processes can see of it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Found:
    """A secret, by the name that the test gave it, and where it was seen."""

    secret: str
    where: str


def spread(secret: str) -> list[bytes]:
    """The forms in which a secret may lie around: as it is, and in base64 at each of its three alignments."""
    text = secret.encode()
    forms = [text]
    for skipped in range(3):
        # The first and the last digits depend on the neighbours.
        forms.append(base64.b64encode(b"\0" * skipped + text)[4:-4])
    return forms


def in_text(content: bytes, where: str, secrets: Mapping[str, str]) -> list[Found]:
    """Which secrets stand in what was read somewhere."""
    return [Found(name, where) for name, secret in secrets.items() if any(form in content for form in spread(secret))]


def in_files(folder: Path, secrets: Mapping[str, str]) -> list[Found]:
    """Which secrets stand below a folder, in contents or names of files; places are told relative to it."""
    found = []
    for path in folder.rglob("*"):
        where = str(path.relative_to(folder))
        found += in_text(path.name.encode(), where, secrets)
        with contextlib.suppress(FileNotFoundError):  # lives on meanwhile
            if stat.S_ISREG(path.lstat().st_mode):
                found += in_text(path.read_bytes(), where, secrets)
    return found


def in_processes(secrets: Mapping[str, str]) -> list[Found]:
    """Which secrets the command line or the environment of any process shows."""
    found = []
    for entry in _processes():
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                content = (entry / name).read_bytes()
                found += in_text(content, f"{entry.name} {name} {content[:60]!r}", secrets)
    return found


def _processes() -> Iterator[Path]:
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid())


def outside(found: Iterable[Found], homes: Mapping[str, Iterable[str]]) -> list[Found]:
    """What lies elsewhere than in a home; `homes` are prefixes of places by the prefix of the secrets' names."""
    return [
        one
        for one in found
        if not any(
            one.secret.startswith(name) and one.where.startswith(tuple(places)) for name, places in homes.items()
        )
    ]


def unsigned(text: str) -> object:
    """What a cookie or a ticket of itsdangerous says, without asking who signed it."""
    packed = text.startswith(".")
    payload = text.removeprefix(".").partition(".")[0]
    content = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    return json.loads(zlib.decompress(content) if packed else content)
