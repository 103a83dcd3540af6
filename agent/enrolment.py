"""Making this machine a host: what a bundle holds is put where the agent reads it."""

from __future__ import annotations

import os
from pathlib import Path

from deskfleet.schemas.bundle import Bundle, BundleError

_FILES = ("host.pem", "host.key", "ca.pem", "broker-ca.pem", "broker.url")


def install(bundle: Bundle, folder: Path, *, replace: bool = False) -> Path:
    """Write settings and keys below `folder` (/etc/deskfleet), readable by the owner alone; the settings file's path.

    A settings file that is there already is left as it is, except with `replace`: then the former one is kept beside
    it as deskfleet.toml.before.

    Raises:
        BundleError: this machine is a host already, under this name or another, and `replace` was not said.
    """
    settings, keys = folder / "deskfleet.toml", folder / "host"
    if settings.exists() and not replace:
        raise BundleError(f"{settings} is there already: this machine may be a host. To replace it, say so")
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys.chmod(0o700)
    texts = (bundle.cert, bundle.key, bundle.ca, bundle.broker_ca, bundle.broker_url + "\n")
    for name, text in zip(_FILES, texts, strict=True):
        if text:
            _write(keys / name, text)
    lines = [
        "[agent]",
        f'host = "{bundle.host}"',
        f'broker_url_file = "{keys}/broker.url"',
        f'console_address = "{bundle.console_address}"',
        f'console_listen = "0.0.0.0:{bundle.console_address.rpartition(":")[2]}"',
        f'console_cert = "{keys}/host.pem"',
        f'console_key = "{keys}/host.key"',
        f'console_ca = "{keys}/ca.pem"',
    ]
    if bundle.broker_ca:
        lines.append(f'broker_ca = "{keys}/broker-ca.pem"')
    if settings.exists():
        settings.rename(settings.with_name("deskfleet.toml.before"))
    _write(settings, "\n".join(lines) + "\n")
    return settings


def _write(path: Path, text: str) -> None:
    """Never readable by others, and whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
