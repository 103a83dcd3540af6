"""The portal below a path of a host that nginx serves, set up by the very snippet of docs/operations.md."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

from demo.smoke import CHROMIUM, CHROMIUM_ARGS
from playwright.sync_api import expect, sync_playwright
from support.fake_console import FakeConsole
from support.furnished import PERSON, QUEUED, RUNNING, furnish
from support.sites import Site

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
CONF = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        {locations}
    }}
}}
"""


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def test_a_portal_below_a_path_works_as_the_manual_says(tmp_path: Path) -> None:
    port = free_port()
    front = f"http://127.0.0.1:{port}/desktops"
    (snippet,) = re.findall(r"```nginx\n(.*?)```", DOCS.read_text(), re.DOTALL)
    with FakeConsole() as console:
        site = Site(tmp_path, console, public_url=front, console_url=f"ws://127.0.0.1:{port}/desktops/console")
        furnish(site.world)
        snippet = snippet.replace("127.0.0.1:8081", f"127.0.0.1:{console.port}")
        snippet = snippet.replace("127.0.0.1:8080", f"127.0.0.1:{site.port}")
        (tmp_path / "nginx.conf").write_text(CONF.format(folder=tmp_path, port=port, locations=snippet))
        line = [
            "/usr/sbin/nginx",
            "-e",
            str(tmp_path / "error.log"),
            "-p",
            str(tmp_path),
            "-c",
            str(tmp_path / "nginx.conf"),
        ]
        nginx = subprocess.Popen(line)
        try:
            visit(site, front, console)
        finally:
            nginx.terminate()
            nginx.wait(30)
            site.hush()
            site.world.close()
    assert site.complaints == []
    assert (tmp_path / "error.log").read_text() == ""
    assert "ticket=" not in (tmp_path / "access.log").read_text()


def visit(site: Site, front: str, console: FakeConsole) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        page = site.page(browser, PERSON, front=front)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.click("article[data-machine=desktop] button[name=start]")
        page.wait_for_url(f"{front}/progress/*")
        page.goto(f"{front}/desktops")
        page.click(f"#open-{RUNNING}")
        page.wait_for_selector("[data-state=connected]")
        assert console.paths and all(path.startswith("/console?ticket=") for path in console.paths)
        page.goto(f"{front}/progress/{QUEUED}")
        with page.expect_response(re.compile(re.escape(f"{front}/progress/{QUEUED}/part"))):
            pass
        page.get_by_role("button", name="Français").click()
        expect(page.locator("html")).to_have_attribute("lang", "fr")
        assert page.url == f"{front}/progress/{QUEUED}"
        page.get_by_role("button", name="Se déconnecter").click()
        page.wait_for_url(re.compile(re.escape(front) + r"/login(\?.*)?$"))  # a poll may have come between
        ours = (front, "ws:", "data:", "blob:")
        assert [url for url in asked if not url.startswith(ours)] == []
        assert {cookie["path"] for cookie in page.context.cookies()} == {"/desktops", "/desktops/"}
        browser.close()
