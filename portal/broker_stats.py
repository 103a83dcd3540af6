"""What only the broker's management API tells of queues: rates, what is handed out, and how old the first message is.

RabbitMQ, HTTP API, GET /api/queues/VHOST. Without it, and whenever it does not answer, these figures are unknown.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import requests

from deskfleet.portal.settings import ManagementSettings
from deskfleet.runtime.service import Clock

log = logging.getLogger(__name__)

_FRESH_S = 2.0
_PAUSE_S = 10.0
_CONNECT_S, _READ_S = 1.0, 2.0
_COLUMNS = "name,messages_unacknowledged,head_message_timestamp,message_stats"


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Figures of a queue: handed out and not acknowledged, messages a second that come and go, and the age of the
    first in seconds. None is unknown; a queue that is empty has no first."""

    unacked: int | None = None
    in_rate: float | None = None
    out_rate: float | None = None
    oldest_s: float | None = None


Get = Callable[..., requests.Response]


class BrokerStats:
    """Asks one broker, at most every two seconds, and after a failure every ten. Any thread; only one of them waits."""

    def __init__(self, settings: ManagementSettings, vhost: str, clock: Clock, get: Get | None = None) -> None:
        self._settings = settings
        self._url = f"{settings.url.rstrip('/')}/api/queues/{quote(vhost, safe='')}"
        self._clock = clock
        self._get = get or _session().get
        self._asking = threading.Lock()
        self._said: dict[str, QueueStats] = {}
        self._at = self._next = float("-inf")

    def queues(self) -> Mapping[str, QueueStats]:
        """The figures by queue; nothing when they are not fresh."""
        if self._clock.monotonic() >= self._next and self._asking.acquire(blocking=False):
            try:
                self._ask()
            finally:
                self._asking.release()
        return self._said if self._clock.monotonic() - self._at <= _PAUSE_S else {}

    def _ask(self) -> None:
        settings = self._settings
        try:
            answer = self._get(
                self._url,
                params={"columns": _COLUMNS},
                auth=(settings.user, settings.password.reveal()),
                timeout=(_CONNECT_S, _READ_S),
                verify=settings.ca or True,
                allow_redirects=False,  # it would take the password along
            )
            if answer.status_code != requests.codes.ok:
                raise ValueError(f"status {answer.status_code}")
            said = parse(answer.json(), self._clock.wall())
        except (requests.RequestException, OSError, ValueError) as error:
            detail = str(error) if isinstance(error, ValueError) else type(error).__name__
            log.warning("the broker's management API does not answer as it should: %s", detail[:200])
            self._next = self._clock.monotonic() + _PAUSE_S
            self._said = {}
            return
        self._said, self._at = said, self._clock.monotonic()
        self._next = self._at + _FRESH_S


def parse(content: Any, now: float) -> dict[str, QueueStats]:
    """The answer of /api/queues/VHOST; `now` is UNIX seconds. Raises ValueError when it is no list of queues."""
    if not isinstance(content, list):
        raise ValueError("not a list of queues")
    return {entry["name"]: _stats(entry, now) for entry in content if isinstance(entry, dict) and _named(entry)}


def _named(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("name"), str)


def _stats(entry: Mapping[str, Any], now: float) -> QueueStats:
    rates = entry.get("message_stats")
    head = _figure(entry.get("head_message_timestamp"))
    unacked = _figure(entry.get("messages_unacknowledged"))
    return QueueStats(
        None if unacked is None else int(unacked),
        _rate(rates, "publish_details"),
        _rate(rates, "deliver_get_details"),
        None if head is None else max(0.0, now - head),
    )


def _rate(rates: Any, name: str) -> float | None:
    # A queue that nobody has used since the broker started has no statistics at all.
    details = rates.get(name) if isinstance(rates, dict) else None
    return _figure(details.get("rate")) if isinstance(details, dict) else None


def _figure(value: Any) -> float | None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 53
    return float(value) if right else None


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # neither a proxy nor ~/.netrc stands between us and our broker
    return session
