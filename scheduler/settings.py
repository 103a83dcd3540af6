"""The [scheduler] section of the settings file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate, validates_schema

from deskfleet.runtime.settings import SecretField
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.policy import NORMAL, Caps, Policy, Pool, QueueClass, Rest, Weights
from deskfleet.scheduler.unit import Limits
from deskfleet.schemas.machine import NAME
from deskfleet.schemas.messages import ADDRESS

_NAME = validate.Regexp(rf"\A{NAME.pattern}\Z")


_GROUP = fields.Str(validate=validate.Length(1, 256))


def _names() -> fields.List[str]:
    return fields.List(fields.Str(validate=validate.Length(1, 256)), load_default=list)


class _Section(Schema):
    class Meta:
        unknown = RAISE


class _WeightsSchema(_Section):
    memory = fields.Float(load_default=1.0, validate=validate.Range(0, 1000))
    cpus = fields.Float(load_default=1.0, validate=validate.Range(0, 1000))
    idle = fields.Float(load_default=0.2, validate=validate.Range(0, 1000))

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Weights:
        return Weights(**data)


class _PoolSchema(_Section):
    hosts = fields.List(fields.Str(validate=validate.Length(1, 63)), required=True, validate=validate.Length(1))
    labels = fields.List(fields.Str(validate=_NAME), load_default=list)
    groups = _names()
    exclusive = fields.Bool(load_default=False, truthy={True}, falsy={False})
    confine = fields.Bool(load_default=False, truthy={True}, falsy={False})

    @validates_schema
    def _sense(self, data: Mapping[str, Any], **_: Any) -> None:
        if (data["exclusive"] or data["confine"]) and not data["groups"]:
            raise ValidationError("exclusive and confine need groups: without them nobody could use the pool")


class _ClassSchema(_Section):
    name = fields.Str(required=True, validate=_NAME)
    users = _names()
    groups = _names()

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> QueueClass:
        return QueueClass(data["name"], tuple(data["users"]), tuple(data["groups"]))


class _CapsSchema(_Section):
    sessions = fields.Int(load_default=None, strict=True, validate=validate.Range(0))
    cpus = fields.Int(load_default=None, strict=True, validate=validate.Range(0))
    memory_mib = fields.Int(load_default=None, strict=True, validate=validate.Range(0))
    gpus = fields.Int(load_default=None, strict=True, validate=validate.Range(0))

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Caps:
        return Caps(**data)


class _RestSchema(_Section):
    failures = fields.Int(load_default=3, validate=validate.Range(1, 1000))
    window_s = fields.Float(load_default=1200.0, validate=validate.Range(1))
    first_s = fields.Float(load_default=300.0, validate=validate.Range(1))
    longest_s = fields.Float(load_default=3600.0, validate=validate.Range(1))

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Rest:
        return Rest(**data)


class SchedulerSchema(_Section):
    """[scheduler]. Times in seconds, memory and disk in MiB, load per CPU."""

    broker_url = SecretField(required=True)
    broker_ca = fields.Str(load_default="")
    ops_listen = fields.Str(load_default="127.0.0.1:9101", validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))
    policy = fields.Str(load_default="spread", validate=validate.OneOf(["spread", "pack"]))
    weights = fields.Nested(_WeightsSchema, load_default=Weights)
    cpu_overcommit = fields.Float(load_default=4.0, validate=validate.Range(0.1, 100))
    memory_overcommit = fields.Float(load_default=1.0, validate=validate.Range(0.1, 10))
    host_reserve_mib = fields.Int(load_default=512, validate=validate.Range(0))
    guest_overhead_mib = fields.Int(load_default=96, validate=validate.Range(0))
    disk_reserve_mib = fields.Int(load_default=2048, validate=validate.Range(0))
    max_load = fields.Float(load_default=4.0, validate=validate.Range(0.1, 1000))
    templates_min = fields.Int(load_default=2, validate=validate.Range(0, 10_000))
    templates_share = fields.Float(load_default=0.25, validate=validate.Range(0, 1))
    max_sessions = fields.Int(load_default=200, validate=validate.Range(1))
    max_attempts = fields.Int(load_default=3, validate=validate.Range(1, 100))
    max_lifetime_s = fields.Int(load_default=30 * 24 * 3600, validate=validate.Range(60))
    grace_s = fields.Int(load_default=60, validate=validate.Range(0))
    connect_s = fields.Int(load_default=600, validate=validate.Range(1))
    idle_s = fields.Int(load_default=0, validate=validate.Range(0))
    rest = fields.Nested(_RestSchema, load_default=Rest)
    pools = fields.Dict(fields.Str(validate=_NAME), fields.Nested(_PoolSchema), load_default=dict)
    classes = fields.List(fields.Nested(_ClassSchema), load_default=list)
    user_caps = fields.Nested(_CapsSchema, load_default=Caps)
    group_caps = fields.Dict(
        fields.Str(validate=validate.Length(1, 256)), fields.Nested(_CapsSchema), load_default=dict
    )

    @validates_schema
    def _class_names(self, data: Mapping[str, Any], **_: Any) -> None:
        names = [entry.name for entry in data["classes"]]
        if len(names) != len(set(names)) or NORMAL in names:
            raise ValidationError(f"each class needs a name of its own, other than {NORMAL!r}", "classes")

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        settings = Settings(
            policy=_policy(data),
            limits=Limits(data["grace_s"], data["connect_s"], data["idle_s"]),
            max_attempts=data["max_attempts"],
            max_lifetime_s=data["max_lifetime_s"],
        )
        return {
            **{name: data[name] for name in ("broker_url", "broker_ca")},
            "ops_listen": data["ops_listen"],
            "settings": settings,
        }


_AS_THEY_ARE = (
    "weights", "cpu_overcommit", "memory_overcommit", "host_reserve_mib", "guest_overhead_mib", "disk_reserve_mib",
    "max_load", "max_sessions", "rest", "user_caps", "templates_min", "templates_share",
)  # fmt: skip


def _policy(data: Mapping[str, Any]) -> Policy:
    return replace(
        Policy(spread=data["policy"] == "spread", **{name: data[name] for name in _AS_THEY_ARE}),
        pools=tuple(_pool(name, pool) for name, pool in data["pools"].items()),
        classes=tuple(data["classes"]),
        group_caps=tuple(data["group_caps"].items()),
    )


def _pool(name: str, data: Mapping[str, Any]) -> Pool:
    lists = {key: tuple(data[key]) for key in ("hosts", "labels", "groups")}
    return Pool(name, **lists, exclusive=data["exclusive"], confine=data["confine"])
