"""deskfleet machine …: real images through the real command, and what is refused leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from deskfleet.portal.cli import main
from deskfleet.portal.machine_files import MachineFilesError, Wish, entry, with_disk_sizes
from deskfleet.schemas.machine import Drivers, Firmware, Format, Machine, Os, Range, Video, parse_machine

MIB = 1 << 20
Run = Callable[..., Result]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A catalogue, an image folder, and a settings file that names them."""
    for folder in ("catalogue", "images", "in"):
        (tmp_path / folder).mkdir()
    settings = f'[machines]\ncatalogue = "{tmp_path}/catalogue"\nimages = "{tmp_path}/images"\n'
    (tmp_path / "deskfleet.toml").write_text(settings)
    return tmp_path


@pytest.fixture
def run(site: Path) -> Run:
    def call(*arguments: str | Path) -> Result:
        line = ["machine", *(str(a) for a in arguments), "--config", str(site / "deskfleet.toml")]
        return CliRunner().invoke(main, line, catch_exceptions=False)

    return call


def disk(site: Path, kind: str, size: str = "8M", name: str = "") -> Path:
    """A disk that holds a MiB of sevens, in the folder of what comes from outside."""
    path = site / "in" / (name or f"disk.{kind}")
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, str(path), size], check=True)
    write = ["qemu-io", "-f", kind, "-c", "write -P 7 1M 1M", str(path)]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    return path


def same(one: Path, kind: str, other: Path, other_kind: str) -> bool:
    line = ["qemu-img", "compare", "-f", kind, "-F", other_kind, str(one), str(other)]
    return subprocess.run(line, check=False, stdout=subprocess.DEVNULL).returncode == 0


def made(site: Path, name: str = "office") -> Machine:
    return parse_machine(name, (site / f"catalogue/{name}.toml").read_text())


def nothing(site: Path) -> bool:
    return not [*(site / "images").iterdir(), *(site / "catalogue").iterdir()]


# --- import -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qcow2", "vdi", "vmdk", "raw"])
def test_an_import_copies_the_image_and_writes_its_entry(site: Path, run: Run, kind: str) -> None:
    source = disk(site, kind)
    source.chmod(0o600)
    before = source.read_bytes()
    claim = ["--format", "raw"] if kind == "raw" else []
    done = run("import", source, "--name", "office", *claim)
    assert done.exit_code == 0, done.output
    machine, image = made(site), site / f"images/office.{kind}"
    assert (machine.format, machine.file) == (Format(kind), image.name)
    assert machine.sha256 == hashlib.sha256(image.read_bytes()).hexdigest() in done.output
    assert image.read_bytes() == before == source.read_bytes()
    assert image.stat().st_mode & 0o777 == 0o644 and image.stat().st_uid == os.geteuid()
    assert machine.disk_gib == Range(1, 1, 64) and machine.users == ("*",) and machine.drivers is Drivers.VIRTIO
    assert sorted(p.name for p in (site / "images").iterdir()) == [image.name]
    assert run("check").output == "office: nothing wrong.\n"


@pytest.mark.parametrize("kind", ["qcow2", "vdi", "vmdk", "raw"])
def test_an_import_converts_when_it_is_asked(site: Path, run: Run, kind: str) -> None:
    source = disk(site, kind)
    done = run("import", source, "--name", "office", "--format", kind, "--convert", "qcow2")
    assert done.exit_code == 0, done.output
    image = site / "images/office.qcow2"
    assert made(site).format is Format.QCOW2 and same(source, kind, image, "qcow2")
    assert image.stat().st_uid == os.geteuid() and image.stat().st_mode & 0o777 == 0o644
    assert run("check", "office").exit_code == 0
    assert [p.name for p in (site / "images").iterdir()] == [image.name]


def test_everything_that_an_administrator_says_stands_in_the_entry(site: Path, run: Run) -> None:
    options = ["--title", 'Office "7"', "--text", "A\\B ä\x7f", "--os", "windows", "--firmware", "uefi"]
    options += ["--video", "qxl", "--cpus", "2:4:6", "--memory-mib", "4096", "--disk-gib", "20:40:80"]
    options += ["--user", "ann", "--group", "staff", "--group", "guests"]
    done = run("import", disk(site, "qcow2"), "--name", "office", *options)
    assert done.exit_code == 0, done.output
    machine = made(site)
    assert (machine.title, machine.text, machine.os) == ('Office "7"', "A\\B ä\x7f", Os.WINDOWS)
    assert (machine.firmware, machine.video, machine.drivers) == (Firmware.UEFI, Video.QXL, Drivers.COMPATIBLE)
    assert (machine.cpus, machine.memory_mib) == (Range(2, 4, 6), Range(4096, 4096, 4096))
    assert machine.disk_gib == Range(20, 40, 80)
    assert (machine.users, machine.groups) == (("ann",), ("staff", "guests"))


def test_a_cd_is_imported_as_it_is(site: Path, run: Run) -> None:
    tree, iso = site / "in/tree", site / "in/x.iso"
    tree.mkdir()
    (tree / "file").write_bytes(bytes(MIB))
    subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", str(iso), str(tree)], check=True)
    assert run("import", iso, "--name", "office", "--convert", "qcow2").exit_code == 1 and nothing(site)
    assert run("import", iso, "--name", "office").exit_code == 0
    assert made(site).format is Format.ISO and made(site).disk_gib == Range(1, 20, 200)
    assert run("check").exit_code == 0
    assert "starts from a CD" in run("export", "office", site / "x").output


def test_holes_stay_holes(site: Path, run: Run) -> None:
    source = disk(site, "raw", "256M")
    assert run("import", source, "--name", "office", "--format", "raw").exit_code == 0
    image = site / "images/office.raw"
    assert image.stat().st_size == 256 * MIB and image.stat().st_blocks * 512 < 8 * MIB


@pytest.mark.parametrize("name", ["../x", "a;touch pwned", "$(id)", "A", "", "a" * 49, "-x", "a\nb", "x,readonly=off"])
def test_c26_a_machine_s_name_is_a_name(site: Path, run: Run, name: str) -> None:
    done = run("import", disk(site, "qcow2"), f"--name={name}")
    assert done.exit_code == 1 and "is not a machine's name" in done.output and nothing(site)


def test_nothing_is_overwritten(site: Path, run: Run) -> None:
    source = disk(site, "qcow2")
    (site / "images/office.qcow2").write_text("another's")
    done = run("import", source, "--name", "office")
    assert done.exit_code == 1 and "exists already" in done.output
    assert (site / "images/office.qcow2").read_text() == "another's"
    assert [p.name for p in (site / "images").iterdir()] == ["office.qcow2"] and not made_entries(site)
    (site / "images/office.qcow2").unlink()
    assert run("import", source, "--name", "office").exit_code == 0
    entry_before = (site / "catalogue/office.toml").read_text()
    done = run("import", source, "--name", "office", "--title", "Another")
    assert done.exit_code == 1 and "already" in done.output
    assert (site / "catalogue/office.toml").read_text() == entry_before


def made_entries(site: Path) -> list[Path]:
    return list((site / "catalogue").iterdir())


def test_a_catalogue_that_can_t_be_written_leaves_no_image_either(site: Path, run: Run) -> None:
    (site / "catalogue").rmdir()
    assert run("import", disk(site, "qcow2"), "--name", "office").exit_code == 1
    assert list((site / "images").iterdir()) == []


def test_a_full_disk_leaves_nothing(site: Path, run: Run) -> None:
    source, (soft, hard) = disk(site, "qcow2"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))  # the same error path as a full disk
    try:
        done = run("import", source, "--name", "office")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.exit_code == 1 and "File too large" in done.output and nothing(site)


def test_c24_c25_what_is_not_safe_is_refused_by_name_and_leaves_nothing(site: Path, run: Run) -> None:
    inside = site / "in"
    (inside / "canary").write_bytes(b"secret" * 200_000)
    create = ["qemu-img", "create", "-q", "-f"]
    lines = [
        [*create, "qcow2", "-b", "canary", "-F", "raw", "backing.qcow2", "1M"],
        [*create, "qcow2", "-o", "data_file=data,data_file_raw=on", "data.qcow2", "1M"],
        [*create, "vmdk", "-o", "subformat=monolithicFlat", "flat.vmdk", "1M"],
        [*create, "qcow2", "-o", "cluster_size=2M", "huge.qcow2", "1P"],
    ]
    for line in lines:
        subprocess.run(line, check=True, cwd=inside)
    (inside / "link.qcow2").symlink_to(disk(site, "qcow2"))
    os.mkfifo(inside / "pipe.raw")
    (inside / "empty.raw").touch()
    (inside / "words.txt").write_text("no disk at all" * 100)
    (inside / "archive.gz").write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    short = disk(site, "qcow2", name="short.qcow2")
    os.truncate(short, short.stat().st_size - 600_000)
    refused = {
        "backing.qcow2": "(backing_file)",
        "data.qcow2": "(data_file)",
        "flat.vmdk": "(extent)",
        "huge.qcow2": "(too_large)",
        "link.qcow2": "(symlink)",
        "pipe.raw": "(not_a_file)",
        "empty.raw": "(empty)",
        "words.txt": "--format raw",
        "archive.gz": "(mismatch)",
        "short.qcow2": "(damaged)",
        "nothing": "(unreadable)",
        'json:{"driver":"raw"}': "(name)",
        "canary/..": "(unreadable)",
    }
    for name, why in refused.items():
        done = run("import", inside / name, "--name", "office")
        assert done.exit_code == 1 and why in done.output, (name, done.output)
        assert nothing(site), name
    for claimed in ("raw", "iso", "vdi", "vmdk"):
        done = run("import", inside / "disk.qcow2", "--name", "office", "--format", claimed)
        assert "(mismatch)" in done.output and nothing(site)


def test_the_limit_of_the_virtual_size_can_be_set(site: Path, run: Run) -> None:
    source = disk(site, "qcow2", "3G")
    assert "(too_large)" in run("import", source, "--name", "office", "--largest-gib", "2").output
    assert run("import", source, "--name", "office", "--largest-gib", "3").exit_code == 0
    assert made(site).disk_gib == Range(3, 3, 64)


def test_a_session_s_disk_can_t_be_smaller_than_the_image_s(site: Path, run: Run) -> None:
    done = run("import", disk(site, "qcow2", "3G"), "--name", "office", "--disk-gib", "2:4:8")
    assert done.exit_code == 1 and "3 GiB" in done.output and nothing(site)


@pytest.mark.parametrize("size", ["0", "4:2:8", "x", "1:2", "-1", "1:2:3:4"])
def test_sizes_that_make_no_sense_are_wrong_usage(site: Path, run: Run, size: str) -> None:
    assert run("import", disk(site, "qcow2"), "--name", "office", f"--cpus={size}").exit_code == 2


# --- list, check, export, resize --------------------------------------------------------------------------------


@pytest.fixture
def office(site: Path, run: Run) -> Path:
    """A site with one machine; its image."""
    assert run("import", disk(site, "vmdk", "2G"), "--name", "office", "--title", "Office").exit_code == 0
    return site / "images/office.vmdk"


def test_the_list_tells_what_is_here(site: Path, run: Run, office: Path) -> None:
    (site / "catalogue/broken.toml").write_text("title = 7")
    assert "Office" in run("list").output and "MiB" in run("list").output and "not valid" in run("list").output
    office.unlink()
    assert "not here" in run("list").output


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda image: image.unlink(), "unreadable"),
        (lambda image: image.chmod(0o600), "chmod 644"),
        (lambda image: os.truncate(image, 1000), "truncated"),
        (lambda image: os.truncate(image, image.stat().st_size + 1), "another SHA-256"),
        (lambda image: (image.rename(image.parent / "y"), image.symlink_to("y")), "symlink"),
    ],
    ids=["missing", "private", "cut", "changed", "link"],
)
def test_check_finds_what_is_wrong_with_the_image(
    site: Path, run: Run, office: Path, harm: Callable[[Path], object], why: str
) -> None:
    assert run("check").exit_code == 0
    harm(office)
    done = run("check", "office")
    assert done.exit_code == 1 and why in done.output


def test_check_finds_what_is_wrong_with_an_entry(site: Path, run: Run, office: Path) -> None:
    (site / "catalogue/broken.toml").write_text("title = 7")
    done = run("check")
    assert (
        done.exit_code == 1 and "broken: image: Missing data" in done.output and "office: nothing wrong" in done.output
    )
    assert run("check", "office").exit_code == 0
    assert run("check", "nobody").exit_code == 1


def test_an_export_stands_alone_and_overwrites_nothing(site: Path, run: Run, office: Path) -> None:
    target = site / "in/out.qcow2"
    assert run("export", "office", target).exit_code == 0
    assert same(office, "vmdk", target, "qcow2") and target.stat().st_uid == os.geteuid()
    before = target.read_bytes()
    assert "exists already" in run("export", "office", target).output and target.read_bytes() == before
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]


def test_resize_changes_the_entry_alone(site: Path, run: Run, office: Path) -> None:
    path = site / "catalogue/office.toml"
    path.write_text("# ours\n" + path.read_text().replace("default = 2\nmax = 64", "default = 2  # small\nmax = 64"))
    before = office.read_bytes()
    assert run("resize", "office", "--disk-gib", "40").exit_code == 0
    assert made(site).disk_gib == Range(2, 40, 64)
    assert run("resize", "office", "--disk-gib", "100").exit_code == 0
    assert made(site).disk_gib == Range(2, 100, 100)
    assert path.read_text().startswith("# ours\n") and "default = 100  # small\n" in path.read_text()
    done = run("resize", "office", "--disk-gib", "1")
    assert done.exit_code == 1 and "2 GiB" in done.output and made(site).disk_gib.default == 100
    assert office.read_bytes() == before and run("check").exit_code == 0


def test_an_entry_that_can_t_be_changed_line_by_line_is_left_alone(site: Path, run: Run, office: Path) -> None:
    path = site / "catalogue/office.toml"
    text = path.read_text().replace("[disk_gib]\nmin = 2\ndefault = 2\nmax = 64\n", "")
    path.write_text("disk_gib = {min = 2, default = 2, max = 64}\n" + text)
    done = run("resize", "office", "--disk-gib", "5")
    assert done.exit_code == 1 and "unusual" in done.output and made(site).disk_gib.default == 2


# --- the text of an entry ---------------------------------------------------------------------------------------

WORDS = st.text(min_size=1, max_size=80)


@given(title=WORDS, text=WORDS, user=WORDS, size=st.integers(1, 9))
def test_c26_whatever_people_type_is_one_value_of_the_entry(title: str, text: str, user: str, size: int) -> None:
    sizes = Range(size, size + 1, size + 2)
    wish = Wish(
        "office", title, text, Os.LINUX, Video.STD, Firmware.BIOS, Drivers.VIRTIO, sizes, sizes, None, (user,), ("g",)
    )
    machine = parse_machine("office", entry(wish, "office.raw", Format.RAW, "0" * 64, sizes))
    assert (machine.title, machine.text, machine.users, machine.groups) == (title, text, (user,), ("g",))
    assert machine.cpus == machine.memory_mib == machine.disk_gib == sizes
    changed = with_disk_sizes(entry(wish, "office.raw", Format.RAW, "0" * 64, sizes), Range(1, 20, 300))
    assert parse_machine("office", changed).disk_gib == Range(1, 20, 300)


def test_what_is_not_utf_8_is_refused() -> None:
    one = Range(1, 1, 1)
    wish = Wish("x", "a\udcff", "t", Os.LINUX, Video.STD, Firmware.BIOS, Drivers.VIRTIO, one, one, None, (), ("g",))
    with pytest.raises(MachineFilesError, match="UTF-8"):
        entry(wish, "x.raw", Format.RAW, "0" * 64, one)
