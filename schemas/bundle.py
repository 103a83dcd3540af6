"""What a new host is given, in one file: its name, its way to the broker, its certificate and key."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate

from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.host import HOST
from deskfleet.schemas.messages import ADDRESS

KIND = "deskfleet-host-1"
_LARGEST = 1 << 18
_PEM = validate.Regexp(r"\A\s*-----BEGIN [A-Z ]+-----")


class BundleError(DeskfleetError):
    """Raised when a file is no bundle, with what is wrong."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything that makes a machine a host. Secret: whoever has it can speak as this host, and as no other.

    `broker_ca`, `cert`, `key` and `ca` are PEM texts; `broker_ca` is empty when the system's authorities vouch for the
    broker. `console_address` is where proxies reach the host.
    """

    host: str
    broker_url: str = field(repr=False)
    console_address: str
    cert: str
    key: str = field(repr=False)
    ca: str
    broker_ca: str = ""

    def dumps(self) -> str:
        """The bundle as text."""
        return json.dumps({"kind": KIND, **asdict(self)}, indent=1)


class _BundleSchema(Schema):
    class Meta:
        unknown = RAISE

    kind = fields.Str(required=True, validate=validate.Equal(KIND))
    host = fields.Str(required=True, validate=validate.Regexp(rf"\A{HOST.pattern}\Z"))
    broker_url = fields.Str(required=True, validate=validate.Regexp(r"\Aamqps?://[^\s]+\Z"))
    console_address = fields.Str(required=True, validate=validate.Regexp(rf"\A{ADDRESS.pattern}\Z"))
    cert = fields.Str(required=True, validate=_PEM)
    key = fields.Str(required=True, validate=_PEM)
    ca = fields.Str(required=True, validate=_PEM)
    broker_ca = fields.Str(load_default="")

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Bundle:
        data.pop("kind")
        return Bundle(**data)


def parse_bundle(text: str) -> Bundle:
    """The bundle that a text holds.

    Raises:
        BundleError: it is none, or not whole. The message shows none of its secrets.
    """
    if len(text) > _LARGEST:
        raise BundleError("this is no bundle: it is too long")
    try:
        bundle: Bundle = _BundleSchema().load(json.loads(text))
    except (ValueError, RecursionError):
        raise BundleError("this is no bundle: it is not JSON") from None
    except ValidationError as error:
        raise BundleError(f"this is no bundle: {', '.join(sorted(error.messages_dict))} missing or wrong") from None
    return bundle
