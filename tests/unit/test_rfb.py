"""Which of a viewer's messages are input of a person, in pieces of any size."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskfleet.agent.rfb import Inputs

OPENING = b"RFB 003.008\n" + b"\x01" + b"\x01"
QUIET = {
    "pixel format": b"\x00" + bytes(19),
    "encodings": b"\x02\x00" + struct.pack(">H", 3) + bytes(12),
    "update request": struct.pack(">BBHHHH", 3, 0, 0, 0, 1, 1),
    "continuous updates": b"\x96" + bytes(9),
    "fence": b"\xf8" + bytes(7) + b"\x05" + b"\x04\x04\x04\x04\x04",
    "desktop size": b"\xfb\x00" + struct.pack(">HHBB", 800, 600, 2, 0) + b"\x04" * 32,
    "xvp": b"\xfa\x00\x01\x02",
    "audio on": b"\xff\x01\x00\x00",
    "audio format": b"\xff\x01\x00\x02" + bytes(6),
}
INPUT = {
    "key": struct.pack(">BBHI", 4, 1, 0, 0x61),
    "pointer": struct.pack(">BBHH", 5, 1, 4, 4),
    "clipboard": struct.pack(">BBBBi", 6, 0, 0, 0, 5) + b"\x03\x03\x03\x03\x03",
    "extended clipboard": struct.pack(">BBBBi", 6, 0, 0, 0, -6) + b"\x03" * 6,
    "qemu key": b"\xff\x00" + struct.pack(">HII", 1, 0x61, 30),
}


def fed(data: bytes, cuts: set[int] = frozenset()) -> bool:  # type: ignore[assignment]
    inputs = Inputs()
    edges = [0, *sorted(cut for cut in cuts if 0 < cut < len(data)), len(data)]
    found = [inputs.feed(data[a:b]) for a, b in pairwise(edges)]
    return any(found)


@pytest.mark.parametrize("name", QUIET)
def test_what_a_viewer_says_by_itself_is_no_input(name: str) -> None:
    assert not fed(OPENING + QUIET[name] * 3)


@pytest.mark.parametrize("name", INPUT)
def test_what_a_person_does_is_input_also_behind_everything_else(name: str) -> None:
    assert fed(OPENING + b"".join(QUIET.values()) + INPUT[name])


def test_the_opening_is_no_input_whatever_its_bytes_look_like() -> None:
    assert not fed(OPENING)


@given(cuts=st.sets(st.integers(1, 400), max_size=30), last=st.sampled_from([*INPUT.values(), b""]))
def test_pieces_of_any_size_are_the_same(cuts: set[int], last: bytes) -> None:
    data = OPENING + b"".join(QUIET.values()) * 2 + last
    assert fed(data, cuts) is bool(last)


def test_input_is_told_once_and_not_for_ever() -> None:
    inputs = Inputs()
    assert inputs.feed(OPENING + INPUT["key"])
    assert not inputs.feed(QUIET["update request"])


def test_a_viewer_that_can_not_be_understood_counts_as_a_person_from_then_on() -> None:
    inputs = Inputs()
    assert not inputs.feed(OPENING)
    assert inputs.feed(b"\x63")
    assert inputs.feed(b"")
    assert inputs.feed(QUIET["update request"])


@given(st.binary(max_size=300))
def test_no_bytes_break_it(data: bytes) -> None:
    fed(data, set(range(0, 300, 7)))
