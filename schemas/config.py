"""Settings that several services read: where the ledger and the catalogue are."""

from __future__ import annotations

from marshmallow import RAISE, Schema, fields, validate

#: Every section that a settings file may hold; a service reads its own and the shared ones.
SECTIONS = frozenset({"ledger", "machines", "portal", "scheduler", "agent", "proxy"})


class LedgerSchema(Schema):
    """[ledger]: `url` as SQLAlchemy writes it, sqlite:///PATH or postgresql+psycopg://…"""

    class Meta:
        unknown = RAISE

    url = fields.Str(required=True, validate=validate.Regexp(r"\A(sqlite|postgresql)"))


class MachinesSchema(Schema):
    """[machines]: `catalogue` is the folder of the catalogue's TOML files, `images` the folder on this machine that
    imported images are put into."""

    class Meta:
        unknown = RAISE

    catalogue = fields.Str(required=True, validate=validate.Length(1))
    images = fields.Str(load_default="/var/lib/deskfleet/images", validate=validate.Regexp(r"\A/"))


def address(text: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT as host and port; the settings' schemas have checked the shape."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
