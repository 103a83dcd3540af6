"""A small certificate authority of one's own, for what hosts and proxies show each other. By openssl(1).

A host's certificate is good for serving only, a proxy's for asking only: no host can pass for a proxy at another host.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from deskfleet.schemas.errors import DeskfleetError

_NEW = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
USAGES = ("serverAuth", "clientAuth")


class CertificateError(DeskfleetError):
    """Raised when openssl is missing or refuses."""


class Authority:
    """An authority in a folder that is its owner's alone: ca.pem, ca.key, and what it has issued."""

    def __init__(self, folder: Path, name: str = "Deskfleet") -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self.folder = folder
        self._name = name

    @property
    def certificate(self) -> Path:
        """The certificate that signs the others; made when it is not there."""
        path = self.folder / "ca.pem"
        if not path.exists():
            subject = ["-subj", f"/CN={self._name}"]
            extensions = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
            self._openssl("req", "-x509", *_NEW, "-days", "3650", *subject, *extensions, path=path)
        return path

    def issue(self, name: str, usage: str, days: int = 3650) -> tuple[Path, Path]:
        """Certificate and key for one party, made when they are not there; `usage` is serverAuth or clientAuth.

        Raises:
            CertificateError: openssl is missing or refuses.
        """
        if usage not in USAGES:
            raise CertificateError(f"{usage} is none of {', '.join(USAGES)}")
        path = self.folder / f"{name}.pem"
        if not path.exists():
            request, extensions = path.with_suffix(".csr"), path.with_suffix(".ext")
            extensions.write_text(f"subjectAltName=DNS:{name}\nextendedKeyUsage={usage}\nbasicConstraints=CA:FALSE\n")
            try:
                self._openssl("req", *_NEW, "-subj", f"/CN={name}", path=request, key=path.with_suffix(".key"))
                signed_by = ["-CA", str(self.certificate), "-CAkey", str(self.folder / "ca.key"), "-CAcreateserial"]
                self._run(
                    "x509", "-req", "-in", str(request), *signed_by, "-days", str(days),
                    "-extfile", str(extensions), "-out", str(path),
                )  # fmt: skip
            finally:
                request.unlink(missing_ok=True)
                extensions.unlink(missing_ok=True)
        return path, path.with_suffix(".key")

    def withdraw(self, name: str) -> None:
        """Forget what was issued to a party, so that it gets new ones the next time."""
        for suffix in (".pem", ".key"):
            (self.folder / name).with_suffix(suffix).unlink(missing_ok=True)

    def _openssl(self, *arguments: str, path: Path, key: Path | None = None) -> None:
        key = key or path.with_suffix(".key")
        self._run(*arguments, "-keyout", str(key), "-out", str(path))
        key.chmod(0o600)

    def _run(self, *arguments: str) -> None:
        before = os.umask(0o077)  # openssl makes the key's file itself: it must never be readable by others
        try:
            done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
        except OSError as error:
            raise CertificateError(f"openssl: {error.strerror}") from None
        finally:
            os.umask(before)
        if done.returncode:
            raise CertificateError(f"openssl {arguments[0]}: {done.stderr.strip()[-300:]}")
