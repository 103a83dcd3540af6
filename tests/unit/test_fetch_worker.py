"""Fetching one image from sources that cut, lie, hang, change and lead astray: a real HTTP server, a real file."""

from __future__ import annotations

import hashlib
import os
import resource
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.image_source import ImageSource, image_source

from deskfleet.agent.fetch_worker import FetchFailed, HttpSource, Job, fetch, open_file
from deskfleet.schemas.host import FetchFault

IMAGE = os.urandom(3 << 20) + bytes(2 << 20) + os.urandom(1000)
SHA256 = hashlib.sha256(IMAGE).hexdigest()


@pytest.fixture
def source() -> Iterator[ImageSource]:
    with image_source(content={"a.raw": IMAGE}) as running:
        yield running


class Part:
    """The file that is filled, and what was said while it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.said: list[Mapping[str, object]] = []

    @property
    def validator(self) -> str:
        return str(next((words["validator"] for words in reversed(self.said) if "validator" in words), ""))

    def job(self, source: ImageSource, **changes: object) -> Job:
        usual = Job(f"{source.url}/a.raw", self.fd, SHA256, self.validator, 1 << 30)
        return replace(usual, **changes)  # type: ignore[arg-type]

    def fetch(self, source: ImageSource, **changes: object) -> None:
        job = self.job(source, **changes)
        with closing(HttpSource(job.source, ssl.create_default_context(), job.token)) as there:
            fetch(job, there.open, self.said.append)

    def fails(self, source: ImageSource, **changes: object) -> tuple[FetchFault, str]:
        with pytest.raises(FetchFailed) as failed:
            self.fetch(source, **changes)
        return failed.value.fault, str(failed.value)


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Part]:
    made = Part(tmp_path / "part")
    yield made
    os.close(made.fd)


def test_the_file_is_the_image_with_its_holes(source: ImageSource, part: Part) -> None:
    part.fetch(source)
    assert part.path.read_bytes() == IMAGE
    assert part.path.stat().st_blocks * 512 < len(IMAGE) - (1 << 19), "zeros were written"
    assert part.said[0] == {"validator": '"one"', "total": len(IMAGE), "done": 0}
    assert part.said[-1] == {"done": len(IMAGE)}


def test_a_cut_connection_is_gone_on_with(source: ImageSource, part: Part) -> None:
    source.cut = 2_500_000
    assert part.fails(source)[0] is FetchFault.INCOMPLETE
    size = part.path.stat().st_size
    assert 0 < size <= source.cut
    source.cut = None
    part.fetch(source)
    assert part.path.read_bytes() == IMAGE
    assert source.ranges_asked() == ["", f"bytes={size}-"]
    assert source.requests[1][1]["If-Range"] == '"one"'


@pytest.mark.parametrize(
    "how", ["changed", "no ranges", "wrong range", "no validator", "weak validator", "lying range"]
)
def test_what_can_t_be_gone_on_with_starts_again(source: ImageSource, part: Part, how: str) -> None:
    source.etag = {"no validator": "", "weak validator": 'W/"one"'}.get(how, '"one"')
    source.content["a.raw"] = (old := os.urandom(len(IMAGE))) if how in ("changed", "lying range") else IMAGE
    source.cut = 2_500_000
    part.fails(source)
    source.cut, source.content["a.raw"] = None, IMAGE
    if how == "changed":
        source.etag = '"two"'
    source.ranges, source.range_shift = how != "no ranges", int(how == "wrong range")
    if how == "lying range":  # it says that nothing changed: only the digest can tell
        assert part.fails(source)[0] is FetchFault.WRONG_DIGEST
        assert part.path.read_bytes()[:1000] == old[:1000]
        return
    part.fetch(source)
    assert part.path.read_bytes() == IMAGE
    # What may not be sent back is not: a weak validator does not promise the same bytes.
    assert ("Range" in source.requests[1][1]) == ("validator" not in how)


def test_a_file_that_was_whole_already_needs_no_source(source: ImageSource, part: Part) -> None:
    part.path.write_bytes(IMAGE)
    part.said.append({"validator": '"one"'})
    source.status = 500
    part.fetch(source)
    assert source.requests == []


def test_wrong_bytes_are_told_from_a_source_that_is_away(source: ImageSource, part: Part) -> None:
    source.content["a.raw"] = os.urandom(1000)
    assert part.fails(source)[0] is FetchFault.WRONG_DIGEST
    source.content.clear()
    assert part.fails(source) == (FetchFault.REFUSED, f"the source answers 404 for http://127.0.0.1{'/images/a.raw'}")
    source.port = 1
    fault, text = part.fails(source)
    assert fault is FetchFault.UNREACHABLE and "Connection refused" in text


def test_a_length_that_is_a_lie(source: ImageSource, part: Part) -> None:
    source.announced = len(IMAGE) + 5
    assert part.fails(source)[0] is FetchFault.INCOMPLETE
    source.announced = len(IMAGE) - 5
    assert part.fails(source, validator="")[0] is FetchFault.WRONG_DIGEST
    assert part.path.stat().st_size == len(IMAGE) - 5


def test_c28_what_does_not_fit_is_refused_before_it_fills_the_disk(source: ImageSource, part: Part) -> None:
    fault, text = part.fails(source, most_bytes=1 << 20)
    assert (fault, part.path.stat().st_size) == (FetchFault.NO_SPACE, 0)
    assert "at least 5 MiB, of which 1 MiB may be used" in text
    source.chunked = True  # it says no length, and goes on and on
    assert part.fails(source, most_bytes=1 << 20)[0] is FetchFault.NO_SPACE
    assert part.path.stat().st_size <= 1 << 20
    part.said.clear()
    part.fetch(source)
    assert part.path.read_bytes() == IMAGE


def test_c28_a_disk_that_fills_up_meanwhile_is_said(source: ImageSource, part: Part) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # EFBIG; Python ignores the signal
    try:
        assert part.fails(source)[0] is FetchFault.NO_SPACE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "//", "http://[", "gopher://x/"])
def test_a_redirect_leads_to_no_other_kind_of_place(source: ImageSource, part: Part, target: str) -> None:
    source.redirect = target
    assert part.fails(source)[0] is FetchFault.REDIRECT
    assert part.path.stat().st_size == 0


def test_a_redirect_from_https_stays_there() -> None:
    away = HttpSource("https://images.example/a.raw", ssl.create_default_context(), "")
    with pytest.raises(FetchFailed) as failed:
        away._target("https://images.example/a.raw", "http://images.example/a.raw")
    assert failed.value.fault is FetchFault.REDIRECT
    assert away._target("https://images.example/a.raw", "b.raw") == "https://images.example/b.raw"


def test_redirects_are_followed_but_not_for_ever_and_without_the_token(source: ImageSource, part: Part) -> None:
    with image_source(redirect=f"{source.url}/a.raw?signature=SECRET") as first:
        part.fetch(first, token="t0ken")
        assert first.requests[0][1]["Authorization"] == "Bearer t0ken"
        assert "Authorization" not in source.requests[0][1]
    assert part.path.read_bytes() == IMAGE
    source.redirect = f"{source.url}/a.raw"
    assert part.fails(source, sha256="0" * 64)[0] is FetchFault.REDIRECT


def test_no_secret_stands_in_what_is_said(source: ImageSource, part: Part) -> None:
    with image_source(redirect=f"{source.url}/none?signature=SECRET") as first:
        _, text = part.fails(first, token="t0ken")
    assert "404" in text and "SECRET" not in text and "t0ken" not in text
    with image_source(redirect="http://127.0.0.1:1/none?signature=SECRET") as first:
        _, text = part.fails(first)
    assert "refused" in text and "SECRET" not in text


def test_it_keeps_to_its_rate(source: ImageSource, part: Part) -> None:
    slept: list[float] = []
    job = part.job(source, rate=1 << 20)
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    with closing(HttpSource(job.source, ssl.create_default_context(), "")) as there:
        fetch(job, there.open, part.said.append, lambda: now, sleep)
    assert sum(slept) == pytest.approx(len(IMAGE) / (1 << 20))


def test_a_shared_folder_is_copied_and_gone_on_with(part: Part, tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(IMAGE)
    fd = os.open(path, os.O_RDONLY)
    given = open_file(str(path), 0, "", fd)
    os.pwrite(part.fd, IMAGE[: 2 << 20], 0)
    job = Job(str(path), part.fd, SHA256, given.validator, 1 << 30)
    fetch(job, lambda offset, validator: open_file(str(path), offset, validator, fd), part.said.append)
    assert part.said[0]["done"] == 2 << 20 and part.path.read_bytes() == IMAGE
    path.write_bytes(IMAGE[:-1] + b"x")  # another file by now
    os.ftruncate(part.fd, 1000)
    with pytest.raises(FetchFailed) as failed:
        fetch(job, lambda offset, validator: open_file(str(path), offset, validator, fd), part.said.append)
    assert failed.value.fault is FetchFault.WRONG_DIGEST and part.said[-2]["done"] == 0
    os.close(fd)
