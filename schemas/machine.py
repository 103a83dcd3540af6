"""Catalogue entries: which machines people may launch, in which sizes.

One TOML file a machine. Parsing takes text, so the caller decides where files come from.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates_schema

from deskfleet.schemas.errors import MachineError
from deskfleet.schemas.session import Resources

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"[0-9a-f]{64}")


class Format(StrEnum):
    """Image formats; ISO boots from a read-only CD beside an empty disk, the others back an overlay."""

    ISO = "iso"
    QCOW2 = "qcow2"
    VDI = "vdi"
    VMDK = "vmdk"
    RAW = "raw"


class Os(StrEnum):
    """The family of the guest: decides clock, input devices and what the CPU offers."""

    LINUX = "linux"
    WINDOWS = "windows"
    OTHER = "other"


class Video(StrEnum):
    """The guest's display adapter."""

    STD = "std"
    VIRTIO = "virtio"
    QXL = "qxl"


class Firmware(StrEnum):
    """What boots the guest."""

    BIOS = "bios"
    UEFI = "uefi"


class Drivers(StrEnum):
    """Which disk and network card the guest gets: the fast ones of virtual machines (VIRTIO), or an AHCI disk and an
    Intel e1000e card, which systems know without further drivers (COMPATIBLE)."""

    VIRTIO = "virtio"
    COMPATIBLE = "compatible"


class GpuPolicy(StrEnum):
    """Whether a machine takes a GPU."""

    NEVER = "never"
    OPTIONAL = "optional"
    REQUIRED = "required"


class ReadyBy(StrEnum):
    """How a booted guest is known to be ready for people: by a mark that it makes, or by a screen that stands still
    once its own agent answers."""

    MARK = "mark"
    STILL = "still"


class Share(StrEnum):
    """Whose desktops may share pages of memory with each other: those of everybody who may use the machine, those of
    one group, or none."""

    MACHINE = "machine"
    GROUP = "group"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Size:
    """A size in which a machine is kept ready: CPUs and MiB."""

    cpus: int
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Instant:
    """That a machine is kept ready and forked, instead of booted at each launch."""

    ready: ReadyBy
    share: Share
    sizes: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """An allowed range and where it starts."""

    min: int
    default: int
    max: int


@dataclass(frozen=True, slots=True)
class Machine:
    """One entry of the catalogue. Memory in MiB, disk in GiB (virtual size). `labels` are required of a host."""

    name: str
    title: str
    text: str
    os: Os
    file: str
    format: Format
    sha256: str
    video: Video
    firmware: Firmware
    cpus: Range
    memory_mib: Range
    disk_gib: Range
    gpu: GpuPolicy = GpuPolicy.NEVER
    gpu_models: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    drivers: Drivers = Drivers.VIRTIO
    instant: Instant | None = None

    @property
    def defaults(self) -> Resources:
        """The size that the launch form starts with."""
        return Resources(
            self.cpus.default,
            self.memory_mib.default,
            self.disk_gib.default,
            1 if self.gpu is GpuPolicy.REQUIRED else 0,
        )

    def allows(self, user: str, groups: tuple[str, ...] = ()) -> bool:
        """Whether this person may use the machine: by exact name, by group, or because everybody may."""
        return "*" in self.users or user in self.users or bool(set(groups) & set(self.groups))

    def problems(self, want: Resources) -> list[str]:
        """What is wrong with a size, in words; empty when the machine allows it."""
        wrong = []
        for label, value, allowed in (
            ("CPUs", want.cpus, self.cpus),
            ("memory (MiB)", want.memory_mib, self.memory_mib),
            ("disk (GiB)", want.disk_gib, self.disk_gib),
        ):
            if not allowed.min <= value <= allowed.max:
                wrong.append(f"{label}: {value} is not between {allowed.min} and {allowed.max}")
        if want.gpus not in (0, 1):
            wrong.append("GPUs: at most one")
        elif want.gpus and self.gpu is GpuPolicy.NEVER:
            wrong.append("GPUs: this machine takes none")
        elif not want.gpus and self.gpu is GpuPolicy.REQUIRED:
            wrong.append("GPUs: this machine needs one")
        elif want.gpus and self.gpu_models and want.gpu_model and want.gpu_model not in self.gpu_models:
            wrong.append(f"GPUs: {want.gpu_model} is not a model that this machine takes")
        return wrong


class _Strict(Schema):
    class Meta:
        unknown = RAISE


class _RangeSchema(_Strict):
    min = fields.Int(required=True, strict=True, validate=validate.Range(1, 1 << 24))
    default = fields.Int(required=True, strict=True)
    max = fields.Int(required=True, strict=True, validate=validate.Range(1, 1 << 24))

    @validates_schema
    def _order(self, data: Mapping[str, int], **_: Any) -> None:
        if not data["min"] <= data["default"] <= data["max"]:
            raise ValidationError("min <= default <= max must hold")

    @post_load
    def _make(self, data: dict[str, int], **_: Any) -> Range:
        return Range(**data)


class _ImageSchema(_Strict):
    file = fields.Str(required=True, validate=validate.Regexp(rf"\A{FILE.pattern}\Z"))
    format = fields.Enum(Format, required=True, by_value=True)
    sha256 = fields.Str(required=True, validate=validate.Regexp(rf"\A{DIGEST.pattern}\Z"))


class _DisplaySchema(_Strict):
    video = fields.Enum(Video, by_value=True, load_default=Video.STD)


class _DevicesSchema(_Strict):
    drivers = fields.Enum(Drivers, by_value=True, load_default=Drivers.VIRTIO)


class _FirmwareSchema(_Strict):
    type = fields.Enum(Firmware, by_value=True, load_default=Firmware.BIOS)


class _GpuSchema(_Strict):
    policy = fields.Enum(GpuPolicy, by_value=True, load_default=GpuPolicy.NEVER)
    models = fields.List(fields.Str(validate=validate.Length(1, 128)), load_default=list)


class _PlacementSchema(_Strict):
    labels = fields.List(fields.Str(validate=validate.Regexp(rf"\A{NAME.pattern}\Z")), load_default=list)


class _AccessSchema(_Strict):
    users = fields.List(fields.Str(validate=validate.Length(1, 256)), load_default=list)
    groups = fields.List(fields.Str(validate=validate.Length(1, 256)), load_default=list)


class _SizeSchema(_Strict):
    cpus = fields.Int(required=True, strict=True)
    memory_mib = fields.Int(required=True, strict=True)

    @post_load
    def _make(self, data: dict[str, int], **_: Any) -> Size:
        return Size(**data)


class _InstantSchema(_Strict):
    ready = fields.Enum(ReadyBy, by_value=True, load_default=ReadyBy.STILL)
    share = fields.Enum(Share, by_value=True, load_default=Share.MACHINE)
    sizes = fields.List(fields.Nested(_SizeSchema), load_default=list, validate=validate.Length(max=8))


class _MachineSchema(_Strict):
    title = fields.Str(required=True, validate=validate.Length(1, 80))
    text = fields.Str(required=True, validate=validate.Length(1, 1000))
    os = fields.Enum(Os, required=True, by_value=True)
    image = fields.Nested(_ImageSchema, required=True)
    display = fields.Nested(_DisplaySchema, load_default=lambda: {"video": Video.STD})
    devices = fields.Nested(_DevicesSchema, load_default=lambda: {"drivers": Drivers.VIRTIO})
    firmware = fields.Nested(_FirmwareSchema, load_default=lambda: {"type": Firmware.BIOS})
    cpus = fields.Nested(_RangeSchema, required=True)
    memory_mib = fields.Nested(_RangeSchema, required=True)
    disk_gib = fields.Nested(_RangeSchema, required=True)
    gpu = fields.Nested(_GpuSchema, load_default=lambda: {"policy": GpuPolicy.NEVER, "models": []})
    placement = fields.Nested(_PlacementSchema, load_default=lambda: {"labels": []})
    access = fields.Nested(_AccessSchema, required=True)
    instant = fields.Nested(_InstantSchema, load_default=None)

    @validates_schema
    def _instant_fits(self, data: Mapping[str, Any], **_: Any) -> None:
        if data["instant"] is None:
            return
        if data["gpu"]["policy"] is GpuPolicy.REQUIRED:
            raise ValidationError("a machine that needs a GPU can't be kept ready", "instant")
        if data["instant"]["share"] is Share.GROUP and not data["access"]["groups"]:
            raise ValidationError("share = 'group' needs [access] groups", "instant")
        cpus, memory = data["cpus"], data["memory_mib"]
        for size in data["instant"]["sizes"]:
            if not (cpus.min <= size.cpus <= cpus.max and memory.min <= size.memory_mib <= memory.max):
                raise ValidationError(
                    f"{size.cpus} CPUs, {size.memory_mib} MiB: outside the machine's sizes", "instant"
                )


_SCHEMA = _MachineSchema()


def _flatten(messages: Any, path: str = "") -> list[str]:
    if isinstance(messages, Mapping):
        return [
            line
            for key, value in messages.items()
            for line in _flatten(value, path if key == "_schema" else f"{path}.{key}".lstrip("."))
        ]
    return [f"{path}: {message}" for message in messages]


def parse_machine(name: str, text: str) -> Machine:
    """Read one catalogue entry.

    Raises:
        MachineError: with everything that is wrong, one line each.
    """
    if not NAME.fullmatch(name):
        raise MachineError(name, ["the name must be lower-case letters, digits and dashes, at most 48"])
    try:
        data: dict[str, Any] = _SCHEMA.load(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise MachineError(name, [f"not TOML: {error}"]) from None
    except ValidationError as error:
        raise MachineError(name, _flatten(error.messages)) from None
    return Machine(
        name=name,
        title=data["title"],
        text=data["text"],
        os=data["os"],
        file=data["image"]["file"],
        format=data["image"]["format"],
        sha256=data["image"]["sha256"],
        video=data["display"]["video"],
        firmware=data["firmware"]["type"],
        cpus=data["cpus"],
        memory_mib=data["memory_mib"],
        disk_gib=data["disk_gib"],
        gpu=data["gpu"]["policy"],
        gpu_models=tuple(data["gpu"]["models"]),
        users=tuple(data["access"]["users"]),
        groups=tuple(data["access"]["groups"]),
        labels=tuple(data["placement"]["labels"]),
        drivers=data["devices"]["drivers"],
        instant=_instant(data),
    )


def _instant(data: Mapping[str, Any]) -> Instant | None:
    """Kept ready in its default size when no size is named."""
    told = data["instant"]
    if told is None:
        return None
    sizes = told["sizes"] or [Size(data["cpus"].default, data["memory_mib"].default)]
    return Instant(told["ready"], told["share"], tuple(dict.fromkeys(sizes)))


def load_catalogue(folder: Path) -> tuple[dict[str, Machine], list[MachineError]]:
    """Every valid entry of a folder by name, and the errors of the others; one bad file hides no good one."""
    machines: dict[str, Machine] = {}
    errors: list[MachineError] = []
    for path in sorted(folder.glob("*.toml")):
        try:
            machines[path.stem] = parse_machine(path.stem, path.read_text("utf-8"))
        except MachineError as error:
            errors.append(error)
        except (OSError, UnicodeDecodeError) as error:
            errors.append(MachineError(path.stem, [f"can't be read: {error}"]))
    return machines, errors
