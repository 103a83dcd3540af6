"""How a host's own words stand on the wire: its reports, its heartbeats, its guests."""

from __future__ import annotations

from marshmallow import fields, validate

from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import (
    MOST_FETCHES,
    Fetch,
    FetchFault,
    FetchState,
    Gpu,
    GuestReport,
    HostBeat,
    HostReport,
    Phase,
)
from deskfleet.schemas.machine import DIGEST, NAME
from deskfleet.schemas.messages import ADDRESS, INVENTORY, PCI_ADDRESS
from deskfleet.schemas.session import Birth, Outcome
from deskfleet.schemas.template import KEY, MOST_TEMPLATES, TemplateReport, TemplateState
from deskfleet.schemas.wire_fields import (
    Tuple,
    Wire,
    addresses_field,
    bool_field,
    digest_field,
    host_field,
    int_field,
    sid_field,
    text_field,
)


class GuestReportSchema(Wire):
    target = GuestReport
    sid = sid_field()
    generation = int_field(0)
    phase = fields.Enum(Phase, required=True, by_value=True)
    ran = bool_field()
    viewers = int_field(0, 100_000)
    outcome = fields.Enum(Outcome, required=True, by_value=True, allow_none=True)
    reason = fields.Enum(Reason, required=True, by_value=True, allow_none=True)
    detail = text_field(4000)
    left_s = fields.Float(required=True, allow_none=True, allow_nan=False, validate=validate.Range(0, 1e9))
    lifetime_s = fields.Int(required=True, strict=True, allow_none=True, validate=validate.Range(1, 366 * 24 * 3600))
    birth = fields.Enum(Birth, by_value=True, allow_none=True, load_default=None)


class GpuSchema(Wire):
    target = Gpu
    address = fields.Str(required=True, validate=validate.Regexp(rf"\A{PCI_ADDRESS.pattern}\Z"))
    model = text_field(128, 1)
    group = int_field(0, 1 << 20)
    functions = addresses_field()
    offered = bool_field()
    problem = text_field(400)


class FetchSchema(Wire):
    target = Fetch
    sha256 = digest_field()
    state = fields.Enum(FetchState, required=True, by_value=True)
    percent = int_field(0, 100)
    mib = int_field(0, 1 << 32)
    fault = fields.Enum(FetchFault, required=True, by_value=True, allow_none=True)
    detail = text_field(400)


class TemplateReportSchema(Wire):
    target = TemplateReport
    key = fields.Str(required=True, validate=validate.Regexp(rf"\A{KEY.pattern}\Z"))
    machine = fields.Str(required=True, validate=validate.Regexp(rf"\A{NAME.pattern}\Z"))
    tenant = text_field(256)
    cpus = int_field(1, 4096)
    memory_mib = int_field(1, 1 << 24)
    state = fields.Enum(TemplateState, required=True, by_value=True)
    serving = bool_field()
    mib = int_field(0, 1 << 32)
    made_at = int_field()
    forks = int_field(0, 100_000)
    hits = int_field()
    misses = int_field()
    detail = text_field(400)


class HostReportSchema(Wire):
    target = HostReport
    host = host_field()
    incarnation = text_field(64, 1)
    seq = int_field()
    boot_id = text_field(64, 1)
    last_generation = int_field()
    fenced = bool_field()
    console = fields.Str(required=True, validate=validate.Regexp(rf"\A({ADDRESS.pattern})?\Z"))
    accel = fields.Str(required=True, validate=validate.OneOf(["kvm", "tcg", "none"]))
    cpus = int_field(0, 65_536)
    memory_mib = int_field(0, 1 << 32)
    load1 = fields.Float(required=True, allow_nan=False, validate=validate.Range(0, 1e6))
    memory_free_mib = int_field(0, 1 << 32)
    disk_mib = int_field(0, 1 << 40)
    disk_free_mib = int_field(0, 1 << 40)
    images = Tuple(fields.Str(validate=validate.Regexp(rf"\A{DIGEST.pattern}\Z")), 10_000)
    gpus = Tuple(fields.Nested(GpuSchema), 64)
    guests = Tuple(fields.Nested(GuestReportSchema), 5_000)
    problems = Tuple(fields.Str(validate=validate.Length(1, 400)), 100)
    version = text_field(64)
    digest = fields.Str(required=True, validate=validate.Regexp(rf"\A({INVENTORY.pattern})?\Z"))
    # Agents of an older version say none of these.
    catalogue = fields.Str(load_default="", validate=validate.Regexp(rf"\A({INVENTORY.pattern})?\Z"))
    fetches = Tuple(fields.Nested(FetchSchema), MOST_FETCHES, required=False, load_default=None, allow_none=True)
    templates = Tuple(
        fields.Nested(TemplateReportSchema), MOST_TEMPLATES, required=False, load_default=None, allow_none=True
    )
    blueprints = fields.Str(load_default="", validate=validate.Regexp(rf"\A({INVENTORY.pattern})?\Z"))


class HostBeatSchema(Wire):
    target = HostBeat
    host = host_field()
    incarnation = text_field(64, 1)
    seq = int_field()
    last_generation = int_field()
    fenced = bool_field()
    console = fields.Str(required=True, validate=validate.Regexp(rf"\A({ADDRESS.pattern})?\Z"))
    load1 = fields.Float(required=True, allow_nan=False, validate=validate.Range(0, 1e6))
    memory_free_mib = int_field(0, 1 << 32)
    disk_free_mib = int_field(0, 1 << 40)
    digest = fields.Str(required=True, validate=validate.Regexp(rf"\A{INVENTORY.pattern}\Z"))
