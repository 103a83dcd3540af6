"""Fixtures for every suite. A service that is missing is a failure, never a skip."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
