"""Fetches one image: a process of its own, at the lowest priority, which talks to a source that nobody vouches for.

The job comes as one line of JSON on standard input, progress goes out as lines of JSON. What is fetched goes into a
file that the agent has opened; started as root, the process becomes nobody before it takes a byte from the source.
A file that is half there is gone on with, if the source still has what it had (RFC 9110: Range, If-Range).
"""

from __future__ import annotations

import contextlib
import ctypes
import encodings.idna  # noqa: F401  looked up late, when the process may be nobody and may not read its own library
import errno
import hashlib
import json
import os
import re
import signal
import ssl
import stat
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import psutil
import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationParseError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from deskfleet.runtime.inspection import NOBODY
from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.host import FetchFault

CONNECT_S = 10.0
READ_S = 30.0
MOST_REDIRECTS = 3
_CHUNK = 1 << 20
_ZERO = bytes(_CHUNK)
#: What the disk has not taken yet stays below this: guests write, too.
_SYNC_EACH = 64 << 20
#: Progress is told when so many bytes more are there, and a second has gone by.
_TOLD_EACH = 64 << 10
#: What may be sent back as If-Range. A weak ETag may not (RFC 9110, 13.1.5).
_VALIDATOR = re.compile(r"(?!W/)[\x20-\x7e]{1,200}")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")
_PR_SET_PDEATHSIG = 1

Say = Callable[[Mapping[str, object]], None]


class FetchFailed(DeskfleetError):
    """Raised when an image can't be fetched; `fault` says which kind of trouble it is."""

    def __init__(self, fault: FetchFault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Job:
    """What to fetch: `source` is a URL or a path. `validator` names what the source had when the file in `part_fd` was
    begun ("" = begin again). The file may have `most_bytes`; `rate` is bytes a second, 0 for as fast as it goes."""

    source: str
    part_fd: int
    sha256: str
    validator: str
    most_bytes: int
    rate: float = 0.0
    ca: str = ""
    token: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """A source that gives bytes from `offset` on; `total` is the size of the whole, None when it does not say."""

    offset: int
    total: int | None
    validator: str
    read: Callable[[int], bytes]


Open = Callable[[int, str], Opened]


# --- sources ----------------------------------------------------------------------------------------------------


def open_file(path: str, offset: int, validator: str, fd: int) -> Opened:
    """A file of a shared folder, open as `fd`."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise FetchFailed(FetchFault.REFUSED, f"{path} is not a regular file")
    mine = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
    start = offset if validator == mine and offset <= status.st_size else 0
    os.lseek(fd, start, os.SEEK_SET)

    def read(amount: int) -> bytes:
        try:
            return os.read(fd, amount)
        except OSError as error:
            raise FetchFailed(FetchFault.INCOMPLETE, f"{path}: {error.strerror}") from None

    return Opened(start, status.st_size, mine, read)


class HttpSource:
    """One URL. Redirects lead to https, or stay with the scheme of the URL; the token goes to its origin alone."""

    def __init__(self, url: str, trust: ssl.SSLContext, token: str) -> None:
        self._url = url
        self._token = token
        self._answer: urllib3.BaseHTTPResponse | None = None
        self._pool = urllib3.PoolManager(ssl_context=trust, retries=False, timeout=urllib3.Timeout(CONNECT_S, READ_S))

    def close(self) -> None:
        """Close its connections."""
        if self._answer:
            self._answer.close()
        self._pool.clear()

    def open(self, offset: int, validator: str) -> Opened:
        """Ask for what comes after `offset`, or for everything when the source has something else by now.

        Raises:
            FetchFailed: it can't be reached, says no, or leads to where nothing is taken from.
        """
        answer = self._follow({"Range": f"bytes={offset}-", "If-Range": validator} if offset else {})
        known = next((v for v in (answer.headers.get("ETag"), answer.headers.get("Last-Modified")) if _usable(v)), "")
        if answer.status == 206 and offset:
            told = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if told and int(told[1]) == offset and known in ("", validator):
                return Opened(offset, int(told[2]), validator, _reader(answer))
        if answer.status in (206, 416) and offset:
            answer.close()
            return self.open(0, "")
        if answer.status != 200:
            answer.close()
            raise FetchFailed(FetchFault.REFUSED, f"the source answers {answer.status} for {_shown(self._url)}")
        length = answer.headers.get("Content-Length", "")
        return Opened(0, int(length) if re.fullmatch("[0-9]{1,18}", length) else None, known or "", _reader(answer))

    def _follow(self, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        url = self._url
        for _ in range(MOST_REDIRECTS + 1):
            own = (
                {"Authorization": f"Bearer {self._token}"} if self._token and _origin(url) == _origin(self._url) else {}
            )
            try:
                answer = self._answer = self._pool.request(
                    "GET", url, headers={"Accept-Encoding": "identity", **headers, **own}, redirect=False,
                    preload_content=False, decode_content=False,
                )  # fmt: skip
            except (HTTPError, ValueError) as error:
                raise FetchFailed(FetchFault.UNREACHABLE, f"{_shown(url)}: {_words(error)}") from None
            if not 300 <= answer.status < 400:
                if answer.headers.get("Content-Encoding", "identity") != "identity":
                    raise FetchFailed(FetchFault.REFUSED, f"{_shown(url)} is sent in an encoding that nobody asked for")
                return answer
            answer.close()
            url = self._target(url, answer.headers.get("Location", ""))
        raise FetchFailed(FetchFault.REDIRECT, f"the source redirects more than {MOST_REDIRECTS} times")

    def _target(self, url: str, location: str) -> str:
        try:
            target = urlsplit(urljoin(url, location))
            allowed = target.scheme == "https" or (target.scheme == "http" and self._url.startswith("http:"))
            if location and allowed and target.hostname:
                return target.geturl()
        except ValueError:
            pass
        raise FetchFailed(FetchFault.REDIRECT, "the source redirects to where nothing is taken from")


def _usable(validator: str | None) -> bool:
    return validator is not None and _VALIDATOR.fullmatch(validator) is not None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _shown(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"[:200]


def _reader(answer: urllib3.BaseHTTPResponse) -> Callable[[int], bytes]:
    def read(amount: int) -> bytes:
        try:
            return answer.read1(amount, decode_content=False)
        except HTTPError as error:
            raise FetchFailed(FetchFault.INCOMPLETE, _words(error)) from None

    return read


def _words(error: Exception) -> str:
    """What happened, without the URL that urllib3 puts into some of its texts."""
    match error:
        case ReadTimeoutError():
            return f"nothing came for {READ_S:.0f} s"
        case NameResolutionError():
            return "its name can't be resolved"
        case NewConnectionError():
            return str(getattr(error.__cause__, "strerror", None) or "no connection")
        case ConnectTimeoutError():
            return f"no connection within {CONNECT_S:.0f} s"
        case SSLError():
            return (
                f"TLS: {getattr(error.args[0], 'verify_message', None) or getattr(error.args[0], 'reason', 'failed')}"
            )
        case LocationParseError():
            return "not an address"
        case _:
            return "the connection broke"


# --- the work ---------------------------------------------------------------------------------------------------


def fetch(
    job: Job,
    source: Open,
    say: Say,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fill the file of a job, and return when it is whole, right, and on the disk.

    Raises:
        FetchFailed: it is not.
    """
    digest = hashlib.sha256()
    offset = _read_part(job, digest.update, say) if job.validator else 0
    if offset and digest.hexdigest() == job.sha256:
        return
    opened = source(offset, job.validator if offset else "")
    if opened.offset != offset or not offset:
        offset, digest = 0, hashlib.sha256()
        _write(os.ftruncate, job.part_fd, 0)
    if opened.total is not None and opened.total > job.most_bytes:
        raise _no_room(opened.total, job)
    say({"validator": opened.validator, "total": opened.total, "done": offset})
    begun, first, told, told_at, synced = now(), offset, offset, now(), offset
    while chunk := opened.read(_CHUNK):
        if offset + len(chunk) > (job.most_bytes if opened.total is None else opened.total):
            raise _no_room(offset + len(chunk), job)
        digest.update(chunk)
        _append(job.part_fd, chunk, offset)
        offset += len(chunk)
        if offset - synced >= _SYNC_EACH:
            _write(os.fdatasync, job.part_fd)
            os.posix_fadvise(job.part_fd, synced, offset - synced, os.POSIX_FADV_DONTNEED)
            synced = offset
        if job.rate:
            sleep(max(0.0, begun + (offset - first) / job.rate - now()))
        if offset - told >= _TOLD_EACH and now() - told_at >= 1.0:
            say({"done": offset})
            told, told_at = offset, now()
    if opened.total is not None and offset < opened.total:
        raise FetchFailed(FetchFault.INCOMPLETE, f"the source ended after {offset} of {opened.total} bytes")
    _write(os.fsync, job.part_fd)
    say({"done": offset})
    if digest.hexdigest() != job.sha256:
        raise FetchFailed(FetchFault.WRONG_DIGEST, "what the source gave is not the image: it has another SHA-256")


def _read_part(job: Job, update: Callable[[bytes], object], say: Say) -> int:
    offset = 0
    while chunk := os.pread(job.part_fd, _CHUNK, offset):
        update(chunk)
        offset += len(chunk)
        if offset % (256 * _CHUNK) == 0:
            say({"done": offset})
    return offset


def _append(fd: int, chunk: bytes, offset: int) -> None:
    if chunk == _ZERO[: len(chunk)]:
        _write(os.ftruncate, fd, offset + len(chunk))  # a hole
        return
    done = 0
    while done < len(chunk):
        done += _write(os.pwrite, fd, chunk[done:], offset + done) or 0


def _write(call: Callable[..., int | None], *arguments: object) -> int | None:
    try:
        return call(*arguments)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fault = FetchFault.NO_SPACE if full else FetchFault.UNWRITABLE
        raise FetchFailed(fault, f"the image folder can't be written: {error.strerror}") from None


def _no_room(wanted: int, job: Job) -> FetchFailed:
    text = f"at least {wanted >> 20} MiB, of which {job.most_bytes >> 20} MiB may be used"
    if wanted <= job.most_bytes:
        return FetchFailed(FetchFault.REFUSED, "the source gives more than it announced")
    return FetchFailed(FetchFault.NO_SPACE, f"the image is too large for the image folder: {text}; make room there")


def _become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # After the change of user, which takes it back.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _source(job: Job, ends: contextlib.ExitStack) -> Open:
    """Open what only the agent's own user may."""
    if job.source.startswith("/"):
        try:
            fd = os.open(job.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FetchFailed(FetchFault.UNREACHABLE, f"{job.source}: {error.strerror}") from None
        ends.callback(os.close, fd)
        return lambda offset, validator: open_file(job.source, offset, validator, fd)
    try:
        trust = ssl.create_default_context(cafile=job.ca or None)
    except (OSError, ssl.SSLError) as error:
        raise FetchFailed(FetchFault.UNREACHABLE, f"image_ca {job.ca}: {error.strerror}") from None
    return ends.enter_context(contextlib.closing(HttpSource(job.source, trust, job.token))).open


def main() -> int:
    """Do one job; the last line says `ok`, or what went wrong."""
    job, parent = Job(**json.loads(sys.stdin.readline())), os.getppid()

    def say(words: Mapping[str, object]) -> None:
        print(json.dumps(words), flush=True)

    os.nice(19)
    psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    try:
        with contextlib.ExitStack() as ends:
            source = _source(job, ends)
            _become_nobody()
            if os.getppid() != parent:
                return 1
            fetch(job, source, say)
    except FetchFailed as failed:
        say({"fault": failed.fault, "text": str(failed)[:300]})
        return 1
    say({"ok": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
