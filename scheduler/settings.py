"""The [scheduler], [ledger] and [machines] sections of the settings file."""

from __future__ import annotations

from typing import Any

from marshmallow import RAISE, Schema, fields, post_load, validate

from deskfleet.runtime.settings import SecretField
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.placement import Policy
from deskfleet.scheduler.unit import Limits
from deskfleet.schemas.messages import ADDRESS


class SchedulerSchema(Schema):
    """[scheduler]. Times in seconds, memory and disk in MiB, load per CPU."""

    class Meta:
        unknown = RAISE

    broker_url = SecretField(required=True)
    ops_listen = fields.Str(load_default="127.0.0.1:9101", validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))
    policy = fields.Str(load_default="spread", validate=validate.OneOf(["spread", "pack"]))
    cpu_overcommit = fields.Float(load_default=4.0, validate=validate.Range(0.1, 100))
    memory_overcommit = fields.Float(load_default=1.0, validate=validate.Range(0.1, 10))
    host_reserve_mib = fields.Int(load_default=512, validate=validate.Range(0))
    guest_overhead_mib = fields.Int(load_default=96, validate=validate.Range(0))
    disk_reserve_mib = fields.Int(load_default=2048, validate=validate.Range(0))
    max_load = fields.Float(load_default=4.0, validate=validate.Range(0.1, 1000))
    max_sessions = fields.Int(load_default=200, validate=validate.Range(1))
    max_attempts = fields.Int(load_default=3, validate=validate.Range(1, 100))
    max_lifetime_s = fields.Int(load_default=30 * 24 * 3600, validate=validate.Range(60))
    grace_s = fields.Int(load_default=60, validate=validate.Range(0))
    connect_s = fields.Int(load_default=600, validate=validate.Range(1))

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        policy = Policy(
            spread=data["policy"] == "spread",
            cpu_overcommit=data["cpu_overcommit"],
            memory_overcommit=data["memory_overcommit"],
            host_reserve_mib=data["host_reserve_mib"],
            guest_overhead_mib=data["guest_overhead_mib"],
            disk_reserve_mib=data["disk_reserve_mib"],
            max_load=data["max_load"],
            max_sessions=data["max_sessions"],
        )
        settings = Settings(
            policy=policy,
            limits=Limits(data["grace_s"], data["connect_s"]),
            max_attempts=data["max_attempts"],
            max_lifetime_s=data["max_lifetime_s"],
        )
        return {"broker_url": data["broker_url"], "ops_listen": data["ops_listen"], "settings": settings}
