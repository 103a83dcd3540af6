"""The commands about machines: import an image, look after it, take it out again. They work on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from deskfleet.portal.cli_common import Refusal, config_option, printable, table
from deskfleet.portal.machine_files import MachineFiles, Wish
from deskfleet.runtime.settings import load
from deskfleet.schemas.config import SECTIONS, MachinesSchema
from deskfleet.schemas.errors import DeskfleetError, MachineError
from deskfleet.schemas.image_facts import ImageRefused
from deskfleet.schemas.machine import Drivers, Firmware, Format, Os, Range, Video


class Sizes(click.ParamType[Range]):
    """MIN:DEFAULT:MAX, or one number for all three."""

    name = "min:default:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Range:
        """See click.ParamType."""
        if isinstance(value, Range):
            return value
        found = re.fullmatch(r"([0-9]{1,8})(?::([0-9]{1,8}):([0-9]{1,8}))?", str(value))
        if not found:
            self.fail(f"{value!r} is not a size; write 4 or 1:2:8", param, ctx)
        first = int(found[1])
        sizes = Range(first, int(found[2] or first), int(found[3] or first))
        if not 1 <= sizes.min <= sizes.default <= sizes.max:
            self.fail(f"{value!r}: the numbers must rise", param, ctx)
        return sizes


def _choice(kind: type[Os] | type[Video] | type[Firmware] | type[Drivers] | type[Format]) -> click.Choice[str]:
    return click.Choice([member.value for member in kind])


@contextmanager
def _files(config: Path) -> Iterator[MachineFiles]:
    """The machines that the settings file names; what goes wrong on purpose, or on disk, as a refusal in words."""
    try:
        settings = load(config, {"machines": MachinesSchema()}, os.environ, SECTIONS)["machines"]
        yield MachineFiles(
            Path(settings["catalogue"]), Path(settings["images"]), lambda text: click.echo(f"{text} …", err=True)
        )
    except ImageRefused as refused:
        raise Refusal(f"The image is refused ({refused.fault}): {refused}") from None
    except DeskfleetError as error:
        raise Refusal(printable(error)) from None
    except OSError as error:
        raise Refusal(printable(f"{error.filename or 'the file'}: {error.strerror}")) from None


@click.group()
def machine() -> None:
    """Machines that people can launch: their images and catalogue entries.

    Works on this machine, in the folders that the settings file names: [machines] catalogue and images.
    """


@machine.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The machine's name: lower-case letters, digits and dashes.")
@click.option("--title", help="What people read; the name when left out.")
@click.option("--text", help="A sentence about it.")
@click.option(
    "--format", "claimed", type=_choice(Format), help="Needed for raw disks, which have no mark of their own."
)
@click.option("--convert", "target", type=click.Choice(["qcow2"]), help="Store it as compressed QCOW2.")
@click.option("--os", "system", type=_choice(Os), default=Os.LINUX.value, show_default=True)
@click.option("--drivers", type=_choice(Drivers), help="virtio for Linux, else compatible, when left out.")
@click.option("--firmware", type=_choice(Firmware), default=Firmware.BIOS.value, show_default=True)
@click.option("--video", type=_choice(Video), default=Video.STD.value, show_default=True)
@click.option("--cpus", type=Sizes(), default="1:2:8", show_default=True)
@click.option("--memory-mib", type=Sizes(), default="512:2048:16384", show_default=True)
@click.option("--disk-gib", type=Sizes(), help="From the image's size on, when left out.")
@click.option(
    "--user", "users", multiple=True, help="Who may launch it; everybody, when no --user or --group is given."
)
@click.option("--group", "groups", multiple=True, help="Whose members may launch it.")
@click.option("--largest-gib", type=click.IntRange(1, 1 << 20), default=2048, show_default=True)
@config_option
def import_(
    file: Path,
    name: str,
    title: str | None,
    text: str | None,
    claimed: str | None,
    target: str | None,
    system: str,
    drivers: str | None,
    firmware: str,
    video: str,
    cpus: Range,
    memory_mib: Range,
    disk_gib: Range | None,
    users: tuple[str, ...],
    groups: tuple[str, ...],
    largest_gib: int,
    config: Path,
) -> None:
    """Make a machine of a disk image or a CD image: QCOW2, VDI, VMDK, ISO or raw.

    The image is inspected and refused when it refers to other files, is encrypted, damaged, or not what it is said to
    be. It is copied; FILE stays as it is. Nothing is overwritten.
    """
    wish = Wish(
        name=name,
        title=title or name,
        text=text or f"Imported from {printable(file.name)[:200]}.",
        os=Os(system),
        video=Video(video),
        firmware=Firmware(firmware),
        drivers=Drivers(drivers or (Drivers.VIRTIO if system == Os.LINUX else Drivers.COMPATIBLE)),
        cpus=cpus,
        memory_mib=memory_mib,
        disk_gib=disk_gib,
        users=users if users or groups else ("*",),
        groups=groups,
    )
    with _files(config) as files:
        kind = Format(claimed) if claimed else None
        made = files.add(file, wish, kind, converted=target is not None, largest=largest_gib << 30)
    click.echo(f"{made.name}: imported as {made.file}, SHA-256 {made.sha256}.")


@machine.command("list")
@config_option
def list_(config: Path) -> None:
    """Every entry of the catalogue, and whether its image is here."""
    rows = []
    with _files(config) as files:
        for name in files.names():
            try:
                one = files.machine(name)
            except MachineError as error:
                rows.append((name, "", "", "", "", f"not valid: {error.problems[0]}"))
                continue
            size = files.size(one)
            here = "not here" if size is None else f"{-(-size >> 20)} MiB"
            rows.append((name, one.title, one.os.value, one.format.value, one.file, here))
    click.echo(table(("NAME", "TITLE", "SYSTEM", "FORMAT", "FILE", "IMAGE"), rows))


@machine.command()
@click.argument("name", required=False)
@config_option
def check(name: str | None, config: Path) -> None:
    """Look at one machine, or all: the entry, the image, its digest, and whether it is safe. Exit status 1 if not."""
    wrong = []
    with _files(config) as files:
        for one in [name] if name else files.names():
            problems = files.problems(one)
            wrong += [f"{one}: {printable(problem)}" for problem in problems]
            if not problems:
                click.echo(f"{one}: nothing wrong.")
    if wrong:
        raise Refusal("\n".join(wrong))


@machine.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@config_option
def export(name: str, file: Path, config: Path) -> None:
    """Write a machine's disk to FILE as a QCOW2 that needs no other file. Nothing is overwritten."""
    with _files(config) as files:
        files.export(name, file)
    click.echo(f"{name}: written to {printable(file)}.")


@machine.command()
@click.argument("name")
@click.option(
    "--disk-gib", type=click.IntRange(1, 1 << 24), required=True, help="What a session's disk has by default."
)
@config_option
def resize(name: str, disk_gib: int, config: Path) -> None:
    """Change the size of a machine's disk in the catalogue. The image itself is never written."""
    with _files(config) as files:
        size = files.resize(name, disk_gib).disk_gib
    click.echo(f"{name}: disks of {size.default} GiB ({size.min} to {size.max}) from the next launch on.")


@machine.command()
@click.argument("name")
@click.option("--seconds", type=click.IntRange(1, 3600), default=30, show_default=True, help="When to look at it.")
@click.option("--screenshot", type=click.Path(path_type=Path), help="A new PNG file; NAME.png when left out.")
@config_option
def test(name: str, seconds: int, screenshot: Path | None, config: Path) -> None:
    """Start a machine once on this computer, without network, and save a picture of its screen.

    Needs what a host needs: qemu and the Python packages of the agent. An agent that runs here is not disturbed.
    """
    target = (screenshot or Path(f"{name}.png")).absolute()
    with _files(config) as files:
        files.machine(name)
        if target.exists():
            raise Refusal(f"{printable(target)} exists already.")
        line = [*files.trial(name), "--screenshot", str(target), "--seconds", str(seconds)]
        # A program of its own, since portal and agent share no code above the runtime.
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    try:
        result = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise Refusal(printable(f"The trial could not be made: {said[-1]}")) from None
    if result["phase"] != "running":
        why = ": ".join(part for part in (result["reason"], result["detail"]) if part)
        raise Refusal(printable(f"{name}: {result['phase']} ({result['accel']}): {why or 'it shut itself down'}"))
    click.echo(f"{name}: display after {result['ready_ms']} ms ({result['accel']}); picture in {printable(target)}.")


COMMANDS: tuple[click.Command, ...] = (machine,)
