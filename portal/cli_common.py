"""What the commands share: how they fail, and how they print a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import click

config_option = click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="DESKFLEET_CONFIG",
    default=Path("/etc/deskfleet/deskfleet.toml"),
    show_default=True,
    help="The settings file.",
)
"""The option --config of the commands that work on this machine."""

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class Refusal(click.ClickException):
    """Raised when something is refused; exit status 1."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the text alone."""
        click.echo(self.format_message(), file=file, err=file is None)


class Unreachable(Refusal):
    """Raised when no portal answers; exit status 3."""

    exit_code = 3


class Duration(click.ParamType[int]):
    """90, 90s, 30m, 8h or 2d, as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click.ParamType."""
        found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", str(value))
        if not found:
            self.fail(f"{value!r} is not a time; write 90s, 30m, 8h or 2d", param, ctx)
        return int(found[1]) * _UNITS[found[2]]


def printable(text: object) -> str:
    """Text without control characters: what comes from elsewhere must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns; an empty cell is a dash."""
    lines = [list(heads), *([printable(cell) if cell not in (None, "") else "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
