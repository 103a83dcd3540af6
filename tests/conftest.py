"""Fixtures for every suite. A service that is missing is a failure, never a skip."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "deploy")]
