"""The commands that work on this machine, with the settings file: databases, accounts, tokens, settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from marshmallow import Schema
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from deskfleet.ledger.engine import migrate as migrate_ledger
from deskfleet.ledger.engine import open_engine
from deskfleet.portal.accounts import Accounts
from deskfleet.portal.audit import Audit
from deskfleet.portal.auth import Identity
from deskfleet.portal.cli_common import Refusal, config_option, printable, table
from deskfleet.portal.logins import Logins
from deskfleet.portal.scopes import Scope, stored
from deskfleet.portal.settings import PortalSchema, PortalSettings
from deskfleet.portal.store import Store
from deskfleet.runtime.secret import HIDDEN, Secret
from deskfleet.runtime.service import SystemClock
from deskfleet.runtime.settings import load
from deskfleet.schemas.catalogue import Catalogue
from deskfleet.schemas.config import SECTIONS, LedgerSchema, MachinesSchema
from deskfleet.schemas.errors import DeskfleetError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SCHEMAS: dict[str, Callable[[], Schema]] = {
    "portal": PortalSchema,
    "ledger": LedgerSchema,
    "machines": MachinesSchema,
}
_CHECK_S = 60
_DAY_S = 24 * 3600


@contextmanager
def _refusing() -> Iterator[None]:
    """What goes wrong on purpose, or in a database, as a refusal in words."""
    try:
        yield
    except DeskfleetError as error:
        raise Refusal(str(error)) from None
    except DBAPIError as error:
        # Only the driver's own words: the statement's parameters may be secret.
        raise Refusal(f"the database does not answer: {error.orig}") from None
    except SQLAlchemyError as error:
        raise Refusal(f"the database's URL is not usable: {type(error).__name__}") from None


def _load(config: Path, *names: str) -> dict[str, Any]:
    return load(config, {name: _SCHEMAS[name]() for name in names}, os.environ, SECTIONS)


class _Local:
    """The portal's database as the commands use it."""

    def __init__(self, config: Path) -> None:
        settings = cast(PortalSettings, _load(config, "portal")["portal"])
        clock = SystemClock()
        self.admins = settings.admins
        self.store = Store(settings.database.reveal())
        self.accounts = Accounts(self.store, clock)
        self.logins = Logins(self.store, clock)
        self._audit = Audit(self.store, clock)

    def note(self, action: str, target: str, detail: str = "") -> None:
        """Audit a change by whoever runs the command."""
        self._audit.note(f"uid {os.getuid()}", "command line", action, target, detail)


@contextmanager
def _local(config: Path) -> Iterator[_Local]:
    with _refusing():
        local = _Local(config)
        try:
            local.store.check_revision()
            yield local
        finally:
            local.store.close()


@click.command()
@config_option
def migrate(config: Path) -> None:
    """Bring both databases to the revision that this version needs. Does nothing when they are there."""
    with _refusing():
        settings = _load(config, "portal", "ledger")
        engine = open_engine(settings["ledger"]["url"])
        try:
            migrate_ledger(engine)
        finally:
            engine.dispose()
        store = Store(settings["portal"].database.reveal())
        try:
            store.migrate()
        finally:
            store.close()
    click.echo("The ledger and the portal's database are up to date.")


@click.group()
def user() -> None:
    """Local accounts."""


def _password() -> str:
    """From a person twice, without showing it; from a program as the first line of its input."""
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\r\n")


@user.command("add")
@click.argument("name")
@click.option("--admin", is_flag=True, help="An administrator.")
@click.option("--group", "groups", multiple=True, help="A group of the person; may be given several times.")
@config_option
def user_add(name: str, admin: bool, groups: tuple[str, ...], config: Path) -> None:
    """Make an account. The password is asked for, or read from the standard input."""
    with _local(config) as local:
        made = local.accounts.add(name, _password(), admin, groups)
        local.note("account made", made, "administrator" if admin else "")
    click.echo(f"{printable(made)}: made.")


@user.command("passwd")
@click.argument("name")
@config_option
def user_passwd(name: str, config: Path) -> None:
    """Replace a password; ends the person's logins and tokens."""
    with _local(config) as local:
        local.accounts.set_password(name, _password())
        local.note("password replaced", name)
    click.echo(f"{printable(name)}: password replaced, logins and tokens ended.")


@user.command("disable")
@click.argument("name")
@config_option
def user_disable(name: str, config: Path) -> None:
    """Shut an account; ends the person's logins and tokens. Desktops go on."""
    with _local(config) as local:
        local.accounts.set_disabled(name, True)
        local.note("account disabled", name)
    click.echo(f"{printable(name)}: disabled, logins and tokens ended.")


@user.command("enable")
@click.argument("name")
@config_option
def user_enable(name: str, config: Path) -> None:
    """Open an account again."""
    with _local(config) as local:
        local.accounts.set_disabled(name, False)
        local.note("account enabled", name)
    click.echo(f"{printable(name)}: enabled.")


@user.command("list")
@config_option
def user_list(config: Path) -> None:
    """Every local account."""
    with _local(config) as local:
        rows = [
            (
                account.user,
                "administrator" if account.admin or account.user in local.admins else "person",
                "disabled" if account.disabled else "enabled",
                ", ".join(account.groups),
            )
            for account in local.accounts.all()
        ]
    click.echo(table(("NAME", "RIGHTS", "STATE", "GROUPS"), rows))


@click.group()
def token() -> None:
    """Access tokens for programs."""


@token.command("create")
@click.argument("name", metavar="USER")
@click.option("--label", default="command line", show_default=True, help="What it is for.")
@click.option("--days", type=click.IntRange(1, 366), default=30, show_default=True, help="For how long it is good.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([scope.value for scope in Scope]),
    multiple=True,
    default=[Scope.DESKTOPS.value],
    show_default=True,
    help="What it may do, within what its owner may; may be given more than once.",
)
@config_option
def token_create(name: str, label: str, days: int, scopes: tuple[str, ...], config: Path) -> None:
    """Make a token for a local account and print it, alone. It is shown this once."""
    if not 1 <= len(label) <= 80:
        raise click.UsageError("the label must have 1 to 80 characters")
    with _local(config) as local:
        account = local.accounts.find(name)
        if account is None or account.disabled:
            raise Refusal(f"there is no account {name!r}" if account is None else f"the account {name!r} is disabled")
        identity = Identity(account.user, Accounts.name, account.groups, account.admin)
        secret, info = local.logins.make_token(identity, label, days * _DAY_S, [Scope(scope) for scope in scopes])
        local.note("token made", info.name, f"for {account.user}, {stored(info.scopes)}: {label}")
    click.echo(secret)


@click.group("config")
def config_group() -> None:
    """The settings file."""


@config_group.command("check")
@config_option
def config_check(config: Path) -> None:
    """Check every section of the settings file, and the catalogue, and say everything that is wrong."""
    with _refusing():
        _load(config)  # whether it can be read, and has only known sections
    present = set(tomllib.loads(config.read_text("utf-8")))
    own = _own_sections(present)
    wrong: list[str] = []
    try:
        settings = _load(config, *own)
    except DeskfleetError as error:
        wrong += str(error).splitlines()
    else:
        if "machines" in settings:
            wrong += _check_catalogue(Path(settings["machines"]["catalogue"]))
    for name in sorted(present - set(_SCHEMAS)):
        wrong += _check_service(name, config)
    if wrong:
        raise Refusal("\n".join(wrong))
    click.echo(f"{config}: {', '.join(sorted(present | set(own)))}: nothing wrong.")


def _own_sections(present: set[str]) -> list[str]:
    """A portal needs all three; the file of another service may hold some."""
    return [name for name in _SCHEMAS if "portal" in present or name in present]


def _check_catalogue(folder: Path) -> list[str]:
    if not folder.is_dir():
        return [f"machines.catalogue: {folder} is not a folder"]
    catalogue = Catalogue(folder)
    catalogue.machines()
    return [f"{folder}: {error}" for error in catalogue.errors]


def _check_service(name: str, config: Path) -> list[str]:
    """What the service itself says of its section; a service that is not installed here is told, not an error."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    program = shutil.which(f"deskfleet-{name}", path=path)
    if program is None:
        click.echo(f"[{name}] was not checked: deskfleet-{name} is not installed here.", err=True)
        return []
    try:
        done = subprocess.run(
            [program, "--config", str(config), "--check"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_CHECK_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"{name}: deskfleet-{name} --check failed: {type(error).__name__}"]
    if done.returncode == 0:
        return []
    return (done.stderr or done.stdout).splitlines() or [f"{name}: deskfleet-{name} --check failed"]


@config_group.command("show")
@config_option
def config_show(config: Path) -> None:
    """The settings of portal, ledger and machines as they count, environment included, without secrets."""
    with _refusing():
        settings = _load(config, *_SCHEMAS)
        portal = settings["portal"]
        sections = {
            "portal": _values(portal),
            **{f"portal.{name}": _values(getattr(portal, name)) for name in _below(portal)},
            "ledger": {"url": make_url(settings["ledger"]["url"]).render_as_string(hide_password=True)},
            "machines": settings["machines"],
        }
    lines = [
        line
        for name, values in sections.items()
        if values
        for line in (f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), "")
    ]
    click.echo("\n".join(lines).rstrip())


def _below(settings: PortalSettings) -> list[str]:
    """The names of the sections below [portal] that are there."""
    return [field.name for field in fields(settings) if is_dataclass(getattr(settings, field.name))]


def _values(settings: DataclassInstance) -> dict[str, object]:
    """What a section holds itself: neither what was left out nor the sections below it."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {key: value for key, value in values.items() if not (value is None or is_dataclass(value))}


def _toml(value: object) -> str:
    if isinstance(value, frozenset | tuple | list):
        items = [_toml(item) for item in value]
        return f"[{', '.join(sorted(items) if isinstance(value, frozenset) else items)}]"
    if isinstance(value, Secret):
        return json.dumps(HIDDEN)
    # JSON's strings, numbers and booleans are TOML's.
    return json.dumps(value if isinstance(value, bool | int | float | str) else str(value), ensure_ascii=False)


COMMANDS: tuple[click.Command, ...] = (migrate, user, token, config_group)
