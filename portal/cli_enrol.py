"""Enrolling and revoking hosts, on the machine where the broker runs."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import tempfile
from pathlib import Path

import click

from deskfleet.portal.cli_common import Refusal, printable
from deskfleet.runtime import rights
from deskfleet.runtime.certificates import Authority, CertificateError
from deskfleet.schemas import topology
from deskfleet.schemas.bundle import Bundle
from deskfleet.schemas.host import HOST

_PATIENCE_S = 60.0
_ca = click.option(
    "--ca",
    "ca",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/etc/deskfleet/ca"),
    show_default=True,
    help="The folder of the authority that signs hosts and proxies; made when it is not there.",
)
_ctl = click.option(
    "--rabbitmqctl", default="rabbitmqctl", show_default=True, help="The command that administers the broker."
)


def _checked(name: str) -> str:
    if not HOST.fullmatch(name):
        raise Refusal("A host's name has lower-case letters, digits and dashes, at most 63, as in DNS.")
    return name


def _broker(command: str, *arguments: str) -> str:
    """One command to the broker's administration. Nothing secret may stand among the arguments."""
    try:
        done = subprocess.run(
            [*command.split(), *arguments], capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except OSError as error:
        raise Refusal(f"{command}: {error.strerror}. Run this where the broker runs, as root.") from None
    except subprocess.TimeoutExpired:
        raise Refusal(f"{command} did not answer within {_PATIENCE_S:g} s.") from None
    if done.returncode:
        raise Refusal(f"The broker refused: {printable((done.stderr or done.stdout).strip()[-400:])}")
    return done.stdout


@click.command()
@click.argument("name")
@click.option("--address", required=True, help="HOST:PORT where proxies reach this host's consoles.")
@click.option("--broker", required=True, help="amqps://HOST[:PORT]/VHOST as the host sees the broker, without login.")
@click.option("--broker-ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="PEM file, if its own.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The bundle; NAME.bundle when not said.")
@_ca
@_ctl
def enroll(
    name: str, address: str, broker: str, broker_ca: Path | None, out: Path | None, ca: Path, rabbitmqctl: str
) -> None:
    """Make NAME a host: its broker login and queue, its certificate, and one file to carry to it.

    Run it where the broker runs. On the host: deskfleet-agent enroll BUNDLE. Enrolling a host again gives it a new
    password and certificate; the old ones are worth nothing then.
    """
    _checked(name)
    place = re.fullmatch(r"(amqps?)://([^@/\s]+)(/[^\s]*)?", broker)
    if place is None:
        raise Refusal("--broker must be amqps://HOST[:PORT]/VHOST, without a login.")
    out = out or Path(f"{name}.bundle")
    if out.exists():
        raise Refusal(f"{out} is there already; move it away, or say --out.")
    password = secrets.token_urlsafe(32)
    try:
        authority = Authority(ca)
        authority.withdraw(name)
        cert, key = authority.issue(name, "serverAuth")
        own = authority.certificate.read_text()
    except CertificateError as error:
        raise Refusal(str(error)) from None
    _import(rabbitmqctl, rights.host(name, password))
    # Whoever still holds the old password is connected: out.
    _broker(rabbitmqctl, "close_all_user_connections", rights.agent_login(name), "enrolled again")
    login, where = rights.agent_login(name), place[2] + (place[3] or "/%2F")
    bundle = Bundle(
        host=name,
        broker_url=f"{place[1]}://{login}:{password}@{where}",
        console_address=address,
        cert=cert.read_text(),
        key=key.read_text(),
        ca=own,
        broker_ca=broker_ca.read_text() if broker_ca else "",
    )
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(bundle.dumps())
    click.echo(f"{out} makes one machine the host {name}. It is secret: carry it there, and then remove it.")


def _import(rabbitmqctl: str, definitions: object) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # its mode is 0600
        json.dump(definitions, file)
        file.flush()
        _broker(rabbitmqctl, "import_definitions", file.name)


@click.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask for the name again.")
@_ca
@_ctl
def revoke(name: str, yes: bool, ca: Path, rabbitmqctl: str) -> None:
    """Shut NAME out: its login is removed and its connections are closed, at once.

    Its guests run on until they end; what they are to the fleet is settled by `deskfleet host declare-dead`.
    """
    _checked(name)
    if not yes and click.prompt(f"{name} is shut out. Type the host's name to confirm", err=True) != name:
        raise Refusal("That is not the host's name; nothing was done.")
    login = rights.agent_login(name)
    _broker(rabbitmqctl, "delete_user", login)
    _broker(rabbitmqctl, "close_all_user_connections", login, "revoked")
    _broker(rabbitmqctl, "delete_queue", topology.host_queue(name))
    Authority(ca).withdraw(name)
    click.echo(f"{name} is shut out. If its desktops are lost as well: deskfleet host declare-dead {name}")


COMMANDS: tuple[click.Command, ...] = (enroll, revoke)
