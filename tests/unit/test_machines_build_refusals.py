"""How the image builder fails: reason, exit code and sentence, and nothing done that need not be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.image_builds import Spawner, system, write_recipe

from machines.builder import __main__ as command
from machines.builder.system import BuildError, Failure, System, classify


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipes")


def run(capsys: pytest.CaptureFixture[str], given: System, *arguments: str) -> tuple[int, str]:
    code = command.main(arguments, given)
    return code, capsys.readouterr().err


def test_no_space_is_said_before_anything_is_done(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spawner = Spawner()
    arguments = ("sample", "--out", str(tmp_path / "out"), "--recipes", str(recipes))
    code, text = run(capsys, system(spawner, free=3), *arguments)
    assert code == Failure.SPACE.exit_code == 4
    assert text.startswith("build-machine: no_space: ")
    assert "has 3 MiB left and the build needs" in text
    assert spawner.commands == []
    assert not (tmp_path / "out/images/sample.iso").exists()


def test_space_that_ends_while_building_is_told_apart(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spawner = Spawner(gcc=(1, "cc1: fatal error: /x/main.o: No space left on device"))
    code, text = run(capsys, system(spawner), "sample", "--out", str(tmp_path), "--recipes", str(recipes))
    assert (code, "There is no disk space left" in text) == (4, True)


def test_a_mirror_that_does_not_answer_is_said(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spawner = Spawner(install=(100, "E: Failed to fetch http://mirror/x.deb  Could not resolve 'mirror'"))
    given = system(spawner, missing=["xorriso"])
    code, text = run(capsys, given, "sample", "--out", str(tmp_path), "--recipes", str(recipes))
    assert (code, text.split(":")[1].strip()) == (5, "mirror_unreachable")
    assert "Could not resolve 'mirror'" in text
    assert [line[2] for line in spawner.commands] == ["install", "update", "install"]


def test_an_unknown_builder_is_refused(recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipes / "sample/build.toml").write_text('builder = "magic"\n')
    code, text = run(capsys, system(), "sample", "--out", str(tmp_path), "--recipes", str(recipes))
    assert (code, "must be one of bare, debian" in text) == (2, True)


def test_an_out_folder_that_cannot_be_made_is_said(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, text = run(capsys, system(), "sample", "--out", str(tmp_path / "file/x"), "--recipes", str(recipes))
    assert (code, "Not a directory" in text) == (6, True)


def test_missing_tools_are_installed_by_root(tmp_path: Path) -> None:
    installed: set[str] = set()

    def spawn(argv: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
        assert env["DEBIAN_FRONTEND"] == "noninteractive"
        installed.update(argv[argv.index("install") :] if "install" in argv else [])
        return 0, ""

    given = system()
    given.spawn = spawn
    given.which = lambda tool: tool if tool == "apt-get" or "binutils" in installed else None
    given.need_tools({"ld": "binutils", "objcopy": "binutils", "xorriso": "xorriso"})
    assert {"binutils", "xorriso"} < installed


def test_missing_tools_without_root_or_sudo_are_named() -> None:
    spawner = Spawner()
    with pytest.raises(BuildError, match=r"as root: apt-get .*install .*xorriso") as caught:
        system(spawner, root=False, missing=["xorriso", "sudo"]).need_tools({"xorriso": "xorriso"})
    assert caught.value.failure is Failure.TOOL
    assert spawner.commands == []


def test_sudo_does_not_ask_where_nobody_answers() -> None:
    spawner = Spawner(sudo=(1, "sudo: a password is required"))
    with pytest.raises(BuildError, match="a password is required") as caught:
        system(spawner, root=False, missing=["xorriso"]).need_tools({"xorriso": "xorriso"})
    assert caught.value.failure is Failure.TOOL
    assert spawner.commands[0][:2] == ["sudo", "-n"]


def test_a_package_that_brings_no_tool_is_said() -> None:
    with pytest.raises(BuildError, match="xorriso are installed, but xorriso are still missing"):
        system(missing=["xorriso"]).need_tools({"xorriso": "xorriso"})


def test_without_user_ids_root_is_asked_for() -> None:
    spawner = Spawner(unshare=(1, "unshare: failed to find subuid"))
    with pytest.raises(BuildError, match=r"needs root: run it by sudo, or .*usermod") as caught:
        system(spawner, root=False).root_prefix()
    assert caught.value.failure is Failure.PRIVILEGE
    assert "--user" not in system(root=True).root_prefix()


@pytest.mark.parametrize(
    ("output", "failure"),
    [
        ("mke2fs: Could not allocate block in ext2 filesystem while populating", Failure.SPACE),
        ("W: Temporary failure resolving 'mirror.example'", Failure.MIRROR),
        ("E: apt-get update --error-on=any -oAPT::Status-Fd=<$fd> failed", Failure.MIRROR),
        ("E: Unable to locate package nonsense", Failure.MIRROR),
        ("syntax error", Failure.STEP),
    ],
)
def test_output_tells_why(output: str, failure: Failure) -> None:
    assert classify(output) is failure
