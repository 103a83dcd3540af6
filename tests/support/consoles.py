"""What the console tests share: heads, tickets, reports, certificates, a host that speaks RFB bytes."""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from deskfleet.schemas.host import GuestReport, HostReport, Phase, inventory_digest
from deskfleet.schemas.tickets import Mode, Ticket

ORIGIN = "https://portal.example"
KEYS = ("k" * 40,)
GRANT = "login-" + "0" * 16
WS_KEY = base64.b64encode(b"0123456789abcdef").decode()


def ticket(sid: str = "a" * 32, generation: int = 7, host: str = "h1", nonce: str = "", grant: str = GRANT) -> Ticket:
    return Ticket(sid, "ana@example.org", grant, host, generation, Mode.FULL, nonce or secrets.token_hex(16))


def head(
    target: str = "/console?ticket=t",
    without: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    method: str = "GET",
    version: str = "HTTP/1.1",
    **changed: str,
) -> bytes:
    """A good request head, or one with headers left out, changed (`sec_websocket_key="..."`) or added."""
    headers = {
        "Host": "portal.example",
        "Upgrade": "websocket",
        "Connection": "keep-alive, Upgrade",
        "Origin": ORIGIN,
        "Sec-WebSocket-Key": WS_KEY,
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": "binary",
    }
    for name, value in changed.items():
        real = next(known for known in headers if known.lower() == name.replace("_", "-"))
        headers[real] = value
    lines = [f"{name}: {value}" for name, value in headers.items() if name.lower() not in without]
    return "\r\n".join([f"{method} {target} {version}", *lines, *extra, "", ""]).encode("latin-1")


def report(
    host: str = "h1",
    guests: dict[str, tuple[int, Phase]] | None = None,
    seq: int = 1,
    incarnation: str = "one",
    console: str = "127.0.0.1:6080",
    last_generation: int = 0,
) -> HostReport:
    listed = tuple(GuestReport(sid, number, phase, True) for sid, (number, phase) in (guests or {}).items())
    highest = max([last_generation, *(guest.generation for guest in listed)])
    made = HostReport(
        host=host,
        incarnation=incarnation,
        seq=seq,
        boot_id="boot",
        last_generation=highest,
        fenced=False,
        console=console,
        accel="tcg",
        cpus=2,
        memory_mib=4096,
        load1=0.1,
        memory_free_mib=2048,
        disk_mib=10_000,
        disk_free_mib=5_000,
        guests=listed,
    )
    return replace(made, digest=inventory_digest(made))


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as paths."""

    cert: str
    key: str


class Authority:
    """A throw-away certificate authority, made with the openssl command."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = str(folder / "ca.pem")
        _openssl(
            "req", "-x509", *_EC, "-nodes", "-keyout", f"{folder}/ca.key", "-out", self.ca, "-days", "2",
            "-subj", f"/CN={name}", "-addext", "basicConstraints=critical,CA:TRUE",
        )  # fmt: skip

    def issue(self, name: str, usage: str) -> Pair:
        """A certificate for `name`; `usage` is serverAuth or clientAuth."""
        stem = f"{self.folder}/{name}-{usage}"
        _openssl("req", *_EC, "-nodes", "-new", "-keyout", f"{stem}.key", "-out", f"{stem}.csr", "-subj", f"/CN={name}")
        Path(f"{stem}.ext").write_text(f"subjectAltName=DNS:{name}\nextendedKeyUsage={usage}\n")
        _openssl(
            "x509", "-req", "-in", f"{stem}.csr", "-CA", self.ca, "-CAkey", f"{self.folder}/ca.key", "-CAcreateserial",
            "-out", f"{stem}.pem", "-days", "2", "-extfile", f"{stem}.ext",
        )  # fmt: skip
        return Pair(f"{stem}.pem", f"{stem}.key")


_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def _openssl(*arguments: str) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, env=environ)
