"""Images looked at by qemu-img in confinement: both readers agree, and nothing that an image does reaches further.

Cases C24 and C25 of the known ones. qemu-img and the confinement are real.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from deskfleet.runtime.inspection import (
    NOBODY,
    ImageFile,
    Limits,
    check_structure,
    confinement,
    convert,
    open_image,
    qemu_img,
    second_opinion,
)
from deskfleet.schemas.image_facts import Facts, Fault, ImageRefused
from deskfleet.schemas.machine import Format

MIB = 1 << 20
KINDS = [Format.QCOW2, Format.VDI, Format.VMDK, Format.RAW]


def image(folder: Path, kind: Format, size: str = "8M") -> Path:
    """A disk that holds a MiB of sevens."""
    path = folder / f"disk.{kind}"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind.value, str(path), size], check=True)
    write = ["qemu-io", "-f", kind.value, "-c", "write -P 7 1M 1M", str(path)]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    return path


def fault(work: Callable[[], object]) -> Fault:
    with pytest.raises(ImageRefused) as refused:
        work()
    assert str(refused.value).endswith(".") and str(refused.value).isprintable()
    return refused.value.fault


def opening(path: Path) -> Fault:
    def work() -> None:
        with open_image(path):
            raise AssertionError("it was opened")

    return fault(work)


@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_agree_on_what_qemu_img_makes(tmp_path: Path, kind: Format) -> None:
    with open_image(image(tmp_path, kind)) as file:
        facts = file.facts(kind)
        second_opinion(file, facts)
        check_structure(file, facts)
        assert facts.virtual_size == 8 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_copy_stands_alone_and_holds_the_same(tmp_path: Path, kind: Format) -> None:
    source, copy = image(tmp_path, kind), tmp_path / "copy"
    with open_image(source) as file, copy.open("w+b") as target:
        os.fchown(target.fileno(), NOBODY, NOBODY)
        convert(file, file.facts(kind), target.fileno())
    line = ["qemu-img", "compare", "-f", kind.value, "-F", "qcow2", str(source), str(copy)]
    assert subprocess.run(line, check=False, stdout=subprocess.DEVNULL).returncode == 0
    with open_image(copy) as file:
        assert file.facts(Format.QCOW2).virtual_size == 8 * MIB


@pytest.mark.parametrize("claim", [{"virtual_size": 9 * MIB}, {"snapshots": 1}])
def test_readers_that_disagree_are_a_refusal(tmp_path: Path, claim: dict[str, int]) -> None:
    with open_image(image(tmp_path, Format.QCOW2)) as file:
        facts = replace(file.facts(Format.QCOW2), **claim)
        assert fault(lambda: second_opinion(file, facts)) is Fault.DISAGREE


def test_c24_qemu_img_s_own_eye_for_other_files_counts_too(tmp_path: Path) -> None:
    """Should our reader ever miss a backing file, qemu-img's answer still refuses it."""
    (tmp_path / "canary").write_bytes(bytes(MIB))
    path = tmp_path / "evil.qcow2"
    line = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "canary", "-F", "raw", str(path), "1M"]
    subprocess.run(line, check=True, cwd=tmp_path)
    with open_image(path) as file:
        assert fault(lambda: second_opinion(file, Facts(Format.QCOW2, MIB))) is Fault.DISAGREE


def test_c24_no_header_that_our_reader_takes_leads_qemu_img_elsewhere(tmp_path: Path) -> None:
    """Mutated headers: what passes our reader must be to qemu-img what it is to us, or nothing."""
    draw = random.Random(24)
    lures = [
        b'parentFileNameHint="/etc/hosts"',
        b'createType="vmfs"',
        b'RW 1 FLAT "/etc/hosts" 0\n',
        b'# createType="x"',
    ]
    passed = 0
    for kind in (Format.QCOW2, Format.VDI, Format.VMDK):
        path = image(tmp_path, kind)
        good = path.read_bytes()
        for _ in range(40):
            data = bytearray(good)
            for _ in range(draw.randint(1, 3)):
                at = draw.randrange(0, 640)
                data[at] ^= 1 << draw.randrange(8)
            if kind is Format.VMDK and draw.random() < 0.3:
                lure, at = draw.choice(lures), draw.randrange(512, 10_800)
                data[at : at + len(lure)] = lure
            path.write_bytes(data)
            with open_image(path) as file:
                try:
                    facts = file.facts(kind)
                except ImageRefused:
                    continue
                try:
                    second_opinion(file, facts)
                except ImageRefused as refused:
                    assert refused.fault is not Fault.DISAGREE, (kind, refused)
                passed += 1
    assert passed > 20


def test_c25_what_is_not_a_regular_file_is_not_opened(tmp_path: Path) -> None:
    real = image(tmp_path, Format.RAW)
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert opening(tmp_path / "link") is Fault.SYMLINK
    assert opening(tmp_path / "pipe") is Fault.NOT_A_FILE
    assert opening(tmp_path / "folder") is Fault.NOT_A_FILE
    assert opening(Path("/dev/zero")) is Fault.NOT_A_FILE
    assert opening(tmp_path / "nothing") is Fault.UNREADABLE
    assert opening(tmp_path / "nul\0") is Fault.UNREADABLE


@pytest.mark.parametrize("name", ['json:{"driver":"raw"}', "nbd:unix:x", "fat:rw:y"])
def test_c24_names_that_qemu_takes_for_protocols_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(MIB))
    assert opening(tmp_path / name) is Fault.NAME


def test_c25_a_file_that_is_still_written_is_refused(tmp_path: Path) -> None:
    path = image(tmp_path, Format.RAW)
    with open_image(path) as file:
        facts = file.facts(Format.RAW)
        with path.open("r+b") as writer:
            writer.write(b"x")
        assert fault(lambda: file.facts(Format.RAW)) is Fault.CHANGING
        assert fault(lambda: second_opinion(file, facts)) is Fault.CHANGING


def test_another_file_put_in_its_place_is_a_change_and_not_what_qemu_img_sees(tmp_path: Path) -> None:
    path = image(tmp_path, Format.QCOW2)
    with open_image(path) as file:
        facts = file.facts(Format.QCOW2)
        image(tmp_path, Format.RAW, "2M").rename(path)
        assert fault(lambda: second_opinion(file, facts)) is Fault.CHANGING  # it would be DISAGREE, had it seen it


def test_c25_data_that_are_missing_are_found_by_following_the_tables(tmp_path: Path) -> None:
    for kind in (Format.QCOW2, Format.VMDK):
        path = image(tmp_path, kind)
        os.truncate(path, path.stat().st_size - 600_000)
        with open_image(path) as file:
            facts = file.facts(kind)
            second_opinion(file, facts)
            assert fault(lambda file=file, facts=facts: check_structure(file, facts)) is Fault.DAMAGED  # type: ignore[misc]


# --- limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [Limits(memory_bytes=20 * MIB), Limits(file_bytes=100), Limits(wall_s=-1.0)],
    ids=["memory", "output", "time"],
)
def test_c25_each_limit_is_a_refusal(tmp_path: Path, limits: Limits) -> None:
    with open_image(image(tmp_path, Format.QCOW2)) as file:
        facts = file.facts(Format.QCOW2)
        assert fault(lambda: second_opinion(file, facts, limits)) is Fault.OVER_LIMIT
        second_opinion(file, facts)


def test_c25_cpu_seconds_are_limited(tmp_path: Path) -> None:
    with open_image(image(tmp_path, Format.RAW)) as file:
        endless = ["bench", "-f", "raw", "-c", "2000000000", f"/proc/self/fd/{file.fd}"]
        assert fault(lambda: qemu_img(endless, Limits(cpu_s=1, wall_s=300), [file.fd])) is Fault.OVER_LIMIT


def test_c25_a_pebibyte_in_a_few_megabytes_and_others_at_once(tmp_path: Path) -> None:
    """Twenty inspections, half of them hostile: each gets its own answer."""
    huge, fine = tmp_path / "huge", image(tmp_path, Format.QCOW2)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(huge), "1P"], check=True)
    tight = Limits(memory_bytes=48 * MIB)

    def work(number: int) -> Fault | None:
        with open_image(huge if number % 2 else fine) as file:
            try:
                facts = file.facts(Format.QCOW2, largest=1 << 51)
                second_opinion(file, facts, tight if number % 2 else Limits())
            except ImageRefused as refused:
                return refused.fault
        return None

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(work, range(20))) == [None, Fault.OVER_LIMIT] * 10


# --- confinement ------------------------------------------------------------------------------------------------


def confined(*program: str) -> str:
    line = [*confinement(Limits(), os.geteuid()), *program]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def test_c25_who_looks_has_no_rights_no_network_and_limits() -> None:
    rows = [row.partition(":") for row in confined("cat", "/proc/self/status").splitlines()]
    status = {key: value.strip() for key, _, value in rows}
    assert status["Uid"].split() == [str(NOBODY)] * 4 and status["Gid"].split() == [str(NOBODY)] * 4
    assert status["Groups"] == "" and status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == int(status["CapInh"], 16) == 0
    devices = confined("cat", "/proc/self/net/dev").splitlines()[2:]
    assert [row.split(":")[0].strip() for row in devices] == ["lo"]
    limits = confined("cat", "/proc/self/limits").splitlines()
    assert [row.split()[-2] for row in limits if "core file" in row] == ["0"]
    assert [row.split()[-2] for row in limits if "cpu time" in row] == ["10"]


def test_without_root_the_network_goes_and_the_user_stays() -> None:
    line = confinement(Limits(), 1000)
    assert line[:4] == ["unshare", "--user", "--map-current-user", "--net"] and "--no-new-privs" in line


def test_a_machine_that_can_t_confine_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = image(tmp_path, Format.QCOW2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_image(path) as file:
        facts = file.facts(Format.QCOW2)
        assert fault(lambda: second_opinion(file, facts)) is Fault.UNCONFINED


@pytest.mark.parametrize(
    ("program", "words", "why"),
    [
        ("unshare", "unshare: unshare failed: Operation not permitted", Fault.UNCONFINED),
        ("qemu-img", "qemu-img: error while writing: No space left on device", Fault.NO_SPACE),
        ("qemu-img", "qemu-img: error while writing: File too large", Fault.OVER_LIMIT),
        ("qemu-img", "qemu-img: Image is corrupt", Fault.DAMAGED),
    ],
)
def test_a_failure_is_put_down_to_whom_it_belongs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, words: str, why: Fault
) -> None:
    path = image(tmp_path, Format.QCOW2)
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in (tmp_path, *tmp_path.parents[:-2]):  # for whom qemu-img runs as
        folder.chmod(0o755)
    (programs / program).write_text(f"#!/bin/sh\necho {words} >&2; exit 1\n")
    (programs / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    with open_image(path) as file:
        facts = file.facts(Format.QCOW2)
        assert fault(lambda: second_opinion(file, facts)) is why


@pytest.mark.parametrize("answer", ["", "{}", "[]", json.dumps({"format": "qcow2", "virtual-size": 1, "snapshots": 3})])
def test_an_answer_that_makes_no_sense_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str
) -> None:
    monkeypatch.setattr("deskfleet.runtime.inspection.qemu_img", lambda *_, **__: answer)
    with open_image(image(tmp_path, Format.QCOW2)) as file:
        opinion: Callable[[ImageFile, Facts], None] = second_opinion
        facts = file.facts(Format.QCOW2)
        assert fault(lambda: opinion(file, facts)) is Fault.DISAGREE
