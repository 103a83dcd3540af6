"""The administrator's pages: what they show, what they change, and what they refuse to guess."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
from flask import Flask
from support.portals import PASSWORD, Browser, World, bearer, signed_in
from werkzeug.test import TestResponse

from deskfleet.ledger.reader import Wait
from deskfleet.portal.app import create_app
from deskfleet.portal.audit import Question
from deskfleet.portal.auth import Identity, Unavailable
from deskfleet.portal.checks import Check, checks
from deskfleet.portal.session_list import Filter, people
from deskfleet.runtime.bus import Outgoing
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Fetch, FetchState
from deskfleet.schemas.messages import LaunchRequested, StopRequested
from deskfleet.schemas.session import Resources, State
from deskfleet.schemas.topology import COMMANDS, DEAD, SCHEDULER_COMMANDS, for_proxy
from deskfleet.schemas.verdict import Verdict
from deskfleet.schemas.wire import encode

A, B, C = "a" * 32, "b" * 32, "c" * 32
HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.portal.accounts.add("boss", PASSWORD, admin=True)
    world.host("h1")
    yield world
    world.close()


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


@pytest.fixture
def boss(app: Flask) -> Browser:
    return signed_in(app, "boss")


def post(boss: Browser, path: str, **data: object) -> TestResponse:
    return boss.post(path, data, token=boss.csrf("/desktops"))


def audited(world: World, action: str) -> list[tuple[str, str, str]]:
    return [(e.actor, e.target, e.detail) for e in world.portal.audit.newest() if e.action == action]


def bury(world: World, sid: str = A, user: str = "alice") -> str:
    """A launch that nobody took, as the portal keeps it; its name."""
    message = LaunchRequested(sid, user, (), "desktop", Resources(2, 1024, 4), True, 3600, 600)
    reader = world.broker.connect("scheduler", lambda action: action())
    reader.consume(SCHEDULER_COMMANDS, lambda delivery: delivery.reject())
    reader.start()
    world.bus.publish(Outgoing(COMMANDS, "scheduler", *encode(message))).result(0)
    assert world.broker.deliver_one(SCHEDULER_COMMANDS) and world.broker.deliver_one(DEAD)
    reader.stop()
    return world.portal.letters.newest()[0].name


# Desktops.


def test_desktops_are_narrowed_down_by_each_field(world: World, boss: Browser) -> None:
    world.session(A, "alice", State.RUNNING)
    world.session(B, "bob", State.QUEUED)
    for query, shown in (
        ("", {A, B}),
        ("user=alice", {A}),
        ("user=ali", set()),
        ("host=h1", {A}),
        ("state=queued", {B}),
        ("machine=desktop", {A, B}),
        ("machine=other", set()),
        ("text=BOB", {B}),
        ("text=linux&state=running", {A}),
        (f"text={B[:5]}", {B}),
        ("nonsense=1", {A, B}),
    ):
        for path in ("/admin/sessions", "/admin/sessions/part"):
            text = boss.get(f"{path}?{query}").text
            assert set(re.findall(r'data-sid="(\w+)"', text)) == shown, (path, query)


def test_a_hostile_filter_is_only_text(world: World, boss: Browser) -> None:
    for path in ("/admin/sessions", "/admin/audit"):
        answer = boss.get(path, query_string={"user": HOSTILE, "actor": HOSTILE, "text": HOSTILE, "host": "\0"})
        assert answer.status_code == 200 and "<script>alert" not in answer.text


def test_the_page_says_why_a_desktop_waits(world: World, boss: Browser) -> None:
    world.session(A, "alice", State.QUEUED)
    with world.writer.begin() as tx:
        tx.explain([(A, Wait(3, 600.0, (Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free"),)), 1.0)])
    text = boss.get("/admin/sessions/part").text
    assert "3rd in the queue · h1: 2.1 of 4 GiB free" in text


def test_all_that_match_are_stopped_when_their_number_is_typed(world: World, boss: Browser) -> None:
    for number in range(3):
        world.session(f"{number:032x}", "alice")
    world.session(B, "bob")
    wrong = post(boss, "/admin/sessions/stop-all", user="alice", typed="4")
    assert wrong.status_code == 409 and 'data-reason="not_confirmed"' in wrong.text and world.sent() == []
    done = post(boss, "/admin/sessions/stop-all", user="alice", typed="3")
    assert (done.status_code, done.headers["Location"]) == (303, "/admin/sessions?user=alice")
    stopped = {request.sid: request for request in world.sent() if isinstance(request, StopRequested)}
    assert set(stopped) == {f"{number:032x}" for number in range(3)}
    assert all(request.admin and request.actor == "boss" for request in stopped.values())
    assert sorted(audited(world, "stop")) == [("boss", f"{n:032x}", "of alice, one of 3") for n in range(3)]


@pytest.mark.parametrize("typed", ["", "x", "-1", "0", "1.0", "9" * 400])
def test_nothing_is_stopped_by_a_slip(world: World, boss: Browser, typed: str) -> None:
    world.session(A, "alice")
    assert post(boss, "/admin/sessions/stop-all", typed=typed).status_code == 409
    assert post(boss, "/admin/sessions/stop-all", user="nobody", typed="0").status_code == 409
    assert world.sent() == [] and audited(world, "stop") == []


def test_people_are_counted(world: World, boss: Browser) -> None:
    world.session(A, "alice", State.RUNNING)
    world.session(B, "alice", State.QUEUED)
    world.session(C, "bob", State.ENDED)
    rows = people(world.portal.logins.now(), world.portal.desktops.live())
    assert [(p.user, p.logins, p.running, p.waiting) for p in rows] == [("alice", 0, 1, 1), ("boss", 1, 0, 0)]
    assert set(re.findall(r'data-user="(\w+)"', boss.get("/admin/people/part").text)) == {"alice", "boss"}


def test_a_login_that_has_ended_counts_no_more(world: World) -> None:
    world.portal.logins.open(Identity("carol", "local"), 60)
    assert world.portal.logins.now() == {"carol": 1}
    world.clock.now += 61
    assert world.portal.logins.now() == {}


def test_machines_show_which_host_holds_them(world: World, boss: Browser) -> None:
    world.machine("secret", users='["somebody"]')
    world.host("h1", images=("ab" * 32,))
    world.host("h2", seen_ago=300)
    text = boss.get("/admin/machines/part").text
    assert 'data-host="h1" data-image-state="held"' in text and 'data-host="h2"' not in text
    assert "for they are silent: h2" in re.sub(r"\s+", " ", text.replace("</p>", ""))
    assert 'id="try-desktop"' in text and 'id="try-secret"' not in text


# Dead letters.


def test_a_dead_letter_is_looked_at_and_sent_again(world: World, boss: Browser) -> None:
    name = bury(world, user=HOSTILE[:20])
    assert f'data-letter="{name}"' in boss.get("/admin/queues/").text
    page = boss.get(f"/admin/queues/dead/{name}").text
    assert A in page and "&#34;sid&#34;" in page and "<script>" not in page.split("<main")[1]
    assert post(boss, f"/admin/queues/dead/{name}/replay").status_code == 303
    assert [request.sid for request in world.sent()] == [A] and world.portal.letters.count() == 0
    assert audited(world, "replay") == [("boss", A, "launch.requested.v1 of portal, rejected in scheduler.commands")]
    gone = post(boss, f"/admin/queues/dead/{name}/replay")
    assert gone.status_code == 404 and len(world.sent()) == 1


def test_a_letter_is_discarded_by_its_name_only(world: World, boss: Browser) -> None:
    name = bury(world)
    for typed in ("", name[:3], "xxxx", name):
        assert post(boss, f"/admin/queues/dead/{name}/discard", typed=typed).status_code == 409
    assert world.portal.letters.count() == 1 and audited(world, "discard") == []
    assert post(boss, f"/admin/queues/dead/{name}/discard", typed=name[:4]).status_code == 303
    assert world.portal.letters.count() == 0 and len(audited(world, "discard")) == 1


def test_all_letters_are_discarded_by_their_number_only(world: World, boss: Browser) -> None:
    bury(world, A)
    bury(world, B)
    up_to = world.portal.letters.newest()[0].number
    bury(world, C)
    for typed in ("", "3", "0"):
        assert post(boss, "/admin/queues/dead/discard-all", typed=typed, up_to=up_to).status_code == 409
    assert world.portal.letters.count() == 3
    assert post(boss, "/admin/queues/dead/discard-all", typed="2", up_to=up_to).status_code == 303
    assert [letter.sid for letter in world.portal.letters.newest()] == [C]
    assert audited(world, "discard all") == [("boss", "", "2 dead letters")]


def test_a_replay_that_the_queue_does_not_take_says_so_and_loses_nothing(world: World, boss: Browser) -> None:
    name = bury(world)
    world.broker.blocked = True
    answer = post(boss, f"/admin/queues/dead/{name}/replay")
    assert answer.status_code == 503 and 'data-reason="queue_away"' in answer.text
    assert world.portal.letters.count() == 1 and audited(world, "replay") == []


def test_what_is_not_measured_is_unknown_and_never_nought(world: World, boss: Browser) -> None:
    row = re.search(r'data-queue="scheduler.commands".*?</tr>', boss.get("/admin/queues/part").text, re.DOTALL)
    assert row
    figures = dict(re.findall(r'data-figure="(\w+)">(?:<span class="muted">)?(\w+)', row[0]))
    assert figures == {"messages": "0", "unacked": "unknown", "consumers": "0"}
    world.broker.crash()
    row = re.search(r'data-queue="scheduler.commands".*?</tr>', boss.get("/admin/queues/part").text, re.DOTALL)
    assert row and set(re.findall(r'data-figure="\w+">(?:<span class="muted">)?(\w+)', row[0])) == {"unknown"}


# Who did what.


def fill(world: World, many: int) -> None:
    for number in range(many):
        world.portal.audit.note("alice", "10.0.0.1", "launch", f"{number:032x}", "desktop")


def test_the_trail_is_paged_and_no_line_is_shown_twice_or_left_out(world: World, boss: Browser) -> None:
    fill(world, 450)
    seen: list[str] = []
    path = "/admin/audit?actor=alice"
    while path:
        text = boss.get(path).text
        seen += re.findall(r'data-entry="(\d+)"', text)
        following = re.search(r'rel="next" href="([^"]+)"', text)
        path = following[1].replace("&amp;", "&") if following else ""
    assert len(seen) == len(set(seen)) == 450 and seen == sorted(seen, key=int, reverse=True)


def test_the_trail_is_narrowed_down_by_each_field(world: World, app: Flask) -> None:
    world.portal.audit.note("alice", "10.0.0.1", "launch", A, "100%_sure")
    world.clock.now += 2 * 24 * 3600
    world.portal.audit.note("bob", "10.0.0.2", "stop", B, "of alice")
    first, second = (e.at for e in reversed(world.portal.audit.newest(2)))
    day = [datetime.fromtimestamp(at, UTC).date() for at in (first, second)]
    boss = signed_in(app, "boss")
    for query, targets in (
        ("actor=alice", [A]),
        ("action=stop", [B]),
        ("text=%25_", [A]),
        ("text=_", [A]),
        (f"text={B[:9]}", [B]),
        (f"until={day[0]}", [A]),
        (f"since={day[1]}", [B]),
        (f"since={day[0]}&until={day[1]}", [B, A]),
    ):
        lines = [json.loads(line) for line in boss.get(f"/admin/audit.jsonl?{query}").text.splitlines()]
        found = [line["target"] for line in lines if line["action"] in ("launch", "stop")]
        assert found == targets, query
    bad = boss.get("/admin/audit?since=yesterday")
    assert bad.status_code == 422 and "2026-01-31" in bad.text
    assert boss.get("/admin/audit.csv?since=2026-02-31").status_code == 422


def test_the_export_is_whole_and_no_spreadsheet_runs_it(world: World, boss: Browser) -> None:
    fill(world, 1203)
    world.portal.audit.note("=cmd|' /C calc'!A0", "10.0.0.1", "launch", '@SUM("x")', "+1,\n-2")
    answer = boss.get("/admin/audit.csv?action=launch")
    assert answer.headers["Content-Type"].startswith("text/csv")
    assert "attachment" in answer.headers["Content-Disposition"]
    rows = list(csv.reader(io.StringIO(answer.text)))
    assert rows[0] == ["at", "actor", "address", "action", "target", "detail"] and len(rows) == 1205
    assert rows[1][1:] == ["'=cmd|' /C calc'!A0", "10.0.0.1", "launch", '\'@SUM("x")', "'+1,\n-2"]
    assert len({row[4] for row in rows[2:]}) == 1203
    assert audited(world, "export") == [("boss", "audit", "csv")]
    assert boss.get("/admin/audit.xml").status_code == 404


def test_an_export_is_bounded(world: World) -> None:
    fill(world, 12)
    assert len(list(world.portal.audit.every(Question(), 7))) == 7
    assert len(list(world.portal.audit.every(Question(), 700))) == 12


@pytest.mark.parametrize("number", ["-1", "x", "9" * 40, "1.5", "\u0661"])
def test_a_number_that_is_none_is_the_newest_page(world: World, boss: Browser, number: str) -> None:
    name = bury(world)
    assert f'data-letter="{name}"' in boss.get("/admin/queues/part", query_string={"before": number}).text
    assert boss.get("/admin/audit", query_string={"before": number}).status_code == 200
    assert post(boss, "/admin/queues/dead/discard-all", typed=number, up_to=number).status_code == 409


# Health.


def by_name(world: World) -> dict[str, Check]:
    return {check.name: check for check in checks(world.portal)}


def levels(world: World) -> dict[str, str]:
    return {name: check.level.value for name, check in by_name(world).items()}


def test_each_part_that_is_away_is_told_with_what_to_do(world: World, boss: Browser) -> None:
    for name in ("scheduler", "proxies"):
        assert levels(world)[name] == "bad" and by_name(world)[name].advice
    assert set(re.findall(r'data-check="([\w.]+)"', boss.get("/admin/health/part").text)) == set(levels(world))
    text = boss.get("/admin/health").text
    assert 'data-check="scheduler" data-level="bad"' in text and "Start deskfleet-scheduler" in text


def test_a_service_that_works_is_good(world: World) -> None:
    world.portal.chain.check("boss", PASSWORD)
    scheduler = world.broker.connect("scheduler", lambda action: action())
    scheduler.consume(SCHEDULER_COMMANDS, lambda delivery: delivery.ack())
    scheduler.start()
    proxy = world.broker.connect("proxy", lambda action: action(), for_proxy("x1"))
    proxy.start()
    world.host("h1", version=version("deskfleet"))
    found = levels(world)
    assert set(found.values()) == {"good"}


def test_what_can_not_be_told_is_unknown(world: World) -> None:
    world.broker.crash()
    found = levels(world)
    assert (found["broker"], found["scheduler"], found["proxies"]) == ("bad", "unknown", "unknown")


def test_a_scheduler_that_takes_no_heartbeats_is_told(world: World) -> None:
    scheduler = world.broker.connect("scheduler", lambda action: action())
    scheduler.consume(SCHEDULER_COMMANDS, lambda delivery: delivery.ack())
    scheduler.start()
    world.clock.now += 300
    found = by_name(world)
    assert found["scheduler"].level == "warn" and "5 min ago" in found["scheduler"].sentence
    assert found["hosts"].level == "bad" and "h1" in found["hosts"].sentence


def test_hosts_of_another_version_are_named(world: World) -> None:
    world.host("h2", version="0.0.1")
    found = by_name(world)["versions"]
    assert found.level == "warn" and "h2 0.0.1" in found.sentence


def test_dead_letters_are_told(world: World) -> None:
    assert levels(world)["dead_letters"] == "good"
    bury(world)
    assert levels(world)["dead_letters"] == "warn"


def test_a_way_to_log_in_that_does_not_answer_is_told_until_it_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert levels(world)["sign_in.local"] == "unknown", "nobody has tried"
    with monkeypatch.context() as patch:
        patch.setattr(world.portal.accounts, "check", lambda *_: Unavailable("away"))
        world.portal.chain.check("boss", PASSWORD)
    assert levels(world)["sign_in.local"] == "bad"
    world.portal.chain.check("boss", PASSWORD)
    assert levels(world)["sign_in.local"] == "good"
    world.clock.now += 3600
    assert levels(world)["sign_in.local"] == "unknown", "an old answer is none"


def test_every_page_says_so_when_the_ledger_is_away(world: World, boss: Browser) -> None:
    world.session(A, "alice")
    world.ledger.dispose()
    world.portal.fleet._reader._engine.dispose()
    for path in Path(world.ledger_url.removeprefix("sqlite:///")).parent.glob("ledger.db*"):
        path.unlink()
    for page in ("sessions", "people", "machines"):
        text = boss.get(f"/admin/{page}/part").text
        assert "ledger can't be read" in text and "unknown" in text, page
    assert levels(world)["ledger"] == "bad" and levels(world)["hosts"] == "unknown"
    assert post(boss, "/admin/sessions/stop-all", typed="0").status_code in (409, 503)
    assert world.sent() == []


def test_a_filter_takes_only_its_own_fields() -> None:
    assert Filter.of({"user": " a ", "sid": "x"}).given == {"user": "a"}


def test_which_hosts_hold_which_machine_by_api_too(world: World, app: Flask) -> None:
    digest = "ab" * 32
    world.host("h1", images=(digest,))
    world.host("h2", fetches=(Fetch(digest, FetchState.FETCHING, 40, 100),))
    world.host("h3", seen_ago=1e6, images=(digest,))
    answer = app.test_client().get("/api/v1/images", headers=bearer(world, "boss"))
    assert answer.json == [
        {
            "machine": "desktop",
            "sha256": digest,
            "hosts": [
                {"host": "h1", "state": "held", "percent": 100, "detail": ""},
                {"host": "h2", "state": "fetching", "percent": 40, "detail": ""},
            ],
        }
    ]
