"""Sentences that other parts of Deskfleet wrote in English, with figures in them, said in the language of who asks.

The scheduler explains in English, in messages and in the ledger, and programs read it so. A sentence that has one of
the forms below is said by its translation, with the same figures; any other stays as it was written.
"""

from __future__ import annotations

import re
from functools import lru_cache

from babel.numbers import format_decimal

from deskfleet.portal.languages import ENGLISH, N_, gettext, language
from deskfleet.schemas.errors import SENTENCES

_PLACE = re.compile(r"%\((\w+)\)s")
_DECIMAL = re.compile(r"\d+\.\d+")
#: A figure of this name is a sentence or a list of its own.
_NESTED = "text"

#: The first one that fits counts. `%%` stands for a percent sign.
FORMS: tuple[str, ...] = (
    # why a host does not take a request: scheduler/filters.py, placement.py
    N_("its report can't be true: %(detail)s"),
    N_("no way to run guests: %(detail)s"),
    N_("was declared dead"),
    N_("drained for maintenance"),
    N_("waits for the scheduler to tell it where its command numbers are"),
    N_("has not reported yet"),
    N_("not heard for %(seconds)s s"),
    N_("lacks the label %(labels)s"),
    N_("is only for the pool %(pools)s"),
    N_("is not in the pool %(pools)s"),
    N_("could not fetch this image: %(detail)s"),
    N_("does not hold this image"),
    N_("does not hold this image yet, and can fetch it"),
    N_("fetching the image, %(percent)s %%"),
    N_("fetches the image next"),
    N_("another launch tries it first, after it failed several times"),
    N_("rests for another %(minutes)s min after it failed several launches"),
    N_("runs %(used)s of %(most)s desktops"),
    N_("%(free)s of %(most)s CPUs free, %(wanted)s wanted"),
    N_("%(free)s of %(most)s GiB memory free, %(wanted)s wanted"),
    N_("only %(free)s GiB of memory is really free on it, %(wanted)s wanted"),
    N_("%(free)s GiB of disk free, %(wanted)s wanted"),
    N_("load %(load)s on %(cpus)s CPUs is above the limit"),
    N_("%(used)s of %(most)s matching GPUs in use or spoken for"),
    N_("no GPU to give"),
    N_("no %(model)s to give"),
    N_("its room is kept for an earlier, larger request that starts here in about %(minutes)s min"),
    N_("no host is connected"),
    N_("could not start it: %(detail)s"),
    # why somebody's turn has not come, or never will: scheduler/turns.py, outlook.py
    N_("you have %(text)s"),
    N_("the group %(group)s has %(text)s"),
    N_("%(used)s of %(most)s desktops in use, %(wanted)s wanted"),
    N_("%(used)s of %(most)s CPUs in use, %(wanted)s wanted"),
    N_("%(used)s of %(most)s MiB of memory in use, %(wanted)s wanted"),
    N_("%(used)s of %(most)s GPUs in use, %(wanted)s wanted"),
    N_("no host could ever give this"),
    N_("the largest that fits is %(text)s"),
    N_("%(cpus)s CPUs, %(memory)s GiB of memory, %(disk)s GiB of disk, %(gpus)s GPU"),
    N_("%(cpus)s CPUs, %(memory)s GiB of memory, %(disk)s GiB of disk"),
    N_("No host could ever give this size. Choose a smaller one. One person may have at most: %(text)s."),
    N_("No host could ever give this size. Choose a smaller one. The group %(group)s may have at most: %(text)s."),
    # what is wrong with a size: schemas/machine.py
    N_("CPUs: %(value)s is not between %(low)s and %(high)s"),
    N_("memory (MiB): %(value)s is not between %(low)s and %(high)s"),
    N_("disk (GiB): %(value)s is not between %(low)s and %(high)s"),
    N_("GPUs: at most one"),
    N_("GPUs: this machine takes none"),
    N_("GPUs: this machine needs one"),
    N_("GPUs: %(model)s is not a model that this machine takes"),
    # what people should know of a desktop that runs: agent/stalls.py, forks.py
    N_("Paused: the host's disk is full. It goes on by itself when there is room."),
    N_("No network: this desktop could not be given a name and keys of its own. Start a new one, which is booted."),
    # by reason, where there are many hosts
    N_("%(count)s hosts: %(text)s"),
)
#: The entries of a list of caps, scheduler/outlook.py.
_ITEMS: tuple[str, ...] = (
    N_("%(cap)s CPUs"),
    N_("%(cap)s MiB of memory"),
    N_("%(cap)s GPUs"),
    N_("%(cap)s desktops"),
)


@lru_cache
def _pattern(form: str) -> re.Pattern[str]:
    pieces = [re.escape(piece.replace("%%", "%")) for piece in _PLACE.split(form)[::2]]
    names = [*(f"(?P<{name}>.*?)" for name in _PLACE.findall(form)), ""]
    return re.compile("".join(piece + name for piece, name in zip(pieces, names, strict=True)), re.DOTALL)


def form_of(text: str) -> tuple[str, dict[str, str]] | None:
    """The form that an English sentence has, and its figures; None when it has none of them."""
    if text in _KNOWN:
        return text, {}
    for form in FORMS:
        found = _pattern(form).fullmatch(text)
        if found:
            return form, found.groupdict()
    return None


_KNOWN = frozenset(SENTENCES.values())


def say(text: str) -> str:
    """An English sentence in the language of who asks, as far as its form is known."""
    if language() == ENGLISH:
        return text
    found = form_of(text)
    if found:
        return _fill(*found)
    entries = [_item(entry) for entry in text.split(", ")]
    return ", ".join(entry for entry in entries if entry) if all(entries) else text


def _item(text: str) -> str | None:
    for form in _ITEMS:
        found = _pattern(form).fullmatch(text)
        if found:
            return _fill(form, found.groupdict())
    return None


def _fill(form: str, figures: dict[str, str]) -> str:
    if not figures:
        return gettext(form).replace("%%", "%")
    return gettext(form, **{name: say(value) if name == _NESTED else _figure(value) for name, value in figures.items()})


def _figure(text: str) -> str:
    return format_decimal(float(text), format="0.0##", locale=language()) if _DECIMAL.fullmatch(text) else text


def verdict(host: str, text: str) -> str:
    """Why a host does not take a request; without a host, a rule of the queue."""
    return f"{host}: {say(text)}" if host else say(text)
