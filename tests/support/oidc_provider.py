"""A provider of OpenID Connect for tests: discovery, authorization code with PKCE, tokens, keys; and ways to cheat."""

from __future__ import annotations

import base64
import hashlib
import secrets
import ssl
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import ECKey
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

CLIENT, SECRET = "deskfleet", "the client's own secret"


class Provider:
    """Logs everybody in as `claims` say. `metadata` and `claims` overlay what is right; `sign` replaces the signing."""

    def __init__(self, now: Callable[[], float], tls: ssl.SSLContext | None = None) -> None:
        self._now = now
        self.key = ECKey.generate_key("P-256", {"kid": "one"})
        self.claims: dict[str, Any] = {"sub": "ada"}
        self.metadata: dict[str, Any] = {}
        self.sign: Callable[[dict[str, Any]], str] = self.signed
        self.broken = False
        self.asked: list[str] = []
        self._codes: dict[str, dict[str, str]] = {}
        self._server = make_server("127.0.0.1", 0, self._application, threaded=True, ssl_context=tls)
        self.issuer = f"{'https' if tls else 'http'}://localhost:{self._server.server_port}/realms/test"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def signed(self, claims: dict[str, Any]) -> str:
        """An id token as it should be."""
        return jwt.encode({"alg": "ES256", "kid": self.key.kid}, claims, self.key)

    def authorize(self, url: str, **changes: str) -> str:
        """What a person's browser is sent back to who follows `url` and agrees."""
        asked = {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()} | changes
        assert (asked["response_type"], asked["client_id"]) == ("code", CLIENT) and "openid" in asked["scope"].split()
        assert asked["code_challenge_method"] == "S256" and len(asked["code_challenge"]) == 43
        assert len(asked["state"]) >= 22 and len(asked["nonce"]) >= 22
        code = secrets.token_urlsafe(16)
        self._codes[code] = asked
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state'], 'iss': self.issuer})}"

    @Request.application
    def _application(self, request: Request) -> Response:
        path = request.path.removeprefix("/realms/test")
        self.asked.append(path)
        if self.broken:
            return Response(status=503)
        try:
            found = {
                "/.well-known/openid-configuration": self._discovery,
                "/token": self._token,
                "/jwks": lambda _: {"keys": [self.key.as_dict(private=False)]},
            }[path](request)
        except (KeyError, HTTPException) as error:
            return _json({"error": "invalid_grant", "error_description": repr(error)}, 400)
        return _json(found)

    def _discovery(self, _: Request) -> dict[str, Any]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/jwks",
            "response_types_supported": ["code"],
        } | self.metadata

    def _token(self, request: Request) -> dict[str, Any]:
        login = request.authorization
        if request.method != "POST" or login is None or (login.username, login.password) != (CLIENT, SECRET):
            raise KeyError("client")
        asked = self._codes.pop(request.form["code"])  # once
        challenge = base64.urlsafe_b64encode(hashlib.sha256(request.form["code_verifier"].encode()).digest())
        if challenge.rstrip(b"=").decode() != asked["code_challenge"]:
            raise KeyError("verifier")
        if request.form["redirect_uri"] != asked["redirect_uri"]:
            raise KeyError("redirect_uri")
        now = int(self._now())
        claims = {"iss": self.issuer, "aud": CLIENT, "nonce": asked["nonce"], "iat": now, "exp": now + 300}
        token = self.sign({key: value for key, value in (claims | self.claims).items() if value is not None})
        return {"access_token": secrets.token_urlsafe(16), "token_type": "Bearer", "id_token": token}


def _json(body: dict[str, Any], status: int = 200) -> Response:
    import json

    return Response(json.dumps(body), status, mimetype="application/json")
