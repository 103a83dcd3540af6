"""Which folders a launch gets, and users' names as names of folders: whatever they are, one each, and nowhere else."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from marshmallow import ValidationError

from deskfleet.agent import share
from deskfleet.agent.settings import AgentSchema, AgentSettings
from deskfleet.agent.volumes import Kind, Mount, Volume, VolumeError, component, mounts, ready, told

NAMES = (
    "gutiérrez", "gutie\u0301rrez", "Company\\User", "a.b@c.org", "经济", "O'Neil", "a b", "a+b@x", "-rf", "con", "Ann",
    "ann", "x" * 64, "é" * 150, "é" * 151, "m" * 200, "m" * 201, "\u202eevil", ".", "..", "...", "../..", "a/b",
    "a%2Fb", "/etc", "a\0b", "%00", "%", "%%", "~", "a\nb", "$(id)", "a;touch pwned", "x,readonly=off", "\ud800",
    "{user}",
)  # fmt: skip


def volume(path: str = "/srv/home/{user}", **changes: Any) -> Volume:
    values = {
        "tag": "home", "kind": Kind.VIRTIOFS, "read_only": False, "target": "/mnt/home", "owner": 300_000,
        "create": False, **changes,
    }  # fmt: skip
    return Volume(path=path, **values)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_c09_c26_every_name_is_one_part_of_a_path(name: str) -> None:
    made = component(name)
    assert made not in ("", ".", "..") and not set(made) & set("/\\\0\n, '$;{}") and made.isascii()
    assert len(made) <= 255 and made[0] not in ".-"
    assert (Path("/srv/home") / made).parent == Path("/srv/home")
    assert made == made.lower() or "%" in made


def test_c09_no_two_names_share_a_folder_even_where_capitals_do_not_count() -> None:
    rng = random.Random(7)
    letters = "aAbB.-_%/\\é0e\u0301\0"
    names = {*NAMES, *("".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(20_000))}
    names |= {component(name) for name in NAMES}
    names |= {name * 60 for name in list(names)[:500]}
    assert len({component(name).lower() for name in names}) == len(names)


def test_plain_names_stay_readable() -> None:
    assert component("ann") == "ann" and component("a.b-c_d+1@x.org") == "a.b-c_d+1@x.org"
    assert component("Zoë") == "%5Ao%C3%AB" and component("..") == "%2E."
    with pytest.raises(VolumeError):
        component("")


def test_who_gets_which_volume() -> None:
    course = volume("/srv/course", tag="course", kind=Kind.NINE_P, read_only=True, machines=("office",))
    everything = (course, volume(users=("ann",)), volume("/srv/tools", tag="tools"))
    assert [m.volume.tag for m in mounts(everything, "office", "ann")] == ["course", "home", "tools"]
    assert [m.volume.tag for m in mounts(everything, "tiny", "bo")] == ["tools"]
    (mount,) = mounts([volume()], "tiny", "a/../b")
    assert mount == Mount(volume(), Path("/srv/home"), "a%2F..%2Fb")


def test_the_guest_is_told_in_lines_of_words() -> None:
    course = volume("/srv/course", tag="course", kind=Kind.NINE_P, read_only=True, target="/mnt/course")
    assert told(mounts([course, volume()], "m", "x y\nz")) == "course 9p ro /mnt/course\nhome virtiofs rw /mnt/home\n"


def test_a_folder_must_be_there_and_is_made_only_when_that_is_asked_for(tmp_path: Path) -> None:
    (mount,) = mounts([volume(f"{tmp_path}/{{user}}")], "m", "ann")
    with pytest.raises(VolumeError, match=r"volume home: .*/ann: No such file"):
        ready(mount)
    assert not mount.path.exists()
    (made,) = mounts([volume(f"{tmp_path}/{{user}}", create=True, owner=os.getuid())], "m", "ann")
    ready(made)
    assert mount.path.stat().st_mode & 0o777 == 0o700
    mount.path.chmod(0o750)
    ready(made)
    assert mount.path.stat().st_mode & 0o777 == 0o750, "one that is there stays as it is"


def test_c26_links_and_files_in_its_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "ann").symlink_to(tmp_path / "secret")
    (tmp_path / "bo").write_text("")
    for user in ("ann", "bo"):
        (mount,) = mounts([volume(f"{tmp_path}/{{user}}", create=True)], "m", user)
        with pytest.raises(VolumeError, match="Not a directory"):
            ready(mount)
    with pytest.raises(VolumeError, match="No such file"):
        ready(Mount(volume("/nowhere/x"), Path("/nowhere/x")))


def agent(*volumes: Mapping[str, object], **more: object) -> AgentSettings:
    settings: AgentSettings = AgentSchema().load(
        {"host": "h1", "broker_url": "amqp://x", "console_address": "h1:1", "volumes": list(volumes), **more}
    )
    return settings


def test_a_volume_is_read_only_9p_unless_it_is_said() -> None:
    (made,) = agent({"tag": "course", "path": "/srv/course"}).volumes
    assert (made.kind, made.read_only, made.target, made.create) == (Kind.NINE_P, True, "/mnt/course", False)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"path": "srv"}, "path"),
        ({"path": "/srv/../etc"}, "'..'"),
        ({"path": "/srv/{user}/x"}, "last part"),
        ({"path": "/srv/x{user}"}, "last part"),
        ({"path": "/srv/{user}/{user}"}, "last part"),
        ({"read_only": False}, "virtiofs"),
        ({"path": "/srv/{user}"}, "virtiofs"),
        ({"kind": "virtiofs", "create": True}, "create"),
        ({"kind": "passthrough"}, "kind"),
        ({"tag": "a,readonly=off"}, "tag"),
        ({"tag": "../x"}, "tag"),
        ({"tag": "x" * 31}, "tag"),
        ({"target": "/mnt/a b"}, "target"),
        ({"target": "/mnt/a\nb"}, "target"),
        ({"owner": 0}, "owner"),
        ({"owner": 199_999}, "guests' user ids"),
        ({"owner": 209_999}, "guests' user ids"),
        ({"mode": "rw"}, "mode"),
    ],
)
def test_c26_what_can_t_be_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError) as refused:
        agent({"tag": "course", "path": "/srv/course", **changes})
    assert problem in str(refused.value.messages)


def test_two_volumes_need_two_tags() -> None:
    with pytest.raises(ValidationError, match="tag of its own"):
        agent({"tag": "a", "path": "/srv/a"}, {"tag": "a", "path": "/srv/b"})


@pytest.mark.parametrize(("network", "bridge"), [("bridge", ""), ("passt", "br0"), ("none", "br0"), ("bridge", "b;r")])
def test_a_bridge_is_named_where_it_is_used_and_there_alone(network: str, bridge: str) -> None:
    with pytest.raises(ValidationError):
        agent(network=network, bridge=bridge)
    assert agent(network="bridge", bridge="br0").bridge == "br0"


def test_a_file_server_is_known_by_its_guest_before_and_after_it_is_virtiofsd() -> None:
    sid, other = "1" * 32, "2" * 32
    (mount,) = mounts([volume()], "m", "a b")
    line = share.command(sid, 7, mount)
    assert line[1:] == ["-m", "deskfleet.agent.share", sid, "7", "300000", "rw", "/srv/home", "a%20b"]
    for running in (line, [share.name_of(sid), "-f", "--fd=7"]):
        assert share.serves(sid, running) and not share.serves(other, running)
    assert not share.serves(sid, []) and not share.serves(sid, ["qemu-system-x86_64", "-uuid", sid])
    (reading,) = mounts([volume("/srv/tools", read_only=True)], "m", "ann")
    assert share.command(sid, 7, reading)[-3:] == ["ro", "/srv/tools", ""]
