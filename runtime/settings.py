"""The settings file: one TOML file for all services, a section each, checked whole before anything starts.

A value comes from the environment (DESKFLEET_SECTION__KEY), else from the file. KEY_file names a file that holds the
value of KEY. There are no default secrets, and an unknown key is an error: a misspelt one would silently mean the
default.
"""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields

from deskfleet.runtime.secret import Secret, register
from deskfleet.schemas.errors import DeskfleetError

Network = IPv4Network | IPv6Network

#: Keys that sign or seal must have at least this many characters.
SHORTEST_KEY = 32

_PREFIX = "DESKFLEET_"
_FILE = "_file"
_LARGEST_SECRET = 65_536
# systemd keeps credentials (LoadCredential=) in a folder of the unit's own and sets their modes as it likes.
_CREDENTIALS = Path("/run/credentials")


class SettingsError(DeskfleetError):
    """Raised when the settings are not valid; `problems` holds a line "section.key: what is wrong" for each fault."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class SecretField(fields.String):
    """A string that becomes a Secret."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        return Secret(str(super()._deserialize(value, attr, data, **kwargs)))


class KeysField(fields.Field[tuple[Secret, ...]]):
    """A list of keys, or a text with one key a word (as a file of keys holds them)."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> tuple[Secret, ...]:
        keys = value.split() if isinstance(value, str) else value
        if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
            raise ValidationError("must be a list of keys, or one text with a key a line")
        if any(len(key) < SHORTEST_KEY for key in keys):
            raise ValidationError(f"each key must have at least {SHORTEST_KEY} characters")
        return tuple(Secret(key) for key in keys)


class NetworkField(fields.Field[Network]):
    """An IPv4 or IPv6 network, such as 10.0.0.0/8."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Network:
        try:
            return ip_network(value)
        except ValueError as error:
            raise ValidationError(f"is not a network: {error}") from None


def load(
    path: Path,
    section_schemas: Mapping[str, Schema],
    environ: Mapping[str, str],
    known_sections: Collection[str] = (),
) -> dict[str, Any]:
    """What each schema makes of its section of the file at `path`. Raises SettingsError with all faults at once.

    `known_sections` are those of other services, which may stand in the file and are not looked at.
    """
    document = _read(path)
    problems: list[str] = []
    every_name = sorted({*section_schemas, *known_sections})
    for name, value in document.items():
        if not isinstance(value, dict):
            problems.append(f"{name}: must stand in a section; sections are {', '.join(every_name)}")
        elif name not in every_name:
            problems.append(f"{name}: unknown section{_meant(name, every_name)}")
    sections = {name: document.get(name, {}) for name in section_schemas}
    sections = {name: dict(value) if isinstance(value, dict) else {} for name, value in sections.items()}
    problems += _override(sections, section_schemas, environ, known_sections)
    result: dict[str, Any] = {}
    for name, schema in section_schemas.items():
        unreadable: dict[str, str] = {}
        values = _fetch(sections[name], schema, name, unreadable)
        problems += unreadable.values()
        try:
            result[name] = schema.load(values, unknown=RAISE)
        except ValidationError as error:
            # What could not be read is missing as well; saying so would send people the wrong way.
            lines = _flatten(error.messages, name, schema)
            problems += [line for line in lines if line.split(": ")[0] not in unreadable]
    if problems:
        raise SettingsError(problems)
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise SettingsError([f"{path}: is not UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([f"{path}: is not TOML: {error}"]) from None


def _override(
    sections: dict[str, dict[str, Any]],
    schemas: Mapping[str, Schema],
    environ: Mapping[str, str],
    known_sections: Collection[str],
) -> list[str]:
    """Put the environment's values in; returns the problems. A deeper `__` goes into tables inside a section."""
    problems = []
    for variable in sorted(environ):
        # A name without "__" is not a setting: DESKFLEET_CONFIG and the like belong to whoever reads them.
        if not variable.startswith(_PREFIX) or "__" not in variable:
            continue
        name, *keys = variable.removeprefix(_PREFIX).lower().split("__")
        if name not in sections:
            if name not in known_sections:
                problems.append(f"{variable}: unknown section {name!r}{_meant(name, [*sections, *known_sections])}")
            continue
        if not all(keys):
            problems.append(f"{variable}: a key is missing")
            continue
        table: Any = sections[name]
        schema: Schema | None = schemas[name]
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            schema = _inner(schema, key)
            if not isinstance(table, dict):
                problems.append(f"{variable}: {key!r} is not a table")
                break
        else:
            field = schema.fields.get(keys[-1]) if schema else None
            table[keys[-1]] = _parse(environ[variable], field)
            # An override replaces the other way to give the same value.
            twin = keys[-1].removesuffix(_FILE) if keys[-1].endswith(_FILE) else keys[-1] + _FILE
            table.pop(twin, None)
    return problems


def _parse(text: str, field: fields.Field[Any] | None) -> Any:
    """A TOML value where it is one, else the text itself; digits meant for a text field stay text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if len(parsed) != 1 or (isinstance(field, fields.String) and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _inner(schema: Schema | None, key: str) -> Schema | None:
    field = schema.fields.get(key) if schema else None
    if isinstance(field, fields.List):
        field = field.inner
    return field.schema if isinstance(field, fields.Nested) else None


def _fetch(values: dict[str, Any], schema: Schema, where: str, problems: dict[str, str]) -> dict[str, Any]:
    """`values` with every KEY_file replaced by KEY, also in nested tables and lists of them.

    `problems` gets a line for each KEY that has none, by its full name.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        target = key.removesuffix(_FILE)
        inner = _inner(schema, key)
        if target != key and key not in schema.fields and target in schema.fields:
            if target in values:
                problems[f"{where}.{target}"] = f"{where}.{key}: {target} is set as well; keep one of the two"
                continue
            try:
                result[target] = read_secret(value)
            except SettingsError as error:
                problems[f"{where}.{target}"] = f"{where}.{key}: {error}"
        elif inner is not None and isinstance(value, dict):
            result[key] = _fetch(value, inner, f"{where}.{key}", problems)
        elif inner is not None and isinstance(value, list):
            result[key] = [
                _fetch(item, inner, f"{where}.{key}[{i}]", problems) if isinstance(item, dict) else item
                for i, item in enumerate(value)
            ]
        else:
            result[key] = value
    return result


def read_secret(name: Any) -> str:
    """The text of a secret's file without its last line break; SettingsError when others could read it.

    The log strikes it out from here on. The file is opened once and examined by its descriptor, so that nothing can
    be swapped in between; O_NONBLOCK, so that a pipe cannot hold up the start.
    """
    if not isinstance(name, str) or not name.startswith("/"):
        raise SettingsError(["must be the absolute path of a file"])
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError([f"{name} cannot be opened: {reason}"]) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SettingsError([f"{name} is not a regular file"])
        private = Path(os.path.realpath(name)).is_relative_to(_CREDENTIALS)
        if status.st_mode & 0o077 and not private:
            mode = stat.S_IMODE(status.st_mode)
            raise SettingsError([f"{name} is open to others than its owner (mode {mode:04o}); chmod 600 it"])
        raw = os.read(descriptor, _LARGEST_SECRET + 1)
    except OSError as error:
        raise SettingsError([f"{name} cannot be read: {error.strerror}"]) from None
    finally:
        os.close(descriptor)
    if len(raw) > _LARGEST_SECRET:
        raise SettingsError([f"{name} is larger than {_LARGEST_SECRET} bytes"])
    try:
        text = raw.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise SettingsError([f"{name} is not UTF-8"]) from None
    if not text:
        raise SettingsError([f"{name} is empty"])
    register(text)
    return text


def _flatten(messages: Any, where: str, schema: Schema | None) -> list[str]:
    """marshmallow's tree of messages as lines."""
    if isinstance(messages, str):
        return [f"{where}: {messages}"]
    if isinstance(messages, list):
        return [line for message in messages for line in _flatten(message, where, schema)]
    lines = []
    for key, value in messages.items():
        if key == "_schema":
            lines += _flatten(value, where, schema)
        elif isinstance(key, int):
            lines += _flatten(value, f"{where}[{key}]", schema)
        elif value == ["Unknown field."]:
            lines.append(f"{where}.{key}: unknown key{_meant(key, schema.fields if schema else ())}")
        else:
            lines += _flatten(value, f"{where}.{key}", _inner(schema, key))
    return lines


def _meant(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
