"""Preflight: each look at a machine says what is wrong and what to do, and nothing when all is well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.hosts import gpu

from deskfleet.agent.preflight import LOOKS, Finding, Level, Machine, as_json, as_text, look
from deskfleet.agent.settings import AgentSchema, AgentSettings, VolumeSchema
from deskfleet.agent.volumes import Volume

DEVICES = "\n".join(f'name "{name}"' for name in ("virtio-vga", "virtio-net-pci", "virtio-blk-pci", "usb-tablet"))
KEY = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"
ANSWERS = {
    "qemu-system-x86_64 --version": (0, "QEMU emulator version 9.1.0"),
    "qemu-system-x86_64 -device help": (0, DEVICES),
    "qemu-img --version": (0, ""),
    "passt --version": (0, ""),
    "nft --version": (0, ""),
    "ip -V": (0, ""),
    "timedatectl show --property=NTPSynchronized --value": (0, "yes\n"),
    "openssl x509": (0, KEY),
    "openssl pkey": (0, KEY),
}


def settings(**changes: object) -> AgentSettings:
    made: AgentSettings = AgentSchema().load(
        {"host": "h1", "broker_url": "amqp://a:b@c/", "console_address": "h1:6080", "console_cert": "/tls/cert",
         "console_key": "/tls/key", "console_ca": "/tls/ca"}
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "sys/kernel/iommu_groups/1").mkdir(parents=True)
    (tmp_path / "sys/module/kvm_intel/parameters").mkdir(parents=True)
    (tmp_path / "sys/module/kvm_intel/parameters/nested").write_text("Y\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nann:x:1000:1000::/:/bin/sh\n")
    (tmp_path / "tls").mkdir()
    for name in ("cert", "key", "ca"):
        (tmp_path / "tls" / name).touch()
    groups = tmp_path / "sys/fs/cgroup/system.slice/deskfleet-guests.service"
    groups.mkdir(parents=True)
    (groups / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    for folder in ("sys/class/net/br0/bridge", "dev/net/tun", "srv/home", "usr/lib/qemu"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "usr/lib/qemu/virtiofsd").touch()
    return Machine(
        settings=settings(),
        root=tmp_path,
        run=answering(),
        probe=lambda *_: "",
        gpus=lambda: (gpu(1),),
        listen=lambda _: "",
        broker=lambda: ("", 0),
        disk=lambda _: (100 << 30, 200 << 30, 1000),
        memlock=lambda: None,
    )


def answering(**changes: tuple[int, str]):  # type: ignore[no-untyped-def]
    answers = ANSWERS | changes

    def run(argv: Sequence[str]) -> tuple[int, str]:
        line = " ".join(argv)
        return next(answer for key, answer in sorted(answers.items(), reverse=True) if line.startswith(key))

    return run


def trouble(machine: Machine) -> list[Finding]:
    return [finding for finding in look(machine) if finding.level is not Level.GOOD]


def test_a_machine_in_order_has_nothing_to_complain_about(machine: Machine) -> None:
    findings = look(machine)
    assert trouble(machine) == [] and len(findings) >= len(LOOKS)
    assert [entry["level"] for entry in json.loads(as_json(findings))] == ["good"] * len(findings)
    assert len(as_text(findings).splitlines()) == len(findings)


def away(_: Path) -> tuple[int, int, int]:
    raise FileNotFoundError(2, "No such file or directory")


def volume(**changes: object) -> Volume:
    made: Volume = VolumeSchema().load({"tag": "home", "path": "/srv/home/{user}", "kind": "virtiofs"})
    return replace(made, **changes)  # type: ignore[arg-type]


BRIDGED = settings(network="bridge", bridge="br0")
TROUBLE = [
    ({"probe": lambda accel, _: "exit 3" if accel == "kvm" else ""}, "kvm", Level.WARN),
    ({"probe": lambda *_: "exit 1"}, "kvm", Level.BAD),
    ({"run": answering(**{"qemu-system-x86_64 --version": (127, "")})}, "qemu", Level.BAD),
    ({"run": answering(**{"qemu-system-x86_64 --version": (0, "QEMU emulator version 5.2.0")})}, "qemu", Level.BAD),
    ({"run": answering(**{"qemu-system-x86_64 -device help": (0, 'name "virtio-vga"')})}, "qemu", Level.BAD),
    ({"run": answering(**{"qemu-img --version": (127, "")})}, "qemu", Level.BAD),
    ({"gpus": lambda: (replace(gpu(1), offered=False, problem="not bound to vfio-pci"),)}, "gpu", Level.WARN),
    ({"memlock": lambda: 64 << 20}, "memlock", Level.BAD),
    ({"is_root": False}, "network", Level.BAD),
    ({"run": answering(**{"passt --version": (127, "")})}, "network", Level.BAD),
    ({"settings": replace(BRIDGED, bridge="br7")}, "network", Level.BAD),
    ({"settings": BRIDGED, "run": answering(**{"ip -V": (127, "")})}, "network", Level.BAD),
    ({"settings": settings(cgroup=Path("/sys/fs/cgroup/none"))}, "limits", Level.WARN),
    ({"settings": settings(volumes=(volume(path="/srv/gone"),))}, "volume home", Level.BAD),
    ({"settings": settings(volumes=(volume(owner=900),))}, "user ids", Level.BAD),
    ({"settings": settings(uids=range(900, 1100))}, "user ids", Level.BAD),
    ({"disk": lambda _: (1 << 30, 200 << 30, 1000)}, "disk", Level.WARN),
    ({"disk": lambda _: (100 << 30, 200 << 30, 0)}, "disk", Level.BAD),
    ({"disk": away}, "images", Level.BAD),
    ({"run": answering(**{"timedatectl show --property=NTPSynchronized --value": (0, "no")})}, "clock", Level.WARN),
    ({"broker": lambda: ("the broker refuses the login", 0)}, "broker", Level.BAD),
    ({"broker": lambda: ("", 1)}, "broker", Level.BAD),
    ({"settings": settings(console_tls=None)}, "tls", Level.WARN),
    ({"settings": settings(console_tls=("/tls/cert", "/tls/none", "/tls/ca"))}, "tls", Level.BAD),
    ({"run": answering(**{"openssl pkey": (0, KEY.replace("A", "B"))})}, "tls", Level.BAD),
    ({"run": answering(**{"openssl x509": (1, KEY)})}, "tls", Level.WARN),
    ({"listen": lambda _: "Address already in use"}, "ports", Level.BAD),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "name", "level"), TROUBLE, ids=lambda v: str(v)[:16])
def test_each_trouble_is_named_with_what_to_do(
    machine: Machine, changes: dict[str, object], name: str, level: Level
) -> None:
    found = [finding for finding in trouble(replace(machine, **changes)) if finding.name.startswith(name)]  # type: ignore[arg-type]
    assert found and found[0].level is level
    assert found[0].advice and found[0].text in found[0].line


def test_huge_pages_must_be_there_where_guests_are_to_have_them(machine: Machine, tmp_path: Path) -> None:
    assert trouble(machine) == [], "nobody asks for them"
    asked = replace(machine, settings=settings(hugepages="gpu"))
    assert [(finding.name, finding.level) for finding in trouble(asked)] == [("huge pages", Level.BAD)]
    folder = tmp_path / "sys/kernel/mm/hugepages/hugepages-2048kB"
    folder.mkdir(parents=True)
    (folder / "free_hugepages").write_text("512\n")
    (folder / "resv_hugepages").write_text("256\n")
    (finding,) = [finding for finding in look(asked) if finding.name == "huge pages"]
    assert (finding.level, finding.text) == (Level.GOOD, "512 MiB free for guests with a GPU")


def test_slices_of_a_gpu_are_listed_and_said_not_to_be_offered(machine: Machine, tmp_path: Path) -> None:
    kind = tmp_path / "sys/class/mdev_bus/0000:01:00.0/mdev_supported_types/nvidia-471"
    kind.mkdir(parents=True)
    (kind / "name").write_text("GRID A100-2-10C\n")
    (kind / "available_instances").write_text("3\n")
    (kind / "device_api").write_text("vfio-pci\n")
    (kind.parent / "i915-GVTg_V5_4").mkdir()
    (finding,) = trouble(machine)
    assert finding.name == "vgpu 0000:01:00.0" and "listed, not offered yet" in finding.text
    assert "GRID A100-2-10C (3 left, vfio-pci)" in finding.text and "i915-GVTg_V5_4 (? left" in finding.text


def test_a_bridge_and_volumes_that_are_there_are_good(machine: Machine, tmp_path: Path) -> None:
    found = replace(machine, settings=replace(BRIDGED, volumes=(volume(),)))
    assert trouble(found) == []
    (tmp_path / "dev/net/tun").rmdir()
    (tmp_path / "usr/lib/qemu/virtiofsd").unlink()
    assert [finding.name for finding in trouble(found)] == ["network", "volume home"]


def test_what_control_groups_lack_is_named(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "sys/fs/cgroup/system.slice/deskfleet-guests.service/cgroup.controllers"
    file.write_text("cpu hugetlb\n")
    (finding,) = trouble(machine)
    assert finding.level is Level.WARN and "no control of memory, pids" in finding.text


def test_without_an_iommu_gpus_are_out(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "sys/kernel/iommu_groups/1").rmdir()
    assert [finding.name for finding in trouble(machine)] == ["iommu"]


def test_beside_a_running_agent_its_ports_and_its_queue_are_in_order(machine: Machine) -> None:
    beside = replace(machine, running=True, broker=lambda: ("", 1), listen=lambda _: "Address already in use")
    assert trouble(beside) == []


def test_a_device_that_guests_may_not_open_is_not_taken_for_a_missing_one(machine: Machine) -> None:
    closed = replace(machine, probe=lambda accel, _: "exit 1: Permission denied" if accel == "kvm" else "")
    assert [("udev" in finding.advice) for finding in trouble(closed)] == [True]
