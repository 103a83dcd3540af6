"""The image builder's logic: recipes, what is put where and when. Images themselves: tests/system."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import tomllib
from pathlib import Path

import pytest
from support.image_builds import ENTRY, ROOT, system, write_recipe
from support.qmp import wait_for

from deskfleet.schemas.machine import parse_machine
from machines.builder import __main__ as command
from machines.builder import debian, recipe, store
from machines.builder.system import BuildError, Failure, System


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder with one good recipe."""
    return write_recipe(tmp_path / "recipes")


@pytest.fixture
def sample(recipes: Path) -> recipe.Recipe:
    return recipe.load(recipes, "sample")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the "bare" builder by one that writes a short file; holds the machines it has built."""
    done: list[str] = []

    def build(what: recipe.Recipe, work: Path, _system: System) -> Path:
        done.append(what.name)
        image = work / "image"
        image.write_bytes(b"image of " + what.name.encode())
        return image

    monkeypatch.setitem(command.BUILDERS, "bare", build)
    return done


def files(folder: Path) -> set[str]:
    """All files below, but for the builder's own state."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("images/.build/")}


# ---- Recipes


@pytest.mark.parametrize("name", ["tiny", "desktop"])
def test_our_recipes_make_valid_catalogue_entries(name: str) -> None:
    ours = recipe.load(ROOT / "machines", name)
    machine = parse_machine(name, recipe.catalogue_entry(ours, "ab" * 32))
    assert (machine.file, machine.format, machine.sha256) == (ours.file, ours.format, "ab" * 32)


def test_our_recipes_have_valid_settings() -> None:
    assert recipe.settings(recipe.load(ROOT / "machines", "tiny"), {}) == {}
    assert recipe.settings(recipe.load(ROOT / "machines", "desktop"), debian.KEYS)["packages"]
    assert recipe.names(ROOT / "machines") == ["desktop", "tiny"]


def test_the_entry_keeps_every_line_as_written(sample: recipe.Recipe) -> None:
    added = 'sha256 = "' + "cd" * 32 + '"\n'
    entry = recipe.catalogue_entry(sample, "cd" * 32)
    assert added in entry
    assert entry.replace(added, "") == ENTRY


@pytest.mark.parametrize("name", ["", "../tiny", "Tiny", "a b", "-a", "a" * 49])
def test_a_bad_name_is_refused(recipes: Path, name: str) -> None:
    with pytest.raises(BuildError, match="not a machine's name") as caught:
        recipe.load(recipes, name)
    assert caught.value.failure is Failure.RECIPE


def test_an_unknown_machine_is_refused_with_the_known_ones(recipes: Path) -> None:
    with pytest.raises(BuildError, match=r"other\.toml\. Machines here: sample\."):
        recipe.load(recipes, "other")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"sample.iso"', '"../sample.iso"', "bare file name"),
        ('"sample.iso"', '"/etc/passwd"', "bare file name"),
        ('"sample.iso"', '".hidden"', "bare file name"),
        ('"sample.iso"', "7", "bare file name"),
        ('format = "iso"', "", "format is missing"),
        ('format = "iso"', 'format = "iso"\nsha256 = "00"', "leave image.sha256 out"),
        ("[image]", "[picture]", r"no \[image\] table"),
        ('title = "Sample"', "title = ", "not valid TOML"),
    ],
)
def test_a_bad_entry_is_refused(recipes: Path, old: str, new: str, says: str) -> None:
    (recipes / "sample.toml").write_text(ENTRY.replace(old, new))
    with pytest.raises(BuildError, match=says) as caught:
        recipe.load(recipes, "sample")
    assert caught.value.failure is Failure.RECIPE


def test_an_entry_that_no_line_can_be_added_to_is_refused(recipes: Path) -> None:
    (recipes / "sample.toml").write_text('image = { file = "a.iso", format = "iso" }\n')
    with pytest.raises(BuildError, match="one a line below an"):
        recipe.catalogue_entry(recipe.load(recipes, "sample"), "ab" * 32)


def test_a_recipe_without_build_settings_is_refused(recipes: Path) -> None:
    (recipes / "sample/build.toml").unlink()
    with pytest.raises(BuildError, match=r"There is no .*build\.toml"):
        recipe.load(recipes, "sample")


def test_settings_name_every_problem_at_once(recipes: Path) -> None:
    text = 'builder = "debian"\nsuite = 12\npackages = ["a", 1]\nextra = 1\n'
    (recipes / "sample/build.toml").write_text(text)
    with pytest.raises(BuildError) as caught:
        recipe.settings(recipe.load(recipes, "sample"), {"suite": str, "packages": list, "kernel": str})
    for problem in ("unknown key extra", "kernel is missing", "suite must be a str", "packages must hold strings"):
        assert problem in str(caught.value)


def test_inputs_follow_entry_sources_and_mode(recipes: Path) -> None:
    seen = {recipe.load(recipes, "sample").inputs()}
    assert recipe.load(recipes, "sample").inputs() in seen
    for change in (
        lambda: (recipes / "sample.toml").write_text(ENTRY.replace("Sample", "Other")),
        lambda: (recipes / "sample/main.c").write_text("int other;\n"),
        lambda: (recipes / "sample/main.c").rename(recipes / "sample/guest.c"),
        lambda: (recipes / "sample/guest.c").chmod(0o755),
    ):
        change()
        inputs = recipe.load(recipes, "sample").inputs()
        assert inputs not in seen
        seen.add(inputs)


# ---- Putting results in place


def build(sample: recipe.Recipe, out: Path, cache: Path | None = None, force: bool = False) -> None:
    kept = store.Cache(cache) if cache else None
    command.build_machine(sample, store.Store(out), kept, force, system())


def test_a_build_writes_image_and_entry_once(sample: recipe.Recipe, tmp_path: Path, builds: list[str]) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        build(sample, out)
    assert builds == ["sample"]
    assert files(out) == {"images/sample.iso", "catalogue/sample.toml"}
    entry = tomllib.loads((out / "catalogue/sample.toml").read_text())
    assert entry["image"]["sha256"] == store.file_digest(out / "images/sample.iso")
    build(sample, out, force=True)
    assert builds == ["sample", "sample"]


@pytest.mark.parametrize("name", ["images/sample.iso", "catalogue/sample.toml", "images/.build/sample.json"])
@pytest.mark.parametrize("harm", ["remove", "change"])
def test_what_is_missing_or_changed_is_built_again(
    sample: recipe.Recipe, tmp_path: Path, builds: list[str], name: str, harm: str
) -> None:
    build(sample, tmp_path)
    path = tmp_path / name
    before = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(b"[" + before[1:])
    build(sample, tmp_path)
    assert path.read_bytes() == before
    assert len(builds) == 2


@pytest.mark.parametrize("error", [BuildError(Failure.STEP, "no"), KeyboardInterrupt(), SystemExit(143)])
def test_a_build_that_ends_early_changes_nothing(
    sample: recipe.Recipe, tmp_path: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    build(sample, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(_recipe: recipe.Recipe, work: Path, _system: System) -> Path:
        (work / "half").write_bytes(b"half an image")
        raise error

    monkeypatch.setitem(command.BUILDERS, "bare", fail)
    with pytest.raises(type(error)):
        build(sample, tmp_path, force=True)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert not list((tmp_path / "images/.build").glob("*.work"))
    monkeypatch.undo()


def test_a_crash_between_image_and_entry_is_made_good(
    sample: recipe.Recipe, tmp_path: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def crash(target: Path, text: str) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", crash)
        with pytest.raises(SystemExit):
            build(sample, out)
    assert files(out) == {"images/sample.iso"}
    build(sample, out)
    assert builds == ["sample", "sample"]
    assert files(out) == {"images/sample.iso", "catalogue/sample.toml"}


def test_the_cache_serves_another_folder(sample: recipe.Recipe, tmp_path: Path, builds: list[str]) -> None:
    for out in ("a", "b"):
        build(sample, tmp_path / out, tmp_path / "cache")
    assert builds == ["sample"]
    assert (tmp_path / "b/images/sample.iso").read_bytes() == b"image of sample"


def test_a_damaged_cache_is_not_used(sample: recipe.Recipe, tmp_path: Path, builds: list[str]) -> None:
    build(sample, tmp_path / "a", tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("image")
    kept.write_bytes(b"image of something else")
    build(sample, tmp_path / "b", tmp_path / "cache")
    assert builds == ["sample", "sample"]
    assert (tmp_path / "b/images/sample.iso").read_bytes() == b"image of sample"


def test_the_cache_holds_the_newest_image_alone(recipes: Path, tmp_path: Path, builds: list[str]) -> None:
    for number in range(3):
        (recipes / "sample/main.c").write_text(f"int version = {number};\n")
        build(recipe.load(recipes, "sample"), tmp_path / "out", tmp_path / "cache")
    assert len(builds) == 3
    assert len(list((tmp_path / "cache/sample").iterdir())) == 1


def test_a_second_build_waits_and_then_has_nothing_to_do(
    sample: recipe.Recipe, tmp_path: Path, builds: list[str]
) -> None:
    build(sample, tmp_path)
    said: list[str] = []
    other = system()
    other.say = said.append
    with (tmp_path / "images/.build/sample.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(
            target=lambda: command.build_machine(sample, store.Store(tmp_path), None, False, other)
        )
        thread.start()
        wait_for(lambda: any("wait for another build" in text for text in said), "the message")
        assert thread.is_alive()
    thread.join()
    assert "up to date" in said[-1]
    assert builds == ["sample"]


def test_a_killed_build_leaves_nothing(recipes: Path, tmp_path: Path) -> None:
    """The real command, killed by SIGTERM and by SIGKILL while its compiler runs."""
    out, tools = tmp_path / "out", tmp_path / "tools"
    tools.mkdir()
    (tools / "gcc").write_text(f"#!/bin/sh\necho $$ >{tmp_path}/running\nexec sleep 600\n")
    (tools / "gcc").chmod(0o755)
    argv = ["bash", str(ROOT / "deploy/build-machine"), "sample", "--out", str(out), "--recipes", str(recipes)]
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    for number in (signal.SIGTERM, signal.SIGKILL):
        (tmp_path / "running").unlink(missing_ok=True)
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: (tmp_path / "running").exists() and (tmp_path / "running").read_text(), "the compiler")
        compiler = int((tmp_path / "running").read_text())
        process.send_signal(number)
        assert process.wait() == (143 if number == signal.SIGTERM else -number)
        assert files(out) == set()
        if number == signal.SIGTERM:
            assert not list((out / "images/.build").glob("*.work"))
            with pytest.raises(ProcessLookupError):
                os.kill(compiler, 0)
        else:
            os.kill(compiler, signal.SIGKILL)
    (tools / "gcc").write_text("#!/bin/sh\necho no luck; exit 1\n")
    again = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == Failure.STEP.exit_code
    assert "no luck" in again.stderr
    assert not list((out / "images/.build").glob("*.work"))
