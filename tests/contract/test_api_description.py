"""The HTTP API against its own description, by schemathesis: whatever a program sends that fits the description, or
nearly does, is answered, never by a fault of ours, and in the shape that is promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from support.portals import PASSWORD, World, bearer

from deskfleet.portal.app import create_app
from deskfleet.schemas.session import State

MINE = "a" * 32
EXAMPLES = 20


#: Nothing that can be made up names something here, or a token may not do it.
NEVER_FOUND = {
    "DELETE /api/v1/sessions/{sid}/shares/{name}",
    "DELETE /api/v1/tokens/{name}",
    "GET /api/v1/tokens",
    "GET /api/v1/dead-letters/{name}",
    "DELETE /api/v1/dead-letters/{name}",
    "POST /api/v1/dead-letters/{name}/replay",
    "POST /api/v1/tokens",
}


def try_one(operation: Any, world: World, people: list[dict[str, str]]) -> set[int]:
    """Call an operation in many ways, as each of these people; the statuses of the answers."""
    calls = 0
    statuses: set[int] = set()

    @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        nonlocal calls
        # Mostly a name that is one: else nothing but "no such desktop" would be tried.
        for name, real in (("sid", MINE), ("host", "h1")):
            if name in (case.path_parameters or {}) and calls % 8:
                case.path_parameters[name] = real
        for headers in people:
            response = case.call(headers=headers)
            checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
            case.validate_response(response, checks=checks)
            statuses.add(response.status_code)
            calls += 1
        world.tick(1)

    call()
    return statuses


def test_whatever_is_sent_is_answered_as_the_description_says(tmp_path: Path) -> None:
    world = World(tmp_path, sharing="anybody")
    world.portal.accounts.add("alice", PASSWORD)
    world.portal.accounts.add("boss", PASSWORD, admin=True)
    world.host("h1")
    world.session(MINE, "alice")
    world.session("b" * 32, "alice", State.ENDED)
    schema = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", create_app(world.portal))
    answered = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        world.host("h1")
        people = [bearer(world, name) for name in ("alice", "boss")]
        answered[operation.label] = try_one(operation, world, people)
    assert len(answered) >= 20, answered
    for label, statuses in answered.items():
        assert statuses - {401, 403, 404} or label in NEVER_FOUND, f"{label} was never really tried: {statuses}"
    world.close()
