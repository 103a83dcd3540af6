"""A portal that a real browser can visit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page
from support.fake_console import FakeConsole
from support.portals import PASSWORD, World
from werkzeug.serving import make_server

from deskfleet.portal.app import create_app

PATIENCE_MS = 30_000
_TELL_BREACHES = """document.addEventListener("securitypolicyviolation",
    (event) => console.error(`Content Security Policy: ${event.violatedDirective} ${event.blockedURI}`))"""


class Site:
    """A portal that listens, with a fake console, and what the browser complained about."""

    def __init__(self, folder: Path, console: FakeConsole, **changes: Any) -> None:
        self.console = console
        console_url = f"ws://127.0.0.1:{console.port}/console"
        self.world = World(folder, **{"console_url": console_url, **changes})
        self.complaints: list[str] = []
        self._app = create_app(self.world.portal)
        self.listen(0)

    def listen(self, port: int) -> None:
        """Begin to answer."""
        self._server = make_server("127.0.0.1", port, self._app, threaded=True)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def hush(self) -> None:
        """Stop answering, as a portal that is down."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def page(self, browser: Browser, user: str = "", front: str = "", **options: Any) -> Page:
        """A page that tells of every dialog, script error and breach of the content policy; logged in as `user`, at
        `front` when a server in front of the portal is meant."""
        front = front or self.url
        page = browser.new_context(**options).new_page()
        page.add_init_script(_TELL_BREACHES)
        page.set_default_timeout(PATIENCE_MS)
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))  # type: ignore[arg-type]
        page.on("pageerror", lambda error: self.complaints.append(f"script {error}"))
        page.on(
            "console",
            lambda said: self.complaints.append(said.text) if "Content Security" in said.text else None,
        )
        if not user:
            return page
        page.goto(f"{front}/login")
        page.fill("input[name=user]", user)
        page.fill("input[name=password]", PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_url(f"{front}/launch")
        return page
