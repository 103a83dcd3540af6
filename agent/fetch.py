"""Which image is fetched next, how far it is, and what to do when it fails. One at a time.

The scheduler tells which images the catalogue names and which of them are wanted here; an image that was begun is
finished for as long as the catalogue names it. The work itself is a process of its own (fetch_worker.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deskfleet.agent.fetch_store import Store, StoreError, address, aged, outdated
from deskfleet.agent.fetch_worker import FetchFailed, Job
from deskfleet.agent.images import Disks, ImageIndex
from deskfleet.runtime.inspection import open_image, second_opinion
from deskfleet.runtime.secret import Secret
from deskfleet.schemas.host import MOST_FETCHES, STEP, Fetch, FetchFault, FetchState
from deskfleet.schemas.image_facts import ImageRefused
from deskfleet.schemas.messages import CatalogueImage, HostImages

log = logging.getLogger(__name__)

#: What these faults leave is of no use, and the next try costs the whole image: it has time.
_THROWN_AWAY = frozenset({FetchFault.WRONG_DIGEST, FetchFault.NO_SPACE, FetchFault.IMAGE_BAD})
WORKER = (sys.executable, "-I", "-m", "deskfleet.agent.fetch_worker")
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where images come from, and how. `source` is a URL or a folder ("" = nowhere); `rate_mib_s` 0 is no limit;
    `room_mib` stays free; `prefetch` takes all that the catalogue names. Times in seconds: a worker that makes no
    headway for `stall_s` is ended; after a failure comes a rest of `first_s`, twice as long each further time."""

    source: str = ""
    ca: str = ""
    token: Secret | None = None
    rate_mib_s: float = 0.0
    room_mib: int = 0
    prefetch: bool = False
    keep_days: float = 0.0
    stall_s: float = 120.0
    first_s: float = 30.0
    longest_s: float = 300.0
    longest_thrown_away_s: float = 3600.0
    collect_s: float = 600.0


@dataclass(slots=True)
class _Try:
    """What is known of an image that is to be fetched; `at` is when it may be tried (monotonic seconds)."""

    tries: int = 0
    at: float = 0.0
    done: int = 0
    total: int = 0
    fault: FetchFault | None = None
    detail: str = ""


class Fetcher:
    """Fetches images for one host. `used` gives the digests that guests' disks are on top of, None when that can't be
    told; `changed` hears when there is news for the scheduler."""

    def __init__(
        self,
        source: Source,
        store: Store,
        index: ImageIndex,
        disks: Disks,
        used: Callable[[], Collection[str] | None],
        now: Callable[[], float],
        changed: Callable[[], None],
        worker: Sequence[str] = WORKER,
    ) -> None:
        self._source = source
        self._store = store
        self._index = index
        self._disks = disks
        self._used = used
        self._now = now
        self._changed = changed
        self._worker = worker
        self._named: dict[str, CatalogueImage] = {}
        self._wanted: tuple[str, ...] = ()
        self._begun: set[str] = set()
        self._tries: dict[str, _Try] = {}
        self._at_work: tuple[str, asyncio.Task[None]] | None = None
        self._wake = asyncio.Event()
        #: Names the list of images that the scheduler told last.
        self.catalogue = ""
        #: Why nothing can be fetched at all; empty when it can.
        self.problem = ""

    # --- what others see ------------------------------------------------------------------------------------

    def report(self) -> tuple[Fetch, ...] | None:
        """What is being fetched, waits, or could not be fetched; None when nothing ever is."""
        if not self._source.source or self.problem:
            return None
        return tuple(self._seen(sha256) for sha256 in self._order()[:MOST_FETCHES])

    def problems(self) -> tuple[str, ...]:
        """What administrators should know."""
        failed = [
            f"image {self._named[sha256].file} can't be fetched: {state.detail}"[:400]
            for sha256, state in self._tries.items()
            if state.fault and sha256 in self._named
        ]
        return (*([self.problem] if self.problem else []), *failed[:20])

    def _seen(self, sha256: str) -> Fetch:
        state = self._tries.get(sha256, _Try())
        at_work = self._at_work is not None and self._at_work[0] == sha256
        kind = FetchState.FETCHING if at_work else FetchState.FAILED if state.fault else FetchState.WAITING
        percent = state.done * 100 // state.total // STEP * STEP if state.total else 0
        fault, detail = (None, "") if at_work else (state.fault, state.detail)
        return Fetch(sha256, kind, min(100, percent), state.total >> 20, fault, detail)

    def _order(self) -> list[str]:
        """What is to be fetched: what people wait for, what was begun, and all else where that is set."""
        asked = [*self._wanted, *sorted(self._begun), *(self._named if self._source.prefetch else ())]
        held = self._index.digests()
        return [sha256 for sha256 in dict.fromkeys(asked) if sha256 in self._named and sha256 not in held]

    # --- what is to be done ---------------------------------------------------------------------------------

    def told(self, message: HostImages) -> None:
        """The scheduler says what the catalogue names, and what is wanted here."""
        self._named = {image.sha256: image for image in message.images}
        self._wanted = message.wanted
        news = self.catalogue != message.digest
        self.catalogue = message.digest
        for sha256 in self._tries.keys() - self._named.keys():
            del self._tries[sha256]
        if self._at_work and self._at_work[0] not in self._named:
            self._at_work[1].cancel()
        self._wake.set()
        if news:
            self._changed()

    async def keep(self) -> None:
        """Fetch what is to be fetched, until cancelled."""
        if not self._source.source:
            return
        while not await self._open():
            await asyncio.sleep(self._source.first_s)
        collecting = asyncio.create_task(self._keep_clean())
        try:
            while True:
                self._wake.clear()
                due, wait_s = self._next()
                if due is None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), wait_s)
                    continue
                await self._try(due)
        finally:
            collecting.cancel()
            self._store.close()

    async def _open(self) -> bool:
        try:
            await asyncio.to_thread(self._store.open)
            self._begun = await asyncio.to_thread(self._store.halves)
        except (StoreError, OSError) as error:
            if self.problem != str(error)[:400]:
                log.error("%s", error)
            self.problem = str(error)[:400]
            return False
        self.problem = ""
        return True

    def _next(self) -> tuple[CatalogueImage | None, float]:
        """The next image that may be tried now, else in how many seconds to look again."""
        now, wait_s = self._now(), 60.0
        for sha256 in self._order():
            at = self._tries[sha256].at if sha256 in self._tries else now
            if at <= now:
                return self._named[sha256], 0.0
            wait_s = min(wait_s, at - now)
        return None, wait_s

    async def _try(self, image: CatalogueImage) -> None:
        state = self._tries.setdefault(image.sha256, _Try())
        self._begun.add(image.sha256)
        task = asyncio.create_task(self._fetch(image, state))
        self._at_work = image.sha256, task
        self._changed()
        before = state.done
        try:
            await task
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            ending = asyncio.current_task()
            if ending and ending.cancelling():
                raise  # the agent ends; the next one goes on with what is there
            await self._give_up(image.sha256)
        except BlockingIOError:
            state.at = self._now() + 1.0
        except (FetchFailed, OSError) as error:
            headway = state.done > before
            await self._failed(image, state, _fault(error), str(error), headway=headway)
        else:
            self._begun.discard(image.sha256)
            del self._tries[image.sha256]
            log.info("image %s (%s) is here", image.file, image.sha256[:12])
        finally:
            self._at_work = None
        self._changed()

    async def _failed(self, image: CatalogueImage, state: _Try, fault: FetchFault, text: str, *, headway: bool) -> None:
        useless = fault in _THROWN_AWAY
        if useless:
            await self._give_up(image.sha256)
            state.done = 0
        source = self._source
        state.tries = 1 if headway and not useless else state.tries + 1
        longest = source.longest_thrown_away_s if useless else source.longest_s
        rest = min(longest, source.first_s * 2.0 ** min(state.tries - 1, 20))
        state.at, state.fault = self._now() + rest, fault
        state.detail = f"{text[:300]} (try {state.tries}; the next one {rest:.0f} s later)"
        log.warning("image %s can't be fetched: %s: %s", image.file, fault, state.detail)

    async def _give_up(self, sha256: str) -> None:
        self._begun.discard(sha256)
        await asyncio.to_thread(self._store.discard, sha256)

    # --- one image ------------------------------------------------------------------------------------------

    async def _fetch(self, image: CatalogueImage, state: _Try) -> None:
        """Fetch an image, look at it, and put it where it counts.

        Raises:
            FetchFailed, OSError: it did not work.
        """
        source = self._source
        begun = await asyncio.to_thread(self._store.begin, image.sha256, source.source)
        try:
            most = begun.size + await asyncio.to_thread(self._store.room) - (source.room_mib << 20)
            if most <= begun.size:
                raise FetchFailed(FetchFault.NO_SPACE, f"less than {source.room_mib} MiB are free in the image folder")
            job = Job(
                source=address(source.source, image.file),
                part_fd=begun.fd,
                sha256=image.sha256,
                validator=begun.validator,
                most_bytes=most,
                rate=source.rate_mib_s * (1 << 20),
                ca=source.ca,
                token=source.token.reveal() if source.token else "",
            )
            await self._work(job, image, state)
            os.fchmod(begun.fd, 0o644)
            await asyncio.to_thread(_inspect, begun.path, image)
            await asyncio.to_thread(self._store.publish, image)
            self._index.vouch(self._store.name(image), image.sha256)
        finally:
            os.close(begun.fd)

    async def _work(self, job: Job, image: CatalogueImage, state: _Try) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._worker,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[job.part_fd],
            cwd="/",
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        try:
            with contextlib.suppress(ConnectionError):  # it has ended, and said why, or nothing
                process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
                await process.stdin.drain()
            while True:
                words = await self._line(process.stdout)
                if "validator" in words:
                    validator = str(words["validator"])
                    await asyncio.to_thread(self._store.describe, image.sha256, self._source.source, validator)
                state.total = _size(words.get("total"), state.total)
                state.done = _size(words.get("done"), state.done)
                if words.get("ok") is True:
                    return
                if "fault" in words:
                    raise FetchFailed(FetchFault(words["fault"]), str(words.get("text")))
        except (ValueError, TypeError):
            raise FetchFailed(FetchFault.INCOMPLETE, "the process that fetches said what makes no sense") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _line(self, output: asyncio.StreamReader) -> dict[str, Any]:
        try:
            line = await asyncio.wait_for(output.readline(), self._source.stall_s)
        except TimeoutError:
            text = f"nothing came for {self._source.stall_s:.0f} s"
            raise FetchFailed(FetchFault.STALLED, text) from None
        if not line:
            raise FetchFailed(FetchFault.INCOMPLETE, "the process that fetches has ended")
        words = json.loads(line)
        if not isinstance(words, dict):
            raise TypeError
        return words

    # --- what is no longer needed ---------------------------------------------------------------------------

    async def _keep_clean(self) -> None:
        before = self._now()
        while True:
            await asyncio.sleep(self._source.collect_s)
            elapsed, before = self._now() - before, self._now()
            try:
                await self.collect(elapsed)
            except OSError as error:
                log.warning("fetched images can't be cleaned up: %s", error.strerror)

    async def collect(self, elapsed: float) -> None:
        """Count for how long the catalogue has not named what is here, and delete what had its time. A catalogue that
        is not known, or empty, says nothing about any image."""
        if not self._named:
            return
        for sha256 in (self._begun | self._store.halves()) - self._named.keys():
            await self._give_up(sha256)
        marks = await asyncio.to_thread(self._store.marks)
        for sha256, mark in aged(marks, self._named, elapsed).items():
            await asyncio.to_thread(self._store.write, sha256, mark)
            marks[sha256] = mark
        used = self._used()
        if used is None:
            return
        # From here to the deletion nothing is awaited: no guest can start on it meanwhile.
        for sha256 in outdated(marks, used, self._source.keep_days * DAY_S):
            log.info("image %s (%s) is no longer needed", marks[sha256].file, sha256[:12])
            self._index.forget(self._store.name(CatalogueImage(sha256, marks[sha256].file, marks[sha256].format)))
            self._disks.forget(sha256)
            self._store.delete(sha256, marks[sha256])
            self._changed()


def _fault(error: FetchFailed | OSError) -> FetchFault:
    if isinstance(error, FetchFailed):
        return error.fault
    return FetchFault.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else FetchFault.UNWRITABLE


def _size(told: object, before: int) -> int:
    return told if isinstance(told, int) and 0 <= told < 1 << 50 else before


def _inspect(path: Path, image: CatalogueImage) -> None:
    try:
        with open_image(path) as file:
            second_opinion(file, file.facts(image.format))
    except ImageRefused as refused:
        raise FetchFailed(FetchFault.IMAGE_BAD, f"{refused.fault}: {refused}") from None
