"""`build-machine NAME --out DIR`: builds a machine's image and its catalogue entry."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from machines.builder import bare, debian
from machines.builder.recipe import Recipe, load, names
from machines.builder.store import Cache, Store
from machines.builder.system import BuildError, Failure, System

BUILDERS: dict[str, Callable[[Recipe, Path, System], Path]] = {"bare": bare.build, "debian": debian.build}

OURS = Path(__file__).resolve().parents[1]


def build_machine(recipe: Recipe, store: Store, cache: Cache | None, force: bool, system: System) -> None:
    """Build unless the image is there already, made from the same inputs; `force` builds in any case."""
    kind = recipe.build.get("builder")
    if not isinstance(kind, str) or kind not in BUILDERS:
        text = f"{recipe.sources / 'build.toml'}: builder must be one of {', '.join(sorted(BUILDERS))}, not {kind!r}."
        raise BuildError(Failure.RECIPE, text)
    inputs = recipe.inputs()
    store.prepare()

    def waiting() -> None:
        system.step("wait for another build of this machine")

    with store.work_folder(recipe.name, waiting, system.remove) as work:
        if not force and store.is_current(recipe, inputs):
            system.step(f"{recipe.name} is up to date: {store.images / recipe.file}")
            return
        built = work / "cached"
        if not force and cache and cache.fetch(recipe, inputs, built):
            system.step("take the image from the cache")
        else:
            built = BUILDERS[kind](recipe, work, system)
            if cache:
                cache.keep(recipe, inputs, built)
        size = built.stat().st_size
        digest = store.publish(recipe, built, inputs)
    system.step(f"{recipe.name} is ready: {store.images / recipe.file}, {size / (1 << 20):.1f} MiB, sha256 {digest}")


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None, system: System | None = None) -> int:
    """Run the command and return its exit code."""
    codes = ", ".join(f"{failure.exit_code} {failure.reason}" for failure in Failure)
    parser = argparse.ArgumentParser(
        prog="build-machine",
        description="Build DIR/images/FILE and DIR/catalogue/NAME.toml from Debian packages.",
        epilog=f"Machines here: {', '.join(names(OURS))}. Exit codes: 0 done, {codes}, 128+n ended by signal n.",
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the results go")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="keep finished images here for other --out folders")
    parser.add_argument("--recipes", metavar="DIR", type=Path, default=OURS, help="your own recipes, not ours")
    parser.add_argument("--force", action="store_true", help="build even when nothing has changed")
    options = parser.parse_args(arguments)
    system = system or System()
    try:
        recipe = load(options.recipes.resolve(), options.name)
        cache = Cache(options.cache.resolve()) if options.cache else None
        build_machine(recipe, Store(options.out.resolve()), cache, options.force, system)
    except BuildError as error:
        failure, text = error.failure, str(error)
    except OSError as error:
        failure = Failure.SPACE if error.errno in (28, 122) else Failure.STEP
        text = f"{error.filename or options.out}: {error.strerror}"
    else:
        return 0
    print(f"build-machine: {failure.reason}: {text}", file=sys.stderr)
    return failure.exit_code


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(ending, _stop)
    sys.exit(main())
