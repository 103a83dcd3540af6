"""Log in by OpenID Connect: authorization code with PKCE (RFC 7636), state and nonce (OpenID Connect Core 1.0).

Authlib speaks the protocol. What is checked here beside it: that provider and token name the configured issuer, and
that an address is an id only when it is verified and of a domain that the provider may vouch for.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from authlib.common.errors import AuthlibBaseError
from authlib.common.security import generate_token
from authlib.integrations.requests_client import OAuth2Session
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from deskfleet.portal.auth import Answer, Identity, Realm, Unavailable, WrongPassword, plausible_name
from deskfleet.portal.auth_settings import LOOPBACK_NAMES, OidcSettings, rights
from deskfleet.portal.settings import address_of
from deskfleet.runtime.service import Clock

log = logging.getLogger(__name__)

#: How long somebody may take at the provider.
FLOW_S = 900
# Signatures by a key pair only: with a shared secret, or none, the token would prove nothing.
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA"]
_FRESH_S = 3600.0
_LEEWAY_S = 60
_REST_S = 5.0
_WELL_KNOWN = "/.well-known/openid-configuration"


@dataclass(frozen=True, slots=True)
class Begun:
    """A login that has gone to the provider: `url` is where the browser goes, `flow` what the portal's own cookie
    keeps until it comes back."""

    url: str
    flow: dict[str, Any]


class _Distrusted(Exception):
    """Raised when what the provider says can't be what it should; the text holds none of it."""


class OpenIdConnect:
    """The login method "oidc". At most `room` people at a time are looked at together with the provider."""

    name = "oidc"

    def __init__(self, settings: OidcSettings, realm: Realm, clock: Clock, callback: str, room: int) -> None:
        self._settings = settings
        self._realm = realm
        self._clock = clock
        self._callback = callback
        self._rights = rights(settings)
        self._asking = threading.Lock()
        self._rest_until = 0.0
        self._room = threading.BoundedSemaphore(room)
        self._metadata: tuple[float, dict[str, Any]] | None = None
        self._keys: KeySet | None = None

    @property
    def title(self) -> str:
        """What people call the provider."""
        return self._settings.title

    def begin(self) -> Begun | Unavailable:
        """Send somebody to the provider."""
        try:
            metadata = self._discovered()
        except (requests.RequestException, _Distrusted, ValueError) as error:
            return Unavailable(_why(error))
        nonce, verifier, state = generate_token(32), generate_token(64), generate_token(32)
        with self._session() as session:
            url, _ = session.create_authorization_url(
                metadata["authorization_endpoint"], state=state, nonce=nonce, code_verifier=verifier
            )
        flow = {"state": state, "nonce": nonce, "verifier": verifier, "at": int(self._clock.wall())}
        return Begun(str(url), flow)

    def finish(self, flow: Mapping[str, Any], answer: Mapping[str, str]) -> Answer:
        """Judge what the browser brought back; `flow` is what `begin` gave, for this browser and this once."""
        state = flow.get("state")
        if not isinstance(state, str) or not hmac.compare_digest(state.encode(), answer.get("state", "").encode()):
            return WrongPassword()
        if not 0 <= self._clock.wall() - flow.get("at", 0) <= FLOW_S:
            return WrongPassword()
        # RFC 9207: a provider that says who answers must be the right one.
        if answer.get("iss", self._settings.issuer) != self._settings.issuer or not answer.get("code"):
            return WrongPassword()
        if not self._room.acquire(timeout=0.5):
            return Unavailable("too many others are being asked about")
        try:
            claims = self._claims(flow, answer["code"])
        except (requests.RequestException, _Distrusted, ValueError) as error:
            return Unavailable(_why(error))
        except (AuthlibBaseError, JoseError) as error:
            log.warning("a login by OpenID Connect was refused: %s", _why(error))
            return WrongPassword()
        finally:
            self._room.release()
        return self._judge(claims)

    def current(self, identity: Identity) -> Identity | None:
        """See auth.Vouching."""
        return self._rights.judge(identity.user, self.name, identity.groups)

    def _claims(self, flow: Mapping[str, Any], code: str) -> dict[str, Any]:
        metadata = self._discovered()
        with self._session() as session:
            token = session.fetch_token(
                metadata["token_endpoint"],
                grant_type="authorization_code",
                code=code,
                code_verifier=flow["verifier"],
            )
        if not isinstance(token.get("id_token"), str):
            raise _Distrusted("no id token")
        signed = self._decoded(token["id_token"])
        # Authlib itself looks at neither of them unless it is told what they have to be.
        wanted = {
            "iss": {"essential": True, "value": self._settings.issuer},
            "aud": {"essential": True, "value": self._settings.client_id},
        }
        params = {"nonce": flow["nonce"], "client_id": self._settings.client_id}
        if isinstance(token.get("access_token"), str):
            params["access_token"] = token["access_token"]
        claims = CodeIDToken(signed.claims, signed.header, wanted, params)
        claims.validate(now=int(self._clock.wall()), leeway=_LEEWAY_S)
        return dict(claims)

    def _decoded(self, text: str) -> jwt.Token:
        keys = self._keys or self._fetched_keys()
        try:
            return jwt.decode(text, keys, algorithms=_ALGORITHMS)
        except (InvalidKeyIdError, JoseError):
            # Keys change; once more with those of now.
            return jwt.decode(text, self._fetched_keys(), algorithms=_ALGORITHMS)

    def _judge(self, claims: Mapping[str, Any]) -> Answer:
        settings = self._settings
        name = claims.get(settings.id_claim)
        if not isinstance(name, str) or not name:
            log.warning("a login by OpenID Connect has no text as its claim %s", settings.id_claim)
            return WrongPassword()
        user = self._address(name, claims) if settings.id_claim == "email" else self._realm.user_of(name)
        if user is None or not plausible_name(user):
            return WrongPassword()
        told = claims.get(settings.groups_claim, [])
        told = [told] if isinstance(told, str) else told
        groups = [group for group in told if isinstance(group, str)] if isinstance(told, list) else []
        return self._rights.judge(user, self.name, groups) or WrongPassword()

    def _address(self, name: str, claims: Mapping[str, Any]) -> str | None:
        address = address_of(name, "") if "@" in name else None
        if address is None or claims.get("email_verified") is not True:
            return None
        address = address.lower()
        return address if address.rpartition("@")[2] in self._settings.domains else None

    # What the provider publishes.

    def _session(self) -> OAuth2Session:
        settings = self._settings
        session = OAuth2Session(
            settings.client_id,
            settings.client_secret.reveal() if settings.client_secret else None,
            token_endpoint_auth_method="client_secret_basic" if settings.client_secret else "none",
            scope=settings.scopes,
            redirect_uri=self._callback,
            code_challenge_method="S256",
            default_timeout=settings.timeout_s,
        )
        session.trust_env = False
        session.verify = settings.ca or True
        session.max_redirects = 0
        return session

    def _get(self, url: str) -> Any:
        with self._session() as session:
            answer = session.request("GET", url, withhold_token=True)
            answer.raise_for_status()
            return answer.json()

    def _discovered(self) -> dict[str, Any]:
        known, now = self._metadata, self._clock.monotonic()
        if known and now - known[0] < _FRESH_S:
            return known[1]
        # One asks; the others don't wait for it with a thread each.
        if now < self._rest_until or not self._asking.acquire(blocking=False):
            raise _Distrusted("it did not answer a moment ago")
        try:
            self._rest_until = now + _REST_S
            found = self._get(self._settings.issuer.rstrip("/") + _WELL_KNOWN)
            if not isinstance(found, dict) or found.get("issuer") != self._settings.issuer:
                raise _Distrusted("the provider calls itself otherwise than in the settings")
            for key in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
                if not _is_safe(found.get(key)):
                    raise _Distrusted(f"{key} is no https address")
            self._metadata, self._rest_until = (now, found), 0.0
        finally:
            self._asking.release()
        return found

    def _fetched_keys(self) -> KeySet:
        found = self._get(self._discovered()["jwks_uri"])
        try:
            self._keys = KeySet.import_key_set(found)
        except (JoseError, ValueError, KeyError, TypeError, AttributeError):
            raise _Distrusted("its keys can't be read") from None
        return self._keys


def _is_safe(url: Any) -> bool:
    parts = urlsplit(url) if isinstance(url, str) else None
    return bool(parts and (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK_NAMES)))


def _why(error: Exception) -> str:
    """What kind of failure it was; its text may repeat what was sent."""
    return f"{type(error).__name__}: {error}" if isinstance(error, _Distrusted) else type(error).__name__
