"""For tests of the image builder: makes machines.builder importable, a sample recipe, a machine made of answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from machines.builder.system import System  # noqa: E402

ENTRY = """\
title = "Sample"    # a comment that stays
os = "linux"

[image]
file = "sample.iso"
format = "iso"      # and so does this

[display]
video = "std"
"""


class Spawner:
    """Stands in for processes: remembers commands; answers by their program's name."""

    def __init__(self, **answers: tuple[int, str]) -> None:
        self.answers = answers
        self.commands: list[list[str]] = []

    def __call__(self, argv: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
        self.commands.append(list(argv))
        for word in argv:
            if word.replace("-", "_") in self.answers:
                return self.answers[word.replace("-", "_")]
        return 0, ""


def system(
    spawner: Spawner | None = None, free: int = 1 << 20, root: bool = True, missing: Sequence[str] = ()
) -> System:
    return System(
        spawn=spawner or Spawner(),
        which=lambda tool: None if tool in missing else f"/usr/bin/{tool}",
        free_mib=lambda folder: free,
        is_root=lambda: root,
        has_terminal=lambda: False,
        clock=lambda: 0.0,
        say=lambda text: None,
    )


def write_recipe(folder: Path) -> Path:
    """A folder with one good recipe, "sample", for the builder "bare"."""
    (folder / "sample").mkdir(parents=True)
    (folder / "sample.toml").write_text(ENTRY)
    (folder / "sample/build.toml").write_text('builder = "bare"\n')
    (folder / "sample/main.c").write_text("int main;\n")
    return folder
