"""Pages are tested beside other suites: what they wait for may take a while, and what is wrong stays wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from demo.smoke import CHROMIUM, CHROMIUM_ARGS
from playwright.sync_api import Browser, expect, sync_playwright

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield running
        running.close()
