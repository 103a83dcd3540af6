"""The wire: what is encoded comes back, what is not valid is refused with its bytes, nothing else ever happens."""

from __future__ import annotations

import base64
import json
import struct
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskfleet.schemas.errors import DecodeError, Reason
from deskfleet.schemas.host import (
    Fetch,
    FetchFault,
    FetchState,
    Gpu,
    GuestReport,
    HostBeat,
    HostReport,
    Phase,
    implausible,
)
from deskfleet.schemas.machine import Drivers, Firmware, Format, Os, ReadyBy, Video
from deskfleet.schemas.messages import (
    CatalogueImage,
    Console,
    ConsolesAsked,
    ConsolesListed,
    DrainRequested,
    ExtendRequested,
    GrantRevoked,
    HostDeclaredDead,
    HostFence,
    HostImages,
    HostInventory,
    HostTemplates,
    LaunchRequested,
    Message,
    PlacementAnswered,
    PlacementAsked,
    SessionChanged,
    StopRequested,
    TemplateOrdered,
    VmExtend,
    VmLook,
    VmPicture,
    VmReport,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Birth, Outcome, Resources, State
from deskfleet.schemas.template import Blueprint, TemplateOrder, TemplateReport, TemplateState
from deskfleet.schemas.verdict import Forecast, Outlook, Verdict
from deskfleet.schemas.wire import REGISTRY, decode, decode_as, encode

SID = "0123456789abcdef" * 2
SIZE = Resources(2, 512, 4, 1, "A100")
GUEST = GuestReport(SID, 7, Phase.ENDED, True, 2, Outcome.FAILED, Reason.QEMU_EXITED, "é", 7.5, 60, Birth.FORKED)
GPU = Gpu("0000:01:00.0", "A100", 12, ("0000:01:00.0", "0000:01:00.1"), True)
REPORT = HostReport(
    host="h1",
    incarnation="i1",
    seq=4,
    boot_id="b",
    last_generation=9,
    fenced=False,
    console="[::1]:6080",
    accel="tcg",
    cpus=4,
    memory_mib=8192,
    load1=0.25,
    memory_free_mib=4096,
    disk_mib=1000,
    disk_free_mib=500,
    images=("a" * 64,),
    gpus=(GPU,),
    guests=(GUEST,),
    problems=("no KVM",),
    catalogue="f" * 16,
    fetches=(Fetch("b" * 64, FetchState.FAILED, 40, 20_000, FetchFault.WRONG_DIGEST, "why"),),
    version="0.1.0",
    digest="0" * 16,
    templates=(
        TemplateReport(
            "e" * 16, "desktop", "staff", 2, 1024, TemplateState.READY, True, 700, 1_790_000_000, 1, 7, 2, "x"
        ),
    ),
    blueprints="d" * 16,
)
START = VmStart(
    SID, 7, "zoë", "tiny", Os.LINUX, "a" * 64, Format.QCOW2, Video.VIRTIO, Firmware.BIOS, SIZE, GPU.functions,
    True, 3600, 60, 600, template="e" * 16,
)  # fmt: skip
BLUEPRINT = Blueprint(
    "desktop", Os.LINUX, "a" * 64, Format.QCOW2, Video.VIRTIO, Firmware.BIOS, Drivers.VIRTIO, 2, 1024, 4, 8, 16384,
    ReadyBy.MARK, False, "staff",
)  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 320, 240)
FORECAST = Forecast(
    Outlook.WAITS,
    "",
    3,
    720.5,
    "",
    SIZE,
    (Verdict("h1", Reason.GPU_BUSY, "1 of 1 GPUs in use"), Verdict("", Reason.USER_CAP)),
)
EXAMPLES: list[Message] = [
    LaunchRequested(SID, "a@b.org", ("staff",), "tiny", SIZE, True, 3600, 60),
    StopRequested(SID, "ann", False),
    ExtendRequested(SID, "ann", False, 7200),
    DrainRequested("h1", True, "root", "new disks at 18:00"),
    HostDeclaredDead("h1", "root"),
    PlacementAsked(SID, "w1", "zoë", ("staff",), "tiny", SIZE, 3600),
    PlacementAnswered(SID, FORECAST),
    START,
    VmStop(SID, 7, Outcome.EXPIRED, Reason.EXPIRED),
    VmExtend(SID, 7, 7200),
    HostFence("h1", 12),
    HostInventory("h1"),
    VmLook(SID, "w1"),
    VmPicture("h1", SID, PNG, last=False),
    HostImages("h1", "0" * 16, (CatalogueImage("c" * 64, "a-2.qcow2", Format.QCOW2),), ("c" * 64,)),
    HostTemplates("h1", "0" * 16, (BLUEPRINT,)),
    TemplateOrdered("h1", "e" * 16, TemplateOrder.REBUILD, "root"),
    VmReport("h1", GUEST),
    REPORT,
    HostBeat("h1", "i1", 5, 9, False, "[::1]:6080", 0.5, 4000, 400, "0" * 16),
    SessionChanged(SID, State.ENDED, Outcome.LOST, "h1", 7),
    GrantRevoked("share-0123456789abcdef"),
    ConsolesAsked(SID, "w1"),
    ConsolesListed("r1", SID, (Console("zoë", "login-0123456789abcdef", 4.5),)),
]


#: Fields that came after the first version.
LATER: dict[type, set[str]] = {HostReport: {"catalogue", "fetches", "templates", "blueprints"}, VmStart: {"template"}}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_what_is_encoded_comes_back(message: Message) -> None:
    assert decode(*encode(message)) == message


def test_every_registered_type_has_an_example() -> None:
    assert {encode(message)[0] for message in EXAMPLES} == set(REGISTRY)


@pytest.mark.parametrize("kind", REGISTRY)
def test_the_schema_names_every_field_of_its_dataclass(kind: str) -> None:
    assert set(REGISTRY[kind].fields) == {field.name for field in fields(REGISTRY[kind].target)}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_unknown_fields_of_a_newer_version_are_ignored(message: Message) -> None:
    kind, body = encode(message)
    newer = {**json.loads(body), "from_the_future": {"x": [1]}}
    assert decode(kind, json.dumps(newer).encode()) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_missing_field_is_refused_and_the_bytes_are_kept(message: Message) -> None:
    kind, body = encode(message)
    for name in json.loads(body).keys() - LATER.get(type(message), set()):
        broken = json.dumps({k: v for k, v in json.loads(body).items() if k != name}).encode()
        with pytest.raises(DecodeError) as caught:
            decode(kind, broken)
        assert caught.value.body == broken
        assert name in str(caught.value)


@pytest.mark.parametrize("kind", LATER)
def test_what_an_older_version_does_not_say_has_its_default(kind: type[Message]) -> None:
    said = next(message for message in EXAMPLES if type(message) is kind)
    name, body = encode(said)
    older = {key: value for key, value in json.loads(body).items() if key not in LATER[kind]}
    defaults = {field.name: field.default for field in fields(kind) if field.name in LATER[kind]}
    assert decode(name, json.dumps(older).encode()) == replace(said, **defaults)


OF_IMAGES = [
    ("images", [{"sha256": "c" * 64, "file": "../a", "format": "raw"}]),
    ("images", [{"sha256": "c" * 63, "file": "a", "format": "raw"}]),
    ("images", [{"sha256": "c" * 64, "file": "a", "format": "exe"}]),
    ("wanted", ["x"]),
    ("catalogue", "0" * 17),
    ("fetches", [{}]),
]


OF_TEMPLATES = [
    ("template", "../../0123456789"),
    ("template", "0" * 17),
    ("key", ""),
    ("key", "/etc/passwd"),
    ("order", "burn"),
    ("blueprints", [{}]),
    ("blueprints", "0" * 17),
    ("templates", [{"key": "0" * 16}]),
]


@pytest.mark.parametrize(("field", "value"), OF_IMAGES + OF_TEMPLATES)
def test_c26_what_is_said_of_images_is_data(field: str, value: object) -> None:
    refused = 0
    for message in EXAMPLES:
        kind, body = encode(message)
        if field in json.loads(body):
            with pytest.raises(DecodeError):
                decode(kind, json.dumps({**json.loads(body), field: value}).encode())
            refused += 1
    assert refused


HOSTILE = [
    ("sid", "../../etc/passwd"),
    ("sid", SID + "\n"),
    ("sid", SID.upper()),
    ("generation", -1),
    ("generation", True),
    ("generation", 1.5),
    ("generation", 10**400),
    ("machine", "a;touch pwned"),
    ("machine", "$(id)"),
    ("machine", "-monitor stdio"),
    ("machine", "x,readonly=off"),
    ("gpu_addresses", ["0000:01:00.0,rombar=0"]),
    ("gpu_addresses", ["../0000:01:00.0"]),
    ("gpu_addresses", "0000:01:00.0"),
    ("sha256", "a" * 63),
    ("persistent", "yes"),
    ("lifetime_s", 0),
    ("user", ""),
    ("format", "parallels"),
    ("resources", {"cpus": 0, "memory_mib": 1, "disk_gib": 1, "gpus": 0, "gpu_model": ""}),
]


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_c26_names_and_numbers_that_become_arguments_are_refused(name: str, value: object) -> None:
    kind, body = encode(START)
    with pytest.raises(DecodeError):
        decode(kind, json.dumps({**json.loads(body), name: value}).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1", "1e300", '"4"', "null"])
def test_c34_nonsense_in_a_heartbeat_is_refused(number: str) -> None:
    kind, body = encode(REPORT)
    with pytest.raises(DecodeError):
        decode(kind, body.replace(b'"load1":0.25', b'"load1":' + number.encode()).replace(b'"seq":4', b'"seq":null'))


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"null", b"[]", b'"x"', b"{", b"[" * 100_000, b'{"sid": "' + b"x" * (1 << 20) + b'"}']
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    for kind in REGISTRY:
        with pytest.raises(DecodeError):
            decode(kind, body)


def test_an_unknown_type_and_a_wrong_one_are_refused() -> None:
    with pytest.raises(DecodeError, match="not known"):
        decode("vm.start.v9", b"{}")
    with pytest.raises(DecodeError, match=r"host\.heartbeat\.v1"):
        decode_as(HostReport, *encode(START))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=6),
    max_leaves=12,
)


@given(st.sampled_from(sorted(REGISTRY)), JSON)
def test_any_json_is_either_a_message_or_a_decode_error(kind: str, value: object) -> None:
    with suppress(DecodeError):
        decode(kind, json.dumps(value).encode())


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_message_with_one_field_spoilt_is_still_a_message_or_a_decode_error(
    message: Message, data: st.DataObject
) -> None:
    kind, body = encode(message)
    content = json.loads(body)
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSON)
    with suppress(DecodeError):
        decode(kind, json.dumps(content).encode())


def test_figures_that_cannot_be_true_together_are_told() -> None:
    assert implausible(REPORT) == ""
    for wrong in (
        replace(REPORT, cpus=0),
        replace(REPORT, memory_free_mib=99_999),
        replace(REPORT, disk_free_mib=1001),
        replace(REPORT, guests=(GUEST, GUEST)),
        replace(REPORT, gpus=(GPU, replace(GPU, address="0000:02:00.0"))),
    ):
        assert implausible(wrong)


@pytest.mark.parametrize(
    "png",
    [
        "",
        "!!!",
        7,
        base64.b64encode(b"<svg onload=alert(1)>" + bytes(30)).decode(),
        base64.b64encode(PNG[:20]).decode(),
        base64.b64encode(PNG[:16] + struct.pack(">II", 321, 240)).decode(),
        base64.b64encode(PNG[:16] + struct.pack(">II", 0, 240)).decode(),
        base64.b64encode(PNG + bytes(64 * 1024)).decode(),
    ],
)
def test_what_is_no_small_png_is_no_picture(png: object) -> None:
    body = {"host": "h1", "sid": SID, "png": png, "last": True}
    with pytest.raises(DecodeError):
        decode("vm.picture.v1", json.dumps(body).encode())
