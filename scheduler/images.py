"""Which host is to fetch an image that people wait for, and what hosts are told about images.

A launch goes only to a host that holds its image. When it finds no place, and a host could give it one but for the
image, that host fetches it: one host at a time for each image, so that no burst of launches empties the source.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from deskfleet.scheduler.filters import Moment, Want, beside_image, objection
from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.hosts import HostState
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import MOST_IMAGES, CatalogueImage, HostImages

log = logging.getLogger(__name__)

#: A host whose fetch has not moved for so long is not waited for: another one is asked as well.
PATIENCE_S = 600.0
#: So many kinds of requests are looked at in one pass, and so many hosts told in one.
MOST_SOUGHT = 20
MOST_TOLD = 200


def fetcher(want: Want, hosts: Iterable[HostState], at: Moment, asked: Collection[str] = ()) -> str:
    """The host that shall have the image of `want` next; "" when none can, or when it is needless.

    One that is fetching already, or was asked to, is left to it. Else the first in the order of placement that lacks
    nothing but the image; else, when nobody who could take the session some day holds the image, the first that may.
    """
    first, later, held = "", "", False
    for host in hosts:
        if want.sha256 in host.images:
            held = held or objection(want, host, at) not in _SHUT
        elif host.fetches is not None:
            reason = objection(want, host, at)
            if reason is Reason.IMAGE_FETCHING and at.now - host.moved.get(want.sha256, at.now) < PATIENCE_S:
                return host.name
            if reason is not Reason.IMAGE_FETCHABLE:
                continue
            if host.name in asked:
                return host.name
            later = later or host.name
            if not first and beside_image(want, host, at) is None:
                first = host.name
    return first or ("" if held else later)


#: Who objects so will not take the session by waiting.
_SHUT = frozenset(
    {
        Reason.DECLARED_DEAD, Reason.SILENT, Reason.NOT_TRUSTED, Reason.FENCED,
        Reason.DRAINING, Reason.LABEL_MISSING, Reason.WRONG_POOL,
    }
)  # fmt: skip


class Images:
    """What the hosts of a fleet are told about images. `now` is monotonic seconds."""

    def __init__(self, fleet: Fleet, machines: Callable[[], Mapping[str, Machine]], again_s: float) -> None:
        self._fleet = fleet
        self._machines = machines
        self._again_s = again_s
        self._chosen: dict[tuple[object, ...], tuple[str, str, float]] = {}  # shape -> digest, host, looked at
        self._known: Mapping[str, Machine] | None = None
        self._list: tuple[str, tuple[CatalogueImage, ...]] = "", ()

    def seek(self, wants: Iterable[Want], at: Moment) -> None:
        """Choose who fetches for those who wait."""
        shapes: dict[tuple[object, ...], Want] = {}
        for want in wants:
            shapes.setdefault(want.shape, want)
        if not shapes or all(host.fetches is None for host in self._fleet.hosts.values()):
            self._chosen.clear()
            return
        self._chosen = {shape: row for shape, row in self._chosen.items() if shape in shapes}
        old = [shape for shape in shapes if at.now - self._looked(shape) >= self._again_s]
        for shape in sorted(old, key=self._looked)[:MOST_SOUGHT]:
            want = shapes[shape]
            asked = {host for sha256, host, _ in self._chosen.values() if sha256 == want.sha256}
            chosen = fetcher(want, self._fleet.index.walk(want), at, asked)
            if chosen and chosen not in asked:
                log.info("%s is to fetch the image %s…", chosen, want.sha256[:12])
                self._fleet.hosts[chosen].told_images = float("-inf")
            self._chosen[shape] = want.sha256, chosen, at.now

    def _looked(self, shape: tuple[object, ...]) -> float:
        return self._chosen[shape][2] if shape in self._chosen else float("-inf")

    def due(self, now: float, fresh_s: float) -> list[HostImages]:
        """What is to be said now to hosts that fetch images: to those that do not know the catalogue as it is, or have
        not taken up what was wanted of them."""
        wanted: dict[str, set[str]] = {}
        for sha256, chosen, _ in self._chosen.values():
            wanted.setdefault(chosen, set()).add(sha256)
        digest, images = self._catalogue()
        messages: list[HostImages] = []
        for host in self._fleet.hosts.values():
            if host.fetches is None or host.report is None or not digest or len(messages) >= MOST_TOLD:
                continue
            missed = wanted.get(host.name, set()) - host.images - host.fetches.keys()
            news = missed or host.report.catalogue != digest
            if news and now - host.told_images >= self._again_s and host.is_fresh(now, fresh_s):
                host.told_images = now
                messages.append(HostImages(host.name, digest, images, tuple(sorted(wanted.get(host.name, ())))))
        return messages

    def _catalogue(self) -> tuple[str, tuple[CatalogueImage, ...]]:
        """Every image of the catalogue, once; "" when there are too many to tell."""
        machines = self._machines()
        if machines is not self._known:
            self._known = machines
            by_digest = {m.sha256: CatalogueImage(m.sha256, m.file, m.format) for m in machines.values()}
            images = tuple(by_digest[sha256] for sha256 in sorted(by_digest))
            if len(images) > MOST_IMAGES:
                log.error("the catalogue names %d images; hosts can be told of %d", len(images), MOST_IMAGES)
                self._list = "", ()
            else:
                self._list = _name(images), images
        return self._list


def _name(images: tuple[CatalogueImage, ...]) -> str:
    text = json.dumps([[image.sha256, image.file, image.format] for image in images])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
