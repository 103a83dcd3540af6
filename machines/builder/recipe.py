"""A machine's recipe: its catalogue entry without the image's digest, and the settings of the build."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machines.builder.system import BuildError, Failure

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")
BARE_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Recipe:
    """NAME.toml and the folder NAME beside it, which holds build.toml and the image's sources."""

    name: str
    entry: str
    file: str
    format: str
    sources: Path
    build: Mapping[str, Any]

    def inputs(self) -> str:
        """SHA-256 over all that decides what the image is: this builder, the entry and the sources."""
        digest = hashlib.sha256(self.entry.encode())
        builder = Path(__file__).parent
        for root, pattern in ((builder, "*.py"), (self.sources, "**/*")):
            for path in sorted(root.glob(pattern)):
                if path.is_file():
                    mode = path.stat().st_mode & 0o111
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                    digest.update(f"{path.relative_to(root)} {mode} {content}\n".encode())
        return digest.hexdigest()


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BuildError(Failure.RECIPE, f"There is no {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(Failure.RECIPE, f"{path} cannot be read: {error}") from error
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BuildError(Failure.RECIPE, f"{path} is not valid TOML: {error}") from error


def names(folder: Path) -> list[str]:
    """The machines that this folder has recipes for."""
    return sorted(path.stem for path in folder.glob("*.toml") if (folder / path.stem / "build.toml").exists())


def load(folder: Path, name: str) -> Recipe:
    """Read a recipe; BuildError says what is wrong with it."""
    if not NAME.fullmatch(name):
        raise BuildError(
            Failure.RECIPE, f"{name!r} is not a machine's name: small letters, digits and '-', at most 48."
        )
    path = folder / f"{name}.toml"
    if not path.exists():
        raise BuildError(Failure.RECIPE, f"There is no {path}. Machines here: {', '.join(names(folder)) or 'none'}.")
    entry, parsed = _parse(path)
    image = parsed.get("image")
    if not isinstance(image, dict):
        raise BuildError(Failure.RECIPE, f"{path} has no [image] table.")
    file, kind = image.get("file"), image.get("format")
    if not isinstance(file, str) or not BARE_FILE.fullmatch(file):
        text = f"{path}: image.file must be a bare file name (letters, digits, '.', '_', '-'), not {file!r}."
        raise BuildError(Failure.RECIPE, text)
    if not isinstance(kind, str):
        raise BuildError(Failure.RECIPE, f"{path}: image.format is missing.")
    if "sha256" in image:
        raise BuildError(Failure.RECIPE, f"{path}: leave image.sha256 out, the build writes it.")
    _, build = _parse(folder / name / "build.toml")
    return Recipe(name, entry, file, kind, folder / name, build)


def settings(recipe: Recipe, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The values of build.toml besides `builder`; every key of `kinds` must be there, and no other."""
    path = recipe.sources / "build.toml"
    values = {key: value for key, value in recipe.build.items() if key != "builder"}
    problems = [f"unknown key {key}" for key in sorted(set(values) - set(kinds))]
    problems += [f"{key} is missing" for key in sorted(set(kinds) - set(values))]
    for key, kind in kinds.items():
        if key in values and not isinstance(values[key], kind):
            problems.append(f"{key} must be a {kind.__name__}")
        elif kind is list and not all(isinstance(item, str) for item in values.get(key, [])):
            problems.append(f"{key} must hold strings")
    if problems:
        raise BuildError(Failure.RECIPE, f"{path}: {'; '.join(problems)}.")
    return values


def catalogue_entry(recipe: Recipe, sha256: str) -> str:
    """The entry with the image's digest below its format. The rest stays as written, comments too."""
    lines = recipe.entry.splitlines()
    table, at = "", None
    for index, line in enumerate(lines):
        if header := re.fullmatch(r"\s*\[([^\[\]]+)\]\s*(#.*)?", line):
            table = header[1].strip()
        elif table == "image" and re.match(r"\s*format\s*=", line):
            at = index + 1
    if at is not None:
        lines.insert(at, f'sha256 = "{sha256}"')
    text = "\n".join(lines) + "\n"
    wanted = tomllib.loads(recipe.entry)
    wanted["image"]["sha256"] = sha256
    if tomllib.loads(text) != wanted:
        text = f"{recipe.name}.toml: write the image's keys one a line below an [image] line."
        raise BuildError(Failure.RECIPE, text)
    return text
