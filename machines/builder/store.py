"""Where images and catalogue entries go. Nothing is seen there before it is whole and on disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machines.builder.recipe import Recipe, catalogue_entry

CHUNK = 1 << 20


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Put a finished file in its place, durably: file to disk, rename, folder to disk. Same file system."""
    _sync(source)
    source.replace(target)
    _sync(target.parent)


def write(target: Path, text: str) -> None:
    """Write a small file durably, or not at all."""
    draft = target.with_name(f".{target.name}.draft")
    draft.write_text(text, encoding="utf-8")
    move(draft, target)


class Store:
    """DIR/images, DIR/catalogue, and DIR/images/.build with the lock, the stamp and the work folder of each machine.

    The work folder lies below images so that the last step is a rename, also when images is a mount of its own.
    """

    def __init__(self, out: Path) -> None:
        self.images = out / "images"
        self.catalogue = out / "catalogue"
        self._state = self.images / ".build"

    def prepare(self) -> None:
        """Make the folders."""
        for folder in (self.images, self.catalogue, self._state):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def work_folder(self, name: str, waiting: Callable[[], None], remove: Callable[[Path], None]) -> Iterator[Path]:
        """An empty folder for one build of the machine at a time; calls `waiting` when another build holds it.

        It is removed at the end, and what a killed build has left is removed at the start.
        """
        folder = self._state / f"{name}.work"
        with (self._state / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            remove(folder)
            folder.mkdir()
            try:
                yield folder
            finally:
                remove(folder)

    def _stamp(self, name: str) -> dict[str, Any]:
        try:
            stamp = json.loads((self._state / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def is_current(self, recipe: Recipe, inputs: str) -> bool:
        """Whether image and entry are there, unharmed, and made from these inputs."""
        image = self.images / recipe.file
        entry = self.catalogue / f"{recipe.name}.toml"
        stamp = self._stamp(recipe.name)
        if stamp.get("inputs") != inputs or not image.is_file() or not entry.is_file():
            return False
        digest = str(stamp.get("sha256"))
        return entry.read_text(encoding="utf-8") == catalogue_entry(recipe, digest) and file_digest(image) == digest

    def publish(self, recipe: Recipe, built: Path, inputs: str) -> str:
        """Put image, entry and stamp in place, in this order, and return the image's SHA-256.

        A crash in between leaves no stamp, so the next build does it again.
        """
        digest = file_digest(built)
        entry = catalogue_entry(recipe, digest)
        stamp = self._state / f"{recipe.name}.json"
        stamp.unlink(missing_ok=True)
        built.chmod(0o644)
        move(built, self.images / recipe.file)
        write(self.catalogue / f"{recipe.name}.toml", entry)
        write(stamp, json.dumps({"inputs": inputs, "sha256": digest}))
        return digest


class Cache:
    """Finished images by their inputs, so that a second DIR costs a copy. Keeps one image a machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, recipe: Recipe, inputs: str, to: Path) -> bool:
        """Copy the image to `to`; False when it is not there or damaged."""
        kept = self._folder / recipe.name / inputs
        try:
            digest = (kept / "sha256").read_text(encoding="utf-8")
            shutil.copyfile(kept / "image", to)
        except FileNotFoundError:
            return False
        return file_digest(to) == digest

    def keep(self, recipe: Recipe, inputs: str, built: Path) -> None:
        """Keep a copy of a finished image and drop the machine's older ones."""
        folder = self._folder / recipe.name
        draft = folder / f".{inputs}.{os.getpid()}"
        draft.mkdir(parents=True)
        try:
            shutil.copyfile(built, draft / "image")
            write(draft / "sha256", file_digest(draft / "image"))
            _sync(draft / "image")
            for older in folder.iterdir():
                if older != draft and not older.name.startswith("."):
                    shutil.rmtree(older)
            with contextlib.suppress(OSError):  # another build was faster with the same image
                draft.rename(folder / inputs)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
