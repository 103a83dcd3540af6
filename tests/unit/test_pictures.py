"""Small pictures of screens: from whatever a guest makes of the file, and how often qemu is asked."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deskfleet.agent.pictures import FRESH_S, PictureError, Pictures, read_screen, shrink
from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.picture import HEIGHT, WIDTH, is_picture

SID = "a" * 32


def ppm(width: int, height: int, pixels: bytes | None = None) -> bytes:
    return b"P6\n%d %d\n255\n" % (width, height) + (pixels if pixels is not None else bytes(3 * width * height))


@pytest.mark.parametrize(("size", "small"), [((1920, 1080), (320, 180)), ((64, 32), (64, 32)), ((100, 4000), (6, 240))])
def test_a_screen_fits_the_box_and_keeps_its_shape(size: tuple[int, int], small: tuple[int, int]) -> None:
    png = shrink(ppm(*size))
    assert is_picture(png)
    assert Image.open(io.BytesIO(png)).size == small


def test_what_is_on_the_screen_is_in_the_picture() -> None:
    red, blue = b"\xff\x00\x00", b"\x00\x00\xff"
    png = shrink(ppm(640, 480, (red * 320 + blue * 320) * 480))
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert (image.getpixel((10, 100)), image.getpixel((310, 100))) == ((255, 0, 0), (0, 0, 255))


def test_noise_fits_as_well() -> None:
    png = shrink(ppm(WIDTH, HEIGHT, os.urandom(3 * WIDTH * HEIGHT)))
    assert is_picture(png)
    Image.open(io.BytesIO(png)).load()


@pytest.mark.parametrize(
    "screen",
    [
        b"",
        b"P6",
        b"P3\n1 1\n255\n0 0 0",
        b"P5\n2 2\n255\n....",
        b"P6\n100000 100000\n255\n",
        b"P6\n-1 4\n255\n",
        ppm(100, 100)[:-1],
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ],
)
def test_what_is_no_screen_is_refused(screen: bytes) -> None:
    with pytest.raises(PictureError):
        shrink(screen)


@given(st.binary(max_size=200))
def test_no_bytes_break_it(data: bytes) -> None:
    for screen in (data, b"P6\n" + data, b"P6\n2 2\n255\n" + data):
        with contextlib.suppress(PictureError):
            assert is_picture(shrink(screen))


def test_c26_only_a_plain_file_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(ppm(4, 4))
    link, fifo, folder = tmp_path / "link.ppm", tmp_path / "fifo.ppm", tmp_path / "folder.ppm"
    link.symlink_to(secret)
    os.mkfifo(fifo)
    folder.mkdir()
    for path in (link, fifo, folder, tmp_path / "none.ppm"):
        with pytest.raises(PictureError):
            read_screen(path)
    huge = tmp_path / "huge.ppm"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PictureError):
        read_screen(huge)
    assert read_screen(secret) == ppm(4, 4) and not secret.exists()


class Qemu:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.now = 0.0
        self.away = False

    async def dump(self, sid: str) -> Path:
        self.asked.append(sid)
        await asyncio.sleep(0)
        if self.away:
            raise DeskfleetError("not running")
        path = self.folder / sid
        path.write_bytes(ppm(8, 8))
        return path


@pytest.fixture
def qemu(tmp_path: Path) -> Qemu:
    return Qemu(tmp_path)


def test_however_many_ask_at_once_qemu_is_asked_once(qemu: Qemu) -> None:
    async def work() -> None:
        pictures = Pictures(qemu.dump, lambda: qemu.now)
        many = await asyncio.gather(*(pictures.look(SID) for _ in range(20)))
        assert len(set(many)) == 1 and is_picture(many[0])
        await pictures.look(SID)
        assert qemu.asked == [SID]
        qemu.now += FRESH_S
        await pictures.look(SID)
        assert qemu.asked == [SID, SID]

    asyncio.run(work())


def test_one_that_gives_up_waiting_spoils_nothing_for_the_others(qemu: Qemu) -> None:
    async def work() -> None:
        pictures = Pictures(qemu.dump, lambda: qemu.now)
        first, second = asyncio.create_task(pictures.look(SID)), asyncio.create_task(pictures.look(SID))
        await asyncio.sleep(0)
        first.cancel()
        assert is_picture(await second)

    asyncio.run(work())


def test_the_last_picture_outlives_the_guest_and_is_kept_no_longer(qemu: Qemu) -> None:
    async def work() -> None:
        pictures = Pictures(qemu.dump, lambda: qemu.now)
        await pictures.sweep([SID, "b" * 32])
        qemu.away, qemu.now = True, 60.0
        await pictures.sweep([SID])
        assert qemu.asked == [SID, "b" * 32, SID]
        with pytest.raises(DeskfleetError):
            await pictures.look(SID)
        assert is_picture(pictures.last(SID) or b"")
        assert pictures.last(SID) is None and pictures.last("b" * 32) is None

    asyncio.run(work())
