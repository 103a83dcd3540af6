"""A small client of the portal's API, for the smoke test, the system tests and the benchmarks."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

PATIENCE = 90.0


class ApiError(Exception):
    """Raised when the portal refuses; `status` and `reason` say how."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body[:500]}")
        self.status = status
        try:
            self.reason = str(json.loads(body).get("reason", ""))
        except (ValueError, AttributeError):
            self.reason = ""


class Client:
    """Speaks for one person, by an access token."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One call of the API.

        Raises:
            ApiError: the answer is an error.
        """
        request = urllib.request.Request(
            f"{self._url}/api/v1{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, error.read().decode(errors="replace")) from None
        return json.loads(text) if text else None

    def launch(self, machine: str, **options: Any) -> str:
        """Ask for a desktop; its session id."""
        return str(self.call("POST", "/sessions", {"machine": machine, **options})["sid"])

    def session(self, sid: str) -> dict[str, Any]:
        """What the portal knows of a session."""
        return dict(self.call("GET", f"/sessions/{sid}"))

    def until(self, sid: str, *states: str, pause: float = 0.1) -> dict[str, Any]:
        """Wait until a session is in one of these states."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                session = self.session(sid)
            except ApiError as error:
                session = {"state": f"answer {error.status}"}
            if session["state"] in states:
                return session
            if time.monotonic() > deadline:
                raise AssertionError(f"{sid} is {session} and not {states} after {PATIENCE:.0f} s")
            time.sleep(pause)

    def until_running(self, sid: str, pause: float = 0.1) -> dict[str, Any]:
        """Wait until a desktop can be opened."""
        session = self.until(sid, "running", "ended", pause=pause)
        if session["state"] == "ended":
            raise AssertionError(f"{sid} has ended: {session}")
        return session

    def until_ended(self, sid: str) -> dict[str, Any]:
        """Wait until a session is over."""
        return self.until(sid, "ended")

    def console(self, sid: str) -> str:
        """The address of its console, with a fresh ticket."""
        answer = self.call("POST", f"/sessions/{sid}/ticket")
        return f"{answer['console_url']}?ticket={answer['ticket']}"

    def stop(self, sid: str) -> None:
        """Ask for its end."""
        self.call("POST", f"/sessions/{sid}/stop")
