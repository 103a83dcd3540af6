"""Passwords and certificates of a demo fleet. Made once, kept in its folder, readable by its owner alone."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from deskfleet.runtime.certificates import Authority


class Keys:
    """Secrets by name; a name that is asked for the first time gets a new one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self.folder = folder
        self._authority = Authority(folder, "Deskfleet demo")
        self._file = folder / "secrets.json"
        self._known: dict[str, str] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def secret(self, name: str, length: int = 24) -> str:
        """`length` random bytes as text that is safe in URLs and TOML."""
        if name not in self._known:
            self._known[name] = secrets.token_urlsafe(length)
            temporary = self._file.with_suffix(".tmp")
            temporary.touch(0o600)
            temporary.write_text(json.dumps(self._known))
            temporary.rename(self._file)
        return self._known[name]

    def values(self) -> list[str]:
        """Every secret, to look for where none may be."""
        return list(self._known.values())

    @property
    def ca(self) -> Path:
        """The certificate that signs hosts and proxies; made when it is not there."""
        return self._authority.certificate

    def certificate(self, name: str, usage: str) -> tuple[Path, Path]:
        """Certificate and key of one party on this machine; `usage` is serverAuth or clientAuth."""
        return self._authority.issue(name, usage)
