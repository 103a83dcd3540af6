"""The portal's own database keeps its promises on SQLite and on PostgreSQL, also when many do the same at once."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import inspect, select, text
from support.portals import PASSWORD, World
from support.postgres import PrivatePostgres

from deskfleet.ledger.engine import check_revision, migrate, open_engine
from deskfleet.portal import tables
from deskfleet.portal.accounts import AccountError
from deskfleet.portal.audit import question
from deskfleet.portal.auth import Identity
from deskfleet.portal.history import Span
from deskfleet.portal.outbox import Stage
from deskfleet.portal.scopes import Scope
from deskfleet.portal.store import Store, StoreError
from deskfleet.portal.throttle import counters
from deskfleet.runtime.bus import Outgoing
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Resources
from deskfleet.schemas.topology import DEAD

T = TypeVar("T")
SID = "a" * 32


@pytest.fixture(scope="module")
def postgres() -> Iterator[PrivatePostgres]:
    with tempfile.TemporaryDirectory(prefix="dfpg", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = PrivatePostgres(Path(folder) / "pg")
        server.start()
        yield server
        server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/portal.db"
    server: PrivatePostgres = request.getfixturevalue("postgres")
    return server.database(f"p{abs(hash(request.node.nodeid))}")


@pytest.fixture
def world(tmp_path: Path, url: str) -> Iterator[World]:
    world = World(tmp_path, url)
    yield world
    world.close()


def at_once(many: int, action: Callable[[int], T]) -> list[T]:
    """What `many` threads get that begin together; an exception in one is raised here."""
    gate = threading.Barrier(many)

    def run(number: int) -> T:
        gate.wait()
        return action(number)

    with ThreadPoolExecutor(many) as pool:
        return [done.result() for done in [pool.submit(run, number) for number in range(many)]]


def want(sid: str = SID, user: str = "alice") -> LaunchRequested:
    return LaunchRequested(sid, user, ("lab",), "desktop", Resources(2, 1024, 4), False, 3600, 600)


def test_the_migration_makes_what_the_tables_say(world: World) -> None:
    with world.portal.store.reading() as connection:
        found = inspect(connection)
        for table in tables.metadata.tables.values():
            assert {c["name"] for c in found.get_columns(table.name)} == {c.name for c in table.columns}
            assert {i["name"] for i in found.get_indexes(table.name)} >= {i.name for i in table.indexes}


def test_it_may_stand_in_the_ledgers_database(url: str) -> None:
    engine = open_engine(url)
    migrate(engine)
    store = Store(url)
    store.migrate()
    store.migrate()
    store.check_revision()
    check_revision(engine)
    store.close()
    engine.dispose()


def test_another_revision_is_refused_with_the_command_that_mends_it(url: str) -> None:
    store = Store(url)
    with pytest.raises(StoreError, match="deskfleet migrate"):
        store.check_revision()
    store.migrate()
    with store.writing() as connection:
        connection.execute(text("UPDATE portal_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="9999"):
        store.check_revision()
    store.close()


def test_twenty_equal_launches_at_once_are_one_row_and_one_message(world: World) -> None:
    assert sorted(at_once(20, lambda _: world.portal.outbox.launch(want()))) == [False] * 19 + [True]
    assert world.sent() == [want()]
    with world.portal.store.reading() as connection:
        assert len(connection.execute(select(tables.request)).all()) == 1


def test_many_launches_and_sweeps_at_once_lose_nothing(world: World) -> None:
    def act(number: int) -> bool:
        if number % 4 == 0:
            world.portal.outbox.sweep()
            return False
        return world.portal.outbox.launch(want(f"{number:032x}", f"user{number}"))

    assert sum(at_once(24, act)) == 18
    assert len(world.sent()) == 18
    world.take_up()
    world.tick(3)
    assert world.portal.outbox.waiting() == 0


def test_portals_that_sweep_at_once_send_each_request_once(world: World) -> None:
    world.broker.crash()
    for number in range(20):
        world.portal.outbox.launch(want(f"{number:032x}"))
    others = [world.build() for _ in range(3)]
    world.broker.recover()
    world.clock.now += 5
    at_once(4, lambda number: [world.portal, *others][number].outbox.sweep())
    assert len(world.sent()) == 20
    for other in others:
        other.store.close()


def test_the_figures_of_a_minute_are_kept_once_and_thinned_once_whoever_comes_first(world: World) -> None:
    others = [world.build() for _ in range(3)]
    portals = [world.portal, *others]
    for load in (1.0, 3.0, 5.0):
        world.host(load1=load)
        at_once(4, lambda number: portals[number].history.keep(portals[number].fleet.hosts(), {"h1": 1}))
        world.clock.now += 300
    world.host()
    at_once(4, lambda number: portals[number].sample())
    figures = world.portal.history.of("h1", Span.HOUR).figures
    assert [load for load in figures["load1"] if load is not None] == [1.0, 3.0, 5.0, 1.5]
    figures = world.portal.history.of("h1", Span.MONTH).figures
    assert sum(load is not None for load in figures["load1"]) >= 1
    assert figures["gpus_used"][-1] == 1.0
    for other in others:
        other.store.close()


def test_dead_letters_are_kept_whatever_is_in_them_and_told_apart(world: World) -> None:
    for body in (b"\x00\xff", b'{"sid": "%s"}' % SID.encode()):
        world.bus.publish(Outgoing(DEAD, "", "a\0b", body)).result(0)
        world.broker.duplicate(DEAD)
        while world.broker.deliver_one(DEAD):
            pass
    second, first = world.portal.letters.newest()
    assert (first.body, first.sid, second.sid) == (b"\x00\xff", "", SID) and second.number > first.number
    assert world.portal.letters.newest(before=second.number) == [first]
    assert world.portal.letters.discard_all(first.number) == 1 == world.portal.letters.count()


def test_the_trail_is_searched_alike(world: World) -> None:
    for target in ("100%", "100x", "a_b", "aXb"):
        world.portal.audit.note("alice", "-", "launch", target)
    for sought, found in (("0%", ["100%"]), ("_", ["a_b"]), ("\0", ["aXb", "a_b", "100x", "100%"])):
        which = question({"text": sought, "since": "2000-01-01"})
        assert [entry.target for entry in world.portal.audit.newest(9, which)] == found
    assert world.portal.audit.actions() == ["launch"]
    world.portal.logins.open(Identity("alice", "local"), 60)
    assert world.portal.logins.now() == {"alice": 1}


def test_stop_and_confirm_at_once_end_in_cancelled(world: World) -> None:
    for number in range(10):
        sid = f"{number:032x}"
        world.portal.outbox.launch(want(sid))
        confirm = list(world.deferred)
        world.deferred.clear()
        at_once(
            2,
            lambda which, sid=sid, confirm=confirm: (
                world.portal.outbox.stop(sid, "alice", False) if which else [action() for action in confirm]
            ),
        )
        request = world.portal.outbox.find(sid)
        assert request and request.stage is Stage.CANCELLED


def test_guesses_at_once_are_counted_each(world: World) -> None:
    allowed = at_once(16, lambda _: world.portal.throttle.begin(counters("alice", "6.6.6.6", "")))
    assert allowed.count(0) == 3


def test_guesses_on_many_names_at_once_block_nobody(world: World) -> None:
    at_once(16, lambda number: world.portal.throttle.begin(counters(f"user{number % 4}", f"10.0.0.{number % 3}", "")))


def test_one_account_of_a_name(world: World) -> None:
    def add(_: int) -> bool:
        try:
            world.portal.accounts.add("alice", PASSWORD)
        except AccountError:
            return False
        return True

    assert sorted(at_once(6, add)) == [False] * 5 + [True]


def test_logins_tokens_and_audit(world: World) -> None:
    identity = Identity("经济 O'Neil", "local", ("a", "b"))
    secret = world.portal.logins.open(identity, 60)
    token, info = world.portal.logins.make_token(identity, "x" * 80, 60, list(Scope))
    assert world.portal.logins.find(secret) == identity
    assert world.portal.logins.find_token(token) == (identity, tuple(Scope))
    assert world.portal.logins.drop_token(identity.user, info.name)
    world.portal.logins.close(secret)
    assert world.portal.logins.find(secret) is None
    world.portal.audit.note(identity.user * 60, "::1", "stop", SID, "long " * 1000)
    (entry,) = world.portal.audit.newest()
    assert entry.actor.startswith(identity.user) and len(entry.actor) <= 320 and len(entry.detail) <= 1000
    world.portal.prune()


def test_reading_can_not_write(world: World) -> None:
    from sqlalchemy.exc import DBAPIError

    with world.portal.store.reading() as connection, pytest.raises(DBAPIError):
        connection.execute(tables.audit.delete())
