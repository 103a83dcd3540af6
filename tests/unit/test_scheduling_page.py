"""docs/scheduling.md: its table names every key with its default, its example is valid, its reasons exist."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from marshmallow import Schema, fields, missing

from deskfleet.scheduler.filters import FILTERS
from deskfleet.scheduler.settings import SchedulerSchema
from deskfleet.schemas.errors import Reason

PAGE = (Path(__file__).parents[2] / "docs" / "scheduling.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table in a section."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def defaults(schema: Schema, prefix: str = "") -> dict[str, str]:
    """Each key with its default, as the page writes it."""
    found: dict[str, str] = {}
    for name, field in schema.fields.items():
        if isinstance(field, fields.Nested):
            found |= defaults(field.schema, f"{prefix}{name}.")
            continue
        value: Any = field.load_default
        value = value() if callable(value) and value is not missing else value
        if value is missing:
            text = "–"
        elif value is None:
            text = "no limit"
        else:
            text = f"`{json.dumps(value)}`"
        found[prefix + name] = text
    return found


def test_every_key_stands_in_the_table_with_its_default() -> None:
    told = {key.strip("`"): default for key, default, _ in rows("Every key")}
    assert told == defaults(SchedulerSchema())


def test_the_filters_and_their_reasons_are_those_of_the_code() -> None:
    table = rows("How a host is chosen")
    assert len(table) == len(FILTERS)
    reasons = [reason for row in table for reason in re.findall(r"`(\w+)`", row[2])]
    assert all(Reason(reason) for reason in reasons) and len(reasons) == len(set(reasons))


def test_the_example_is_valid() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    loaded = SchedulerSchema().load(tomllib.loads(text)["scheduler"])
    policy = loaded["settings"].policy
    assert not policy.spread and policy.weights.memory == 2.0 and policy.rest.failures == 2
    assert policy.class_of("ann", ["staff"]) == "staff"
    assert policy.confined(["course-101"]) == {"lab"} and policy.admitted(["vision"]) == {"gpu"}
