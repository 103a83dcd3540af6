"""The catalogue: recipes of the repository are valid, and everything wrong with an entry is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskfleet.schemas.catalogue import Catalogue
from deskfleet.schemas.errors import MachineError
from deskfleet.schemas.machine import Drivers, GpuPolicy, load_catalogue, parse_machine
from deskfleet.schemas.session import Resources

RECIPES = Path(__file__).parents[2] / "machines"
DIGEST = f'sha256 = "{"a" * 64}"'


def recipe(name: str) -> str:
    return (RECIPES / f"{name}.toml").read_text().replace("[image]", f"[image]\n{DIGEST}")


@pytest.mark.parametrize("name", ["tiny", "desktop"])
def test_the_recipes_are_valid_once_their_digest_is_known(name: str) -> None:
    machine = parse_machine(name, recipe(name))
    assert machine.problems(machine.defaults) == []
    with pytest.raises(MachineError, match="sha256"):
        parse_machine(name, (RECIPES / f"{name}.toml").read_text())


def test_drivers_are_virtio_unless_the_entry_says_otherwise() -> None:
    assert parse_machine("desktop", recipe("desktop")).drivers is Drivers.VIRTIO
    assert parse_machine("tiny", recipe("tiny")).drivers is Drivers.COMPATIBLE
    with pytest.raises(MachineError, match=r"devices\.drivers"):
        parse_machine("tiny", recipe("tiny").replace('"compatible"', '"none"'))


def test_every_fault_is_said_at_once() -> None:
    text = recipe("tiny").replace('file = "tiny.iso"', 'file = "../../etc/passwd"').replace("max = 2", "max = 0")
    with pytest.raises(MachineError) as caught:
        parse_machine("tiny", text + "\n[extra]\nx = 1\n")
    said = " ".join(caught.value.problems)
    assert "image.file" in said and "cpus" in said and "extra" in said


@pytest.mark.parametrize("name", ["", "-rf", "A", "a b", "a/b", "x" * 49, "a\n"])
def test_c26_a_machine_name_is_never_a_path_or_an_option(name: str) -> None:
    with pytest.raises(MachineError):
        parse_machine(name, recipe("tiny"))


@pytest.mark.parametrize("file", ["/etc/passwd", "../x", "-x", "a,b", "a b", ".hidden", "x" * 200, "a/b"])
def test_c26_an_image_is_a_bare_file_name(file: str) -> None:
    with pytest.raises(MachineError):
        parse_machine("tiny", recipe("tiny").replace("tiny.iso", file))


def test_what_a_machine_allows() -> None:
    machine = parse_machine("tiny", recipe("tiny"))
    assert machine.allows("anybody")
    assert len(machine.problems(Resources(99, 1, 99, 1))) == 4
    closed = parse_machine(
        "tiny",
        recipe("tiny").replace('users = ["*"]', 'users = ["ann"]\ngroups = ["lab"]').replace("groups = []\n", ""),
    )
    assert closed.allows("ann") and closed.allows("bo", ("lab",))
    assert not closed.allows("an") and not closed.allows("bo", ("labs",)) and not closed.allows("*")
    gpu = parse_machine("tiny", recipe("tiny").replace('policy = "never"', 'policy = "required"\nmodels = ["A100"]'))
    assert gpu.gpu is GpuPolicy.REQUIRED and gpu.defaults.gpus == 1
    assert gpu.problems(Resources(1, 128, 1)) and gpu.problems(Resources(1, 128, 1, 1, "T4"))
    assert gpu.problems(Resources(1, 128, 1, 1, "A100")) == []


def test_one_bad_file_hides_no_good_one(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(recipe("tiny"))
    (tmp_path / "bad.toml").write_text("title = ")
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    machines, errors = load_catalogue(tmp_path)
    assert list(machines) == ["tiny"]
    assert {error.name for error in errors} == {"bad", "binary"}


def test_the_catalogue_notices_changes(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    assert catalogue.machines() == {}
    (tmp_path / "tiny.toml").write_text(recipe("tiny"))
    assert list(catalogue.machines()) == ["tiny"]
    assert catalogue.machines() is catalogue.machines()
    (tmp_path / "tiny.toml").unlink()
    assert catalogue.machines() == {}
