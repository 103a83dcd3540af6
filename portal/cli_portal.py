"""A portal as the commands speak to it: over its HTTP API, with a person's token."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import click
import requests
from requests.auth import AuthBase

from deskfleet.portal.auth_settings import LOOPBACK_NAMES
from deskfleet.portal.cli_common import Refusal, Unreachable, printable

_PATIENCE_S = 30.0


class _Bearer(AuthBase):
    """A header set by hand would lose against a password for the same host in ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Portal:
    """One portal, for one person's token."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._auth = _Bearer(token)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One call; None when the answer has no body.

        Raises:
            Refusal: the portal says no.
            Unreachable: no answer, or one that is not a portal's.
        """
        try:
            # A redirect would carry the token, or turn a POST into a GET: a portal sends none.
            answer = requests.request(
                method,
                f"{self.url}/api/v1{path}",
                json=body,
                auth=self._auth,
                timeout=_PATIENCE_S,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise Unreachable(f"{self.url} can't be reached: {type(error).__name__}") from None
        if answer.status_code == requests.codes.no_content:
            return None
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.ok and isinstance(content, dict | list):
            return content
        if isinstance(content, dict) and "reason" in content and "message" in content:
            raise Refusal(_refusal(content))
        raise Unreachable(f"{self.url} does not answer like a portal (status {answer.status_code})")


def _refusal(content: dict[str, Any]) -> str:
    lines = [f"{content['message']} ({content['reason']})", *(f"  {line}" for line in content.get("details") or [])]
    if content.get("reference"):
        lines.append(f"  reference: {content['reference']}")
    return "\n".join(printable(line) for line in lines)


def _portal(url: str, token: str, token_file: Path | None) -> Portal:
    if token_file is not None:
        try:
            token = token_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"{token_file} can't be read: {error}") from None
    if not token:
        raise click.UsageError("give a token: DESKFLEET_TOKEN, or --token-file FILE")
    if not token.isascii() or not token.isprintable():
        raise click.UsageError("the token holds characters that no token has")
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise click.UsageError(f"{url!r} is not the address of a portal; write https://HOST")
    if parts.scheme == "http" and host not in LOOPBACK_NAMES:
        raise click.UsageError("a token goes over https:// only, except to this machine")
    return Portal(url, token)


def remote(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that speaks to a portal, which comes as the first argument."""

    @click.option("--url", envvar="DESKFLEET_URL", required=True, help="The portal's address [DESKFLEET_URL].")
    @click.option("--token-file", type=click.Path(dir_okay=False, path_type=Path), help="Instead of DESKFLEET_TOKEN.")
    @click.option("--token", envvar="DESKFLEET_TOKEN", default="", hidden=True, expose_value=True)
    @click.option("--json", "as_json", is_flag=True, help="Print what the portal answered, as JSON.")
    @functools.wraps(command)
    def wrapper(url: str, token_file: Path | None, token: str, **options: Any) -> None:
        command(_portal(url, token, token_file), **options)

    return wrapper


def show(as_json: bool, content: Any, text: Callable[[], str]) -> None:
    """Print an answer as it came, or as a text."""
    click.echo(json.dumps(content, indent=2) if as_json else text())


def part(name: str) -> str:
    """A name as one part of an address."""
    return quote(name, safe="")
