"""Sizes, times and states as people say them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deskfleet.portal import words
from deskfleet.schemas.session import Outcome, Resources


def test_memory() -> None:
    assert [words.memory(n) for n in (512, 1024, 1536, 16384, 1048576)] == [
        "512 MiB",
        "1 GiB",
        "1.5 GiB",
        "16 GiB",
        "1 TiB",
    ]


def test_size() -> None:
    assert words.size(Resources(1, 512, 4)) == "1 CPU · 512 MiB memory · 4 GiB disk"
    assert words.size(Resources(2, 4096, 20, 1, "Tesla")) == "2 CPUs · 4 GiB memory · 20 GiB disk · 1 GPU Tesla"


def test_duration_rounds_down_and_never_goes_below_nothing() -> None:
    cases = {-5: "0 s", 59.9: "59 s", 60: "1 min", 7500: "2 h 5 min", 3600: "1 h", 86400: "1 day", 190000: "2 days 4 h"}
    assert {n: words.duration(n) for n in cases} == cases


def test_offset_from_the_click() -> None:
    assert [words.offset(n) for n in (-1, 0.123, 14.2, 200)] == ["+0.00 s", "+0.12 s", "+14 s", "+3 min"]


def test_every_outcome_has_words() -> None:
    assert set(words.OUTCOMES) == set(Outcome)


@given(st.tuples(*[st.integers(1, 1 << 24)] * 3).map(sorted))
def test_a_ladder_stays_in_its_range_and_holds_its_ends(steps: list[int]) -> None:
    low, default, high = steps
    ladder = words.ladder(low, default, high, default)
    assert ladder == sorted(set(ladder))
    assert (ladder[0], ladder[-1]) == (low, high) and default in ladder
    assert len(ladder) < 40


def test_percent_needs_no_size() -> None:
    assert [words.percent(1, 4), words.percent(5, 0), words.percent(9, 3)] == [25, 0, 100]


def test_an_estimate_is_rounded_up_to_whole_minutes() -> None:
    cases = {0: "1 min", 59: "1 min", 60: "1 min", 61: "2 min", 700: "12 min", 7141: "2 h", 86_399: "1 day"}
    assert {n: words.about(n) for n in cases} == cases


def test_places_are_counted_as_people_do() -> None:
    assert [words.ordinal(n) for n in (1, 2, 3, 4, 10, 11, 12, 13, 21, 22, 101, 111, 113)] == [
        *("1st", "2nd", "3rd", "4th", "10th", "11th", "12th", "13th"),
        *("21st", "22nd", "101st", "111th", "113th"),
    ]
