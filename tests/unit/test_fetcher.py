"""The agent's fetching with its real worker process and a real HTTP server: what counts, what is thrown away, what is
tried again, what a killed agent leaves, and what may be deleted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from marshmallow import ValidationError
from support.guests import short_folder
from support.image_source import ImageSource, image_source

from deskfleet.agent.fetch import DAY_S, Fetcher, Source
from deskfleet.agent.fetch_store import Mark, Store, StoreError, address, aged, outdated
from deskfleet.agent.images import FETCHED, Disks, ImageIndex
from deskfleet.agent.settings import AgentSchema
from deskfleet.runtime.certificates import Authority
from deskfleet.runtime.secret import Secret
from deskfleet.schemas.host import FetchFault, FetchState
from deskfleet.schemas.machine import Format
from deskfleet.schemas.messages import CatalogueImage, HostImages
from deskfleet.schemas.wire import encode

LIMIT = 60.0
RAW = os.urandom(1 << 20)
SHA256 = hashlib.sha256(RAW).hexdigest()
IMAGE = CatalogueImage(SHA256, "office.raw", Format.RAW)


def qcow2(folder: Path, *options: str, size: str = "1M") -> bytes:
    """An image that qemu-img makes."""
    path = folder / "made.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size], check=True)
    return path.read_bytes()


def told(*images: CatalogueImage, wanted: Collection[CatalogueImage] = ()) -> HostImages:
    digest = hashlib.sha256(repr(images).encode()).hexdigest()[:16]
    return HostImages("h1", digest, images, tuple(image.sha256 for image in wanted))


class Site:
    """One host's image folder, and an agent's fetching into it."""

    def __init__(self, folder: Path) -> None:
        self.images = folder / "images"
        self.images.mkdir()
        self.templates = folder / "templates"
        self.templates.mkdir()
        (folder / "disks").mkdir()
        self.index = ImageIndex(self.images, folder / "images.json")
        self.disks = Disks(folder / "disks", self.templates)
        self.store = Store(self.images)
        self.used: set[str] | None = set()
        self.now = 1000.0
        self.news = 0

    def fetcher(self, source: ImageSource | str, **changes: object) -> Fetcher:
        where = source if isinstance(source, str) else source.url
        settings = replace(Source(where), **changes)  # type: ignore[arg-type]
        return Fetcher(settings, self.store, self.index, self.disks, lambda: self.used, lambda: self.now, self.changed)

    def changed(self) -> None:
        self.news += 1

    def names(self) -> set[str]:
        return {path.name for path in (self.images / FETCHED).iterdir()} - {".lock"}


@pytest.fixture
def site() -> Iterator[Site]:
    with short_folder() as folder:
        yield Site(folder)


@pytest.fixture
def source() -> Iterator[ImageSource]:
    with image_source(content={IMAGE.file: RAW}) as running:
        yield running


@asynccontextmanager
async def working(fetcher: Fetcher) -> AsyncIterator[Fetcher]:
    task = asyncio.create_task(fetcher.keep())
    try:
        yield fetcher
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.02)


def run(work: Awaitable[None]) -> None:
    asyncio.run(work)  # type: ignore[arg-type]


def the_only(fetcher: Fetcher) -> tuple[FetchState, FetchFault | None]:
    (fetch,) = fetcher.report() or ()
    return fetch.state, fetch.fault


def test_what_is_wanted_is_fetched_counted_and_marked(site: Site, source: ImageSource) -> None:
    async def work() -> None:
        async with working(site.fetcher(source)) as fetcher:
            fetcher.told(told(IMAGE))
            assert fetcher.report() == (), "the catalogue alone makes nobody fetch"
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: SHA256 in site.index.digests())
            assert fetcher.catalogue == told(IMAGE).digest
            await until(lambda: fetcher.report() == () and not fetcher.problems() and site.news == 3)

    run(work())
    path = site.index.path(SHA256)
    assert path == site.images / FETCHED / f"{SHA256}.raw" and path.read_bytes() == RAW
    assert path.stat().st_mode & 0o777 == 0o644
    assert site.names() == {f"{SHA256}.raw", f"{SHA256}.json"}
    assert site.store.marks() == {SHA256: Mark("office.raw", Format.RAW)}
    site.index.refresh()
    remembered = json.loads((site.images.parent / "images.json").read_text())
    assert remembered[f"{FETCHED}/{SHA256}.raw"][-1] == SHA256, "it would be hashed again after a restart"
    again = ImageIndex(site.images, site.images.parent / "images.json")
    again.refresh()
    assert again.digests() == {SHA256}


def test_all_that_the_catalogue_names_is_fetched_where_that_is_set(site: Site, source: ImageSource) -> None:
    other = os.urandom(5000)
    second = CatalogueImage(hashlib.sha256(other).hexdigest(), "lab.raw", Format.RAW)
    source.content["lab.raw"] = other

    async def work() -> None:
        async with working(site.fetcher(source, prefetch=True)) as fetcher:
            fetcher.told(told(IMAGE, second))
            await until(lambda: site.index.digests() == {SHA256, second.sha256})

    run(work())


def test_progress_is_told_in_steps(site: Site, source: ImageSource) -> None:
    source.hang = len(RAW) * 2 // 3

    async def work() -> None:
        async with working(site.fetcher(source, rate_mib_s=0.4)) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            seen = set()

            def moved() -> bool:
                (fetch,) = fetcher.report() or ()
                seen.add((fetch.state, fetch.percent, fetch.mib))
                return fetch.percent > 0

            await until(moved)
            ((state, percent, mib),) = [row for row in seen if row[1]]
            assert (state, mib, percent % 5) == (FetchState.FETCHING, 1, 0) and percent <= 65

    run(work())


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        ({"content": {IMAGE.file: b"x" * 5000}}, FetchFault.WRONG_DIGEST),
        ({"content": {}}, FetchFault.REFUSED),
        ({"redirect": "file:///etc/passwd"}, FetchFault.REDIRECT),
    ],
)
def test_a_bad_source_is_said_rested_and_tried_again(
    site: Site, source: ImageSource, harm: dict[str, object], fault: FetchFault
) -> None:
    good = {name: getattr(source, name) for name in harm}
    for name, value in harm.items():
        setattr(source, name, value)

    async def work() -> None:
        async with working(site.fetcher(source)) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: the_only(fetcher) == (FetchState.FAILED, fault))
            (problem,) = fetcher.problems()
            assert problem.startswith("image office.raw can't be fetched: ")
            assert "try 1; the next one 30 s later" in problem
            asked = len(source.requests)
            site.now += 29.0
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await asyncio.sleep(0.3)
            assert len(source.requests) == asked, "it did not rest"
            site.now += 2.0
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: "try 2; the next one 60 s later" in "".join(fetcher.problems()))
            for name, value in good.items():
                setattr(source, name, value)
            site.now += 61.0
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: SHA256 in site.index.digests())

    run(work())


def test_wrong_bytes_are_thrown_away_and_half_of_the_right_ones_are_not(site: Site, source: ImageSource) -> None:
    source.content[IMAGE.file] = b"x" * len(RAW)

    async def work() -> None:
        async with working(site.fetcher(source)) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: the_only(fetcher) == (FetchState.FAILED, FetchFault.WRONG_DIGEST))
            assert site.names() == set() and site.index.digests() == set()
            source.content[IMAGE.file], source.cut = RAW, len(RAW) // 2
            site.now += 31
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: the_only(fetcher) == (FetchState.FAILED, FetchFault.INCOMPLETE))
            assert site.names() == {f".{SHA256}.part", f".{SHA256}.json"}

    run(work())


def test_a_source_that_hangs_holds_nothing_up_for_ever(site: Site, source: ImageSource) -> None:
    source.hang = 1000

    async def work() -> None:
        async with working(site.fetcher(source, stall_s=1.5)) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: the_only(fetcher) == (FetchState.FAILED, FetchFault.STALLED))

    run(work())
    assert not [child for child in psutil.Process().children() if "fetch_worker" in " ".join(child.cmdline())]


def test_https_by_an_authority_of_ones_own_and_by_no_other(site: Site) -> None:
    keys = site.images.parent / "keys"
    keys.mkdir()
    authority = Authority(keys, "Images")
    cert, key = authority.issue("localhost", "serverAuth")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)

    async def work() -> None:
        with image_source(tls=server, content={IMAGE.file: RAW}) as source:
            async with working(site.fetcher(source)) as fetcher:
                fetcher.told(told(IMAGE, wanted=[IMAGE]))
                await until(lambda: the_only(fetcher) == (FetchState.FAILED, FetchFault.UNREACHABLE))
                assert "TLS" in fetcher.problems()[0] and source.requests == []
            async with working(site.fetcher(source, ca=str(authority.certificate))) as fetcher:
                fetcher.told(told(IMAGE, wanted=[IMAGE]))
                await until(lambda: SHA256 in site.index.digests())

    run(work())


def test_a_shared_folder_is_a_source_too(site: Site) -> None:
    shared = site.images.parent / "shared"
    shared.mkdir()
    (shared / IMAGE.file).symlink_to("/etc/passwd")

    async def work() -> None:
        async with working(site.fetcher(str(shared))) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: the_only(fetcher) == (FetchState.FAILED, FetchFault.UNREACHABLE))
            (shared / IMAGE.file).unlink()
            (shared / IMAGE.file).write_bytes(RAW)
            (shared / IMAGE.file).chmod(0o600)  # guests need not be able to read it there
            site.now += 31
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: SHA256 in site.index.digests())

    run(work())


def test_c24_an_image_that_points_elsewhere_never_counts_though_its_digest_is_right(
    site: Site, source: ImageSource
) -> None:
    folder = site.images.parent
    canary = folder / "canary"
    canary.write_bytes(b"canary" * 1000)
    bad = {
        "backing.qcow2": (Format.QCOW2, qcow2(folder, "-u", "-F", "raw", "-b", str(canary))),
        "renamed.raw": (Format.RAW, qcow2(folder)),
    }
    for file, (kind, content) in bad.items():
        image = CatalogueImage(hashlib.sha256(content).hexdigest(), file, kind)
        source.content[file] = content

        async def work(image: CatalogueImage = image) -> None:
            async with working(site.fetcher(source)) as fetcher:
                fetcher.told(told(image, wanted=[image]))
                await until(lambda: the_only(fetcher) == (FetchState.FAILED, FetchFault.IMAGE_BAD))

        run(work())
        assert site.names() == set() and site.index.digests() == set()


def test_c25_an_image_of_absurd_size_never_counts(site: Site, source: ImageSource) -> None:
    content = qcow2(site.images.parent, size="1P")
    image = CatalogueImage(hashlib.sha256(content).hexdigest(), "huge.qcow2", Format.QCOW2)
    source.content[image.file] = content

    async def work() -> None:
        async with working(site.fetcher(source)) as fetcher:
            fetcher.told(told(image, IMAGE, wanted=[image, IMAGE]))
            await until(lambda: SHA256 in site.index.digests())  # the next one is not held up
            assert the_only(fetcher) == (FetchState.FAILED, FetchFault.IMAGE_BAD)
            assert "too_large" in fetcher.problems()[0]

    run(work())
    assert site.index.digests() == {SHA256}


def test_c28_no_room_is_said_before_a_byte_is_fetched(site: Site, source: ImageSource) -> None:
    async def work() -> None:
        async with working(site.fetcher(source, room_mib=1 << 30)) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: the_only(fetcher) == (FetchState.FAILED, FetchFault.NO_SPACE))
            assert "MiB are free in the image folder" in fetcher.problems()[0]

    run(work())
    assert source.requests == [] and site.names() == set()


def test_c28_a_disk_without_a_byte_left_is_given_back_what_was_fetched(
    site: Site, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(site.store, "describe", full)

    async def work() -> None:
        async with working(site.fetcher(source)) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: the_only(fetcher) == (FetchState.FAILED, FetchFault.NO_SPACE))

    run(work())
    assert site.names() == set()


def test_an_image_folder_has_one_agent_that_fetches(site: Site, source: ImageSource) -> None:
    other = Store(site.images)
    other.open()

    async def work() -> None:
        async with working(site.fetcher(source, first_s=0.1)) as fetcher:
            await until(lambda: "another agent fetches into" in "".join(fetcher.problems()))
            assert fetcher.report() is None, "it must not seem to be able to"
            other.close()
            await until(lambda: fetcher.report() == ())

    run(work())
    (site.images / FETCHED / ".lock").unlink()
    (site.images / FETCHED).rename(site.images / "elsewhere")
    (site.images / FETCHED).symlink_to(site.images / "elsewhere")
    with pytest.raises(StoreError, match="is a link"):
        Store(site.images).open()


def test_what_the_catalogue_no_longer_names_is_not_fetched_on(site: Site, source: ImageSource) -> None:
    source.hang = 1000

    async def work() -> None:
        async with working(site.fetcher(source)) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(source.hanging.is_set)
            fetcher.told(told())
            await until(lambda: site.names() == set() and fetcher.report() == ())

    run(work())


def test_file_names_are_data(source: ImageSource) -> None:
    assert address("/srv/images/", "a.iso") == "/srv/images/a.iso"
    for name in ("../a.iso", "a/b", "", ".hidden", "a?b", "a\nb", "-x"):
        with pytest.raises(ValueError, match="not a file name"):
            address("https://h/images", name)


_AGENT = """
import asyncio, json, sys
from pathlib import Path
from deskfleet.agent.fetch import Fetcher, Source
from deskfleet.agent.fetch_store import Store
from deskfleet.agent.images import Disks, ImageIndex
from deskfleet.schemas.wire import decode
folder, url, kind, body = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
async def main():
    index = ImageIndex(folder / "images", folder / "images.json")
    fetcher = Fetcher(Source(url), Store(folder / "images"), index, Disks(folder / "disks", folder / "templates"),
                      set, asyncio.get_running_loop().time, lambda: None)
    fetcher.told(decode(kind, body.encode()))
    await fetcher.keep()
asyncio.run(main())
"""


def test_kill_9_in_the_middle_of_a_fetch_and_the_next_agent_goes_on_with_it(site: Site, source: ImageSource) -> None:
    source.hang = len(RAW) * 3 // 4
    line = [sys.executable, "-c", _AGENT, str(site.images.parent), source.url]
    kind, body = encode(told(IMAGE, wanted=[IMAGE]))
    agent = subprocess.Popen([*line, kind, body.decode()])
    part = site.images / FETCHED / f".{SHA256}.part"

    async def half_there() -> None:
        await until(lambda: part.exists() and part.stat().st_size == source.hang)
        await until(lambda: part.with_name(f".{SHA256}.json").exists())

    run(half_there())
    (worker,) = psutil.Process(agent.pid).children()
    assert worker.nice() == 19 and worker.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    if os.geteuid() == 0:
        assert worker.uids().effective == 65_534
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    source.hang = None

    async def work() -> None:
        async with working(site.fetcher(source)) as fetcher:
            # Nobody waits for it any more; what was begun is finished for as long as the catalogue names it.
            fetcher.told(told(IMAGE))

            def here() -> bool:
                site.now += 1.0
                return SHA256 in site.index.digests()

            await until(here)

    run(work())
    assert source.ranges_asked() == ["", f"bytes={len(RAW) * 3 // 4}-"]
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.wait(LIMIT)
    assert site.names() == {f"{SHA256}.raw", f"{SHA256}.json"}


# --- settings -------------------------------------------------------------------------------------------------

HOST = {"host": "h1", "broker_url": "amqp://x", "console_address": "h1:6080"}


def test_where_images_may_come_from() -> None:
    for good in ("", "/srv/images", "http://h/images", "https://h.example.org:8443/a/b/"):
        loaded = AgentSchema().load({**HOST, "image_source": good})
        assert loaded.source.source == good and loaded.source.keep_days == 0 and not loaded.source.prefetch
    for bad in (
        "images", "ftp://h/a", "file:///srv", "https://", "https://u:p@h/", "https://h/?a", "https://h/#a",
        "https://h/a b", "https://h:99999/", "https://[/",
    ):  # fmt: skip
        with pytest.raises(ValidationError, match="must be an absolute path"):
            AgentSchema().load({**HOST, "image_source": bad})
    for pair in ({"image_source": "http://h/", "image_token": "t"}, {"image_source": "/srv", "image_token": "t"}):
        with pytest.raises(ValidationError, match="over https only"):
            AgentSchema().load({**HOST, **pair})
    with pytest.raises(ValidationError, match="at least"):
        AgentSchema().load({**HOST, "image_rate_mib_s": 0.01})


# --- what may be deleted ----------------------------------------------------------------------------------------


def test_only_what_is_unused_and_unnamed_for_long_enough_may_go() -> None:
    marks = {"a": Mark("a", Format.RAW, 10.0), "b": Mark("b", Format.RAW, 9.0), "c": Mark("c", Format.RAW, 11.0)}
    assert outdated(marks, {"c"}, 10.0) == ["a"]
    assert outdated(marks, set(), 0.0) == [], "0 keeps everything"
    assert aged(marks, {"a"}, 5.0) == {"a": Mark("a", Format.RAW, 0.0), "b": Mark("b", Format.RAW, 14.0),
                                       "c": Mark("c", Format.RAW, 16.0)}  # fmt: skip


def test_an_old_image_goes_once_nobody_uses_or_names_it_and_its_time_is_over(site: Site, source: ImageSource) -> None:
    mine = site.images / "old.raw"  # an administrator's, which nobody names either
    mine.write_bytes(b"mine")
    stray = site.images / FETCHED / f"{'5' * 64}.raw"  # without a mark
    newer = CatalogueImage("1" * 64, "office-2.raw", Format.RAW)
    template = site.templates / f"{SHA256}-raw-1-abc.qcow2"

    async def work() -> None:
        fetcher = site.fetcher(source, keep_days=2)
        async with working(fetcher):
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(lambda: SHA256 in site.index.digests())
        stray.write_bytes(b"stray")
        template.write_bytes(b"")
        fetched = site.index.path(SHA256)

        async def gone_after(days: float) -> bool:
            await fetcher.collect(days * DAY_S)
            return not fetched.exists()

        assert not await gone_after(9), "the catalogue names it"
        fetcher.told(told())
        assert not await gone_after(9), "an empty catalogue says nothing"
        fetcher.told(told(newer))
        assert not await gone_after(1.5)
        fetcher.told(told(newer, IMAGE))
        assert not await gone_after(1), "it was named again"
        fetcher.told(told(newer))
        assert not await gone_after(1.5), "the time counts anew"
        site.used = {SHA256}
        assert not await gone_after(9), "a guest's disk is on top of it"
        site.used = None
        assert not await gone_after(9), "nobody knows what a disk is on top of"
        site.used = {"2" * 64}
        assert template.exists()
        assert await gone_after(0)
        assert site.index.digests() == set() and not template.exists()

    run(work())
    assert mine.exists() and stray.exists() and site.store.marks() == {}


def test_a_damaged_mark_keeps_its_image(site: Site) -> None:
    site.store.open()
    for text in ("", "[]", "{}", json.dumps({"file": "a", "format": "exe", "unnamed_s": 1})):
        (site.images / FETCHED / f"{SHA256}.json").write_text(text)
        assert site.store.marks() == {}
    site.store.close()


def test_the_token_is_in_no_process_list(site: Site, source: ImageSource) -> None:
    source.hang = 1000

    async def work() -> None:
        async with working(site.fetcher(source, token=Secret("t0ken-of-the-source"))) as fetcher:
            fetcher.told(told(IMAGE, wanted=[IMAGE]))
            await until(source.hanging.is_set)
            (worker,) = psutil.Process().children()
            shown = Path(f"/proc/{worker.pid}/cmdline").read_bytes() + Path(f"/proc/{worker.pid}/environ").read_bytes()
            assert b"fetch_worker" in shown and b"t0ken" not in shown
        assert source.requests[0][1]["Authorization"] == "Bearer t0ken-of-the-source"

    run(work())
