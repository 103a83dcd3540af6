"""What the schemas of wire.py and wire_host.py are made of."""

from __future__ import annotations

import base64
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_load, validate

from deskfleet.schemas.host import HOST
from deskfleet.schemas.machine import DIGEST
from deskfleet.schemas.messages import PCI_ADDRESS
from deskfleet.schemas.picture import is_picture
from deskfleet.schemas.tickets import SID


def sid_field() -> fields.Str:
    """A session's id."""
    return fields.Str(required=True, validate=validate.Regexp(rf"\A{SID.pattern}\Z"))


def host_field() -> fields.Str:
    """A host's name."""
    return fields.Str(required=True, validate=validate.Regexp(rf"\A{HOST.pattern}\Z"))


def text_field(limit: int, least: int = 0) -> fields.Str:
    """A text of at most `limit` characters."""
    return fields.Str(required=True, validate=validate.Length(least, limit))


def int_field(low: int = 0, high: int = 1 << 40) -> fields.Int:
    """A whole number between two bounds."""
    return fields.Int(required=True, strict=True, validate=validate.Range(low, high))


def bool_field() -> fields.Bool:
    """True or false, and no word for them."""
    return fields.Bool(required=True, truthy={True}, falsy={False})


def digest_field() -> fields.Str:
    """An image's SHA-256."""
    return fields.Str(required=True, validate=validate.Regexp(rf"\A{DIGEST.pattern}\Z"))


class Tuple(fields.List[Any]):
    """A JSON list that becomes a tuple, with a limit on its length."""

    def __init__(self, item: fields.Field[Any], limit: int, *, required: bool = True, **options: Any) -> None:
        super().__init__(item, required=required, validate=validate.Length(max=limit), **options)

    def _deserialize(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(super()._deserialize(*args, **kwargs))


def addresses_field() -> Tuple:
    """PCI addresses."""
    return Tuple(fields.Str(validate=validate.Regexp(rf"\A{PCI_ADDRESS.pattern}\Z")), 64)


class Png(fields.Field[bytes]):
    """A PNG of bounded size as base64. Only its beginning is looked at: whoever draws it must not trust the rest."""

    def _serialize(self, value: Any, *_: Any, **__: Any) -> str:
        return base64.b64encode(value).decode()

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> bytes:
        try:
            png = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
        except ValueError:
            png = b""
        if not is_picture(png):
            raise ValidationError("not a small PNG")
        return png


class Wire(Schema):
    """Base of the wire schemas: ignores what it does not know and builds `target`."""

    target: type[Any]

    class Meta:
        unknown = EXCLUDE

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Any:
        return self.target(**data)
