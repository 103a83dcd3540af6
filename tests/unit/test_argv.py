"""qemu's and passt's command lines: whole, from fixed templates, and nothing of a person's in them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from deskfleet.agent.argv import SANDBOX, Paths, gpus_of, mac_of, passt, qemu, uuid_of
from deskfleet.agent.volumes import Kind, Mount, Volume
from deskfleet.schemas.machine import Drivers, Firmware, Format, Os, Video
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.session import Resources

SID = "0123456789abcdef" * 2
PATHS = Paths(Path("/r") / SID, Path("/d/x.qcow2"), Path("/i/tiny.iso"))
START = VmStart(
    SID, 7, "-monitor stdio", "tiny", Os.OTHER, "a" * 64, Format.ISO, Video.STD, Firmware.BIOS,
    Resources(2, 256, 4), (), False, 3600, 60, 600,
)  # fmt: skip


def line(start: VmStart = START, accel: str = "tcg", network_fd: int | None = None) -> list[str]:
    return qemu(start, PATHS, accel=accel, network_fd=network_fd)


def values(argv: list[str], option: str) -> list[str]:
    return [value for flag, value in pairwise(argv) if flag == option]


def test_what_every_guest_has() -> None:
    argv = line()
    assert argv[:3] == ["qemu-system-x86_64", "-nodefaults", "-no-user-config"]
    assert values(argv, "-sandbox") == [SANDBOX]
    assert values(argv, "-uuid") == [uuid_of(SID)] == ["01234567-89ab-cdef-0123-456789abcdef"]
    assert values(argv, "-display") == ["none"]
    assert values(argv, "-vnc") == [f"unix:/r/{SID}/vnc.sock,share=force-shared"]
    assert len(values(argv, "-qmp")) == 2
    assert values(argv, "-smp") == ["cpus=2"]
    assert values(argv, "-m") == ["size=256M"]
    assert "memory-backend=ram" in values(argv, "-machine")[0]
    assert "-daemonize" not in argv and "-runas" not in argv and "-k" not in argv


def test_c21_no_display_or_monitor_listens_on_a_port() -> None:
    everything = " ".join(line(replace(START, os=Os.LINUX), network_fd=9))
    assert "tcp" not in everything and ":59" not in everything and "websocket" not in everything
    assert "telnet" not in everything and "hostfwd" not in everything


def test_c26_nothing_that_a_person_typed_is_on_the_line() -> None:
    argv = line(replace(START, user="x,readonly=off"))
    assert not any("readonly=off" in word or "monitor" in word for word in argv)


@pytest.mark.parametrize("image", [Format.QCOW2, Format.VDI, Format.VMDK, Format.RAW])
def test_c24_the_format_is_always_said_and_no_chain_is_followed(image: Format) -> None:
    disk = json.loads(values(line(replace(START, format=image, os=Os.LINUX)), "-blockdev")[0])
    assert disk["driver"] == "qcow2" and disk["file"]["driver"] == "file"
    assert disk["backing"]["driver"] == image.value and disk["backing"]["read-only"] is True
    assert disk["backing"]["file"] == {"driver": "file", "filename": "/i/tiny.iso"}
    assert ("backing" in disk["backing"]) is (image in (Format.QCOW2, Format.VMDK))
    assert disk["backing"].get("backing") is None


def test_an_iso_is_a_read_only_cd_beside_an_empty_disk() -> None:
    disk, cd = (json.loads(value) for value in values(line(), "-blockdev"))
    assert disk["backing"] is None
    assert cd["driver"] == "raw" and cd["read-only"] is True


def test_paths_with_commas_stay_paths() -> None:
    paths = Paths(Path("/r,readonly=off") / SID, Path("/d/x,y.qcow2"), Path("/i/a,b.iso"))
    argv = qemu(replace(START, os=Os.LINUX, firmware=Firmware.UEFI), paths, accel="tcg", network_fd=None)
    disk, cd = (json.loads(value) for value in values(argv, "-blockdev"))
    assert disk["file"]["filename"] == "/d/x,y.qcow2" and cd["file"]["filename"] == "/i/a,b.iso"
    others = [word for word in argv if "/r,readonly" in word or "/r,,readonly" in word]
    assert len(others) == 5 and all("/r,,readonly=off/" in word for word in others)


def test_devices_follow_the_kind_of_system() -> None:
    linux = values(line(replace(START, os=Os.LINUX, video=Video.VIRTIO), network_fd=9), "-device")
    assert "virtio-vga" in linux and "virtio-tablet-pci" in linux and "virtio-keyboard-pci" in linux
    assert "virtio-blk-pci,drive=disk,bootindex=1,werror=enospc,rerror=report" in linux
    assert any(device.startswith("virtio-net-pci,netdev=net,mac=52:54:00:") for device in linux)
    windows = values(line(replace(START, os=Os.WINDOWS), network_fd=9), "-device")
    assert "usb-tablet,bus=usb.0" in windows and any(d.startswith("virtio-net-pci") for d in windows)
    assert not any("virtserialport" in d for d in values(line(), "-device"))


@pytest.mark.parametrize("system", list(Os))
def test_compatible_drivers_mean_no_virtio_for_disk_network_and_pointer(system: Os) -> None:
    devices = values(line(replace(START, os=system, drivers=Drivers.COMPATIBLE), network_fd=9), "-device")
    assert "ide-hd,drive=disk,bus=ide.0,bootindex=1,werror=enospc,rerror=report" in devices
    assert any(device.startswith("e1000e,netdev=net,") for device in devices)
    assert not any(device.startswith(("virtio-blk", "virtio-net", "virtio-tablet")) for device in devices)


def test_the_clock_is_local_time_for_windows_alone() -> None:
    clocks = {system: values(line(replace(START, os=system)), "-rtc") for system in Os}
    assert clocks == {
        Os.LINUX: ["base=utc"],
        Os.OTHER: ["base=utc"],
        Os.WINDOWS: ["base=localtime,driftfix=slew"],
    }


def test_windows_is_offered_a_hypervisor_s_help_where_there_is_one() -> None:
    (cpu,) = values(line(replace(START, os=Os.WINDOWS), accel="kvm"), "-cpu")
    flags = cpu.split(",")
    assert flags[0] == "host" and {"hv-relaxed", "hv-time", "hv-stimer", "hv-synic", "hv-vpindex"} <= set(flags)
    assert all(flag.startswith("hv-") for flag in flags[1:])
    for start, accel in ((replace(START, os=Os.WINDOWS), "tcg"), (START, "kvm"), (replace(START, os=Os.LINUX), "kvm")):
        assert "hv-" not in values(line(start, accel=accel), "-cpu")[0]


def test_the_device_list_depends_on_machine_and_size_alone() -> None:
    other = replace(START, sid="f" * 32, user="bo", generation=9, lifetime_s=60)
    paths = Paths(Path("/r") / ("f" * 32), Path("/d/y.qcow2"), PATHS.image)
    assert values(line(), "-device") == values(qemu(other, paths, accel="tcg", network_fd=None), "-device")


def test_huge_pages_are_given_whole_and_only_where_asked_for() -> None:
    odd = replace(START, resources=replace(START.resources, memory_mib=255))
    assert values(line(odd), "-m") == ["size=255M"] and "hugetlb" not in " ".join(line(odd))
    argv = qemu(odd, PATHS, accel="tcg", network_fd=None, huge=True)
    assert values(argv, "-m") == ["size=256M"]
    assert values(argv, "-object") == ["memory-backend-memfd,hugetlb=on,hugetlbsize=2M,id=ram,size=256M"]


def test_a_gpu_s_rom_is_replaced_hidden_or_left() -> None:
    start = replace(START, gpu_addresses=("0000:01:00.0", "0000:01:00.1", "0000:01:00.2"))
    roms = {"0000:01:00.0": "/roms/a,x=b.rom", "0000:01:00.1": ""}
    argv = qemu(start, PATHS, accel="tcg", network_fd=None, roms=roms)
    one, two, three = [d for d in values(argv, "-device") if "vfio" in d]
    assert one.endswith(",multifunction=on,romfile=/roms/a,,x=b.rom") and two.endswith(",rombar=0")
    assert "rom" not in three and "x-vga" not in " ".join(argv)
    assert gpus_of(argv) == set(start.gpu_addresses) and gpus_of(["vi", "vfio-pci"]) == set()


def test_a_gpu_of_the_launch_reaches_the_line_with_its_whole_group() -> None:
    argv = line(replace(START, gpu_addresses=("0000:01:00.0", "0000:01:00.1")))
    assert [d for d in values(argv, "-device") if "vfio" in d] == [
        "vfio-pci,host=0000:01:00.0,bus=gpu,addr=0x0.0x0,multifunction=on",
        "vfio-pci,host=0000:01:00.1,bus=gpu,addr=0x0.0x1",
    ]
    assert "VGA" in values(argv, "-device")  # its picture is not on VNC: the virtual display stays


def test_accelerator_and_firmware() -> None:
    assert values(line(accel="kvm"), "-cpu") == ["host"]
    assert values(line(), "-cpu") == ["max"]
    drives = values(line(replace(START, firmware=Firmware.UEFI)), "-drive")
    assert "readonly=on" in drives[0] and f"file=/r/{SID}/vars.fd" in drives[1]


def test_network_is_a_socket_pair_or_nothing() -> None:
    assert values(line(), "-netdev") == []
    assert values(line(network_fd=9), "-netdev") == ["stream,id=net,server=off,addr.type=fd,addr.str=9"]
    assert "--no-map-gw" in passt(5) and "none" in passt(5)


def test_on_a_bridge_the_network_is_a_tap_device() -> None:
    argv = qemu(START, PATHS, accel="tcg", network_fd=9, tap=True)
    assert values(argv, "-netdev") == ["tap,id=net,fd=9"]
    assert any(device.endswith(f"mac={mac_of(SID)},romfile=") for device in values(argv, "-device"))


def volume(tag: str, kind: Kind, path: str = "/srv/v") -> Volume:
    return Volume(tag, path, kind, kind is Kind.NINE_P, f"/mnt/{tag}", 300_000, create=False)


def test_volumes_are_read_only_9p_and_shared_memory_for_virtiofs() -> None:
    nine = Mount(volume("course", Kind.NINE_P), Path("/srv/course"))
    home = Mount(volume("home", Kind.VIRTIOFS), Path("/srv/home"), "ann")
    argv = qemu(START, PATHS, accel="tcg", network_fd=None, mounts=(nine, home))
    assert values(argv, "-fsdev") == ["local,id=fs0,path=/srv/course,security_model=none,multidevs=remap,readonly=on"]
    assert "virtio-9p-pci,fsdev=fs0,mount_tag=course" in values(argv, "-device")
    assert "vhost-user-fs-pci,chardev=fs1,tag=home" in values(argv, "-device")
    assert f"socket,id=fs1,path=/r/{SID}/home.fs" in values(argv, "-chardev")
    assert "memory-backend-memfd,share=on,id=ram,size=256M" in values(argv, "-object")
    told = "name=opt/deskfleet/mounts,string=course 9p ro /mnt/course\nhome virtiofs rw /mnt/home\n"
    assert told in values(argv, "-fw_cfg")
    without = qemu(START, PATHS, accel="tcg", network_fd=None, mounts=(nine,))
    assert "memory-backend-ram,id=ram,size=256M" in values(without, "-object")


def test_c26_a_volume_s_path_is_nothing_but_a_path() -> None:
    mount = Mount(volume("course", Kind.NINE_P), Path("/srv/a,readonly=off,b"))
    (local,) = values(qemu(START, PATHS, accel="tcg", network_fd=None, mounts=(mount,)), "-fsdev")
    assert "path=/srv/a,,readonly=off,,b,security_model=none" in local and local.endswith(",readonly=on")
    assert "passthrough" not in local


def test_addresses_are_stable_and_differ() -> None:
    assert mac_of(SID) == mac_of(SID) != mac_of("f" * 32)
