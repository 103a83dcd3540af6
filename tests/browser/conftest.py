"""Pages are tested beside other suites: what they wait for may take a while, and what is wrong stays wrong."""

from __future__ import annotations

from playwright.sync_api import expect

expect.set_options(timeout=20_000)
