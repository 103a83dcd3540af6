"""The marker of this suite."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow_image: builds a whole Linux image and starts it by emulation (minutes)")
