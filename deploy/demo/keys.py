"""Passwords and certificates of a demo fleet. Made once, kept in its folder, readable by its owner alone."""

from __future__ import annotations

import json
import secrets
import subprocess
from pathlib import Path


class Keys:
    """Secrets by name; a name that is asked for the first time gets a new one."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self.folder = folder
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
        path = self.folder / "ca.pem"
        if not path.exists():
            subject = ["-subj", "/CN=Deskfleet demo"]
            _openssl("req", "-x509", *_NEW, "-days", "3650", *subject, "-keyout", _key(path), "-out", str(path))
        return path

    def certificate(self, name: str, usage: str) -> tuple[Path, Path]:
        """Certificate and key of one party on this machine; `usage` is serverAuth or clientAuth.

        A host's certificate is good for serving only, so a host can't pass for a proxy at another host.
        """
        path = self.folder / f"{name}.pem"
        if not path.exists():
            request = self.folder / f"{name}.csr"
            names = f"subjectAltName=DNS:{name}"
            _openssl("req", *_NEW, "-subj", f"/CN={name}", "-keyout", _key(path), "-out", str(request))
            extensions = self.folder / f"{name}.ext"
            extensions.write_text(f"{names}\nextendedKeyUsage={usage}\nbasicConstraints=CA:FALSE\n")
            signed_by = ["-CA", str(self.ca), "-CAkey", _key(self.ca), "-CAcreateserial"]
            _openssl(
                "x509", "-req", "-in", str(request), *signed_by, "-days", "3650",
                "-extfile", str(extensions), "-out", str(path),
            )  # fmt: skip
            request.unlink()
            extensions.unlink()
        return path, Path(_key(path))


_NEW = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def _key(certificate: Path) -> str:
    return str(certificate.with_suffix(".key"))


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
