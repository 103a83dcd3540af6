"""The marker of this suite, and the Linux guest that its probes run in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import linux_guest
from support.guests import short_folder


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow_image: builds a whole Linux image and starts it by emulation (minutes)")


@pytest.fixture(scope="session")
def linux() -> Iterator[Path]:
    """Kernel and ramdisk of the guest of support/linux_guest.py."""
    with short_folder() as folder:
        yield linux_guest.build(folder)
