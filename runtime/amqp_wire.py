"""What pika leaves to its users: addresses without traps, hostile properties, half-decoded strings, readable errors."""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import pika  # type: ignore[import-untyped]
import pika.spec  # type: ignore[import-untyped]
from pika.exceptions import ChannelClosed, ConnectionClosed  # type: ignore[import-untyped]

from deskfleet.runtime.bus import BusError, Death

log = logging.getLogger(__name__)

_QUOTED = re.compile(r"\(\d{3}\) (?P<quote>['\"])(?P<words>.+?)(?P=quote)")
NOT_FOUND, ACCESS_REFUSED, RESOURCE_LOCKED = 404, 403, 405


class _LenientProperties(pika.spec.BasicProperties):  # type: ignore[misc]
    """Message properties whose sender may be hostile.

    A header table may hold what pika 1.4 cannot convert although RabbitMQ passes it on, as a date in the year 10^9
    or tables nested a thousand deep (tried). Its exception ends the connection, again at each redelivery. Here such
    a message arrives without properties instead: no type and no sender, which every handler refuses.
    """

    def decode(self, encoded: bytes, offset: int = 0) -> Any:
        try:
            return super().decode(encoded, offset)
        except Exception as error:  # noqa: BLE001 - whatever pika trips over, the sender chose it
            log.warning("a message has unreadable properties: %s", error)
            return pika.spec.BasicProperties()


# pika makes the properties of incoming messages from this table and offers no other way in.
pika.spec.props[pika.spec.BasicProperties.INDEX] = _LenientProperties


def trust(authority: str) -> ssl.SSLContext | None:
    """Which certificate of a broker is believed: one signed by the authority in this PEM file; "" = by the system's.

    Raises:
        BadBrokerUrl: the file is missing or no certificate.
    """
    if not authority:
        return None
    try:
        return ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError) as error:
        raise BadBrokerUrl(f"broker_ca {authority}: {getattr(error, 'strerror', None) or error}") from None


def text(value: str | bytes | None) -> str:
    """A short string; pika leaves what is not UTF-8 as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def death_of(headers: object) -> Death | None:
    """What the broker's x-death header says of the last death; the newest stands first. A sender may have put older
    ones there, so nothing else of it is read."""
    deaths = headers.get("x-death") if isinstance(headers, Mapping) else None
    last = deaths[0] if isinstance(deaths, list) and deaths else None
    if not isinstance(last, Mapping):
        return None
    queue, reason, at = last.get("queue"), last.get("reason"), last.get("time")
    if not isinstance(queue, str) or not isinstance(reason, str):
        return None
    return Death(queue, reason, at.replace(tzinfo=UTC).timestamp() if isinstance(at, datetime) else None)


def code_of(reason: BaseException) -> int:
    """The reply code of a closed channel or connection (AMQP 0-9-1, 1.2), 0 for any other end."""
    return int(reason.reply_code) if isinstance(reason, (ChannelClosed, ConnectionClosed)) else 0


def text_of(reason: BaseException) -> str:
    """The broker's own words where there are any; pika wraps them in the repr of an exception in a tuple."""
    if isinstance(reason, (ChannelClosed, ConnectionClosed)):
        return text(reason.reply_text)
    quoted = _QUOTED.search(str(reason))
    return quoted["words"] if quoted else str(reason) or type(reason).__name__


class BadBrokerUrl(BusError):
    """Raised when a broker address is not amqp[s]://LOGIN:PASSWORD@HOST[:PORT]/VHOST; the message shows no password."""

    reason = "bus_bad_url"


def parameters(
    url: str,
    name: str,
    *,
    heartbeat: int,
    blocked_timeout: float,
    connect_timeout: float,
    tls: ssl.SSLContext | None,
) -> pika.ConnectionParameters:
    """What pika needs to connect to `url`, amqps:// with the certificate checked. Raises BadBrokerUrl.

    Login and password must be in it: pika's default would be guest/guest. Query options are refused, because they
    are pika's own and would bypass our settings.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadBrokerUrl(f"broker address: {error}") from None
    if parts.scheme not in ("amqp", "amqps"):
        raise BadBrokerUrl("broker address: it must begin with amqp:// or amqps://")
    if not host or not parts.username or not parts.password:
        raise BadBrokerUrl("broker address: host, login and password are all needed")
    if parts.query or parts.fragment or "/" in parts.path[1:]:
        raise BadBrokerUrl("broker address: nothing may follow the virtual host; write a slash in its name as %2F")
    secure = parts.scheme == "amqps"
    return pika.ConnectionParameters(
        host=host,
        port=port or (5671 if secure else 5672),
        virtual_host=unquote(parts.path[1:]) or "/",
        credentials=pika.PlainCredentials(unquote(parts.username), unquote(parts.password)),
        ssl_options=pika.SSLOptions(tls or ssl.create_default_context(), host) if secure else None,
        heartbeat=heartbeat,
        # A path that was cut says nothing: the kernel gives the connection up when our own heartbeats stay unanswered
        # for this long (ms). pika by itself looks only every heartbeat + 5 s.
        tcp_options={"TCP_USER_TIMEOUT": 2000 * heartbeat},
        blocked_connection_timeout=blocked_timeout,
        socket_timeout=connect_timeout,
        stack_timeout=2 * connect_timeout,
        connection_attempts=1,
        client_properties={"connection_name": name, "product": "Deskfleet"},
    )
