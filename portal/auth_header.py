"""Log in by what a proxy in front of the portal says, for sites with a single sign-on of their own.

The headers are believed from the configured addresses only, by the address of the connection itself; from everywhere
else they are taken out before anything sees them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import Any

from deskfleet.portal.auth import Identity, Realm, plausible_name
from deskfleet.portal.auth_settings import HeaderSettings, rights
from deskfleet.runtime.settings import Network

_Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ProxyHeaders:
    """The login method "header"."""

    name = "header"

    def __init__(self, settings: HeaderSettings, realm: Realm) -> None:
        self._settings = settings
        self._realm = realm
        self._rights = rights(settings)
        self._user = _key(settings.user_header)
        self._groups = _key(settings.groups_header) if settings.groups_header else ""

    def named(self, environ: dict[str, Any]) -> bool:
        """Whether a proxy that may says who somebody is, whether or not they may log in."""
        return inside(environ.get("REMOTE_ADDR", ""), self._settings.proxies) and bool(environ.get(self._user))

    def identify(self, environ: dict[str, Any]) -> Identity | None:
        """Who asks, as the proxy says; None when none does that may, or the person may not log in."""
        if not self.named(environ):
            return None
        name = _text(environ[self._user])
        user = self._realm.user_of(name) if name is not None else None
        # A comma is what two headers of one name become: one is the proxy's, the other may be anybody's.
        if user is None or "," in user or not plausible_name(user):
            return None
        told = _text(environ.get(self._groups, "")) if self._groups else ""
        if told is None:
            return None
        groups = [group.strip() for group in told.split(",") if group.strip()]
        return self._rights.judge(user, self.name, groups)

    def current(self, identity: Identity) -> Identity | None:
        """See auth.Vouching."""
        return self._rights.judge(identity.user, self.name, identity.groups)

    def stripping(self, application: _Wsgi) -> _Wsgi:
        """The application without these headers in what comes from elsewhere."""

        def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if not inside(environ.get("REMOTE_ADDR", ""), self._settings.proxies):
                for key in (self._user, self._groups):
                    environ.pop(key, None)
            return application(environ, start_response)

        return call


def inside(address: str, networks: Iterable[Network]) -> bool:
    """Whether an address, as the server gives it, lies in one of the networks."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _key(header: str) -> str:
    return "HTTP_" + header.upper().replace("-", "_")


def _text(value: str) -> str | None:
    """A header's value; WSGI gives bytes as Latin-1 (PEP 3333), proxies send UTF-8."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return None
