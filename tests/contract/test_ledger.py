"""The ledger's promises, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from support.postgres import PrivatePostgres

from deskfleet.ledger.engine import LedgerError, check_revision, migrate, open_engine
from deskfleet.ledger.reader import Reader, Wait
from deskfleet.ledger.writer import Conflict, Writer
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import GuestReport, HostReport, Phase
from deskfleet.schemas.session import Event, Outcome, Resources, Session, State, advance, place
from deskfleet.schemas.verdict import Verdict


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
        return f"sqlite:///{tmp_path}/ledger.db"
    server: PrivatePostgres = request.getfixturevalue("postgres")
    return server.database(f"t{abs(hash(request.node.nodeid))}")


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = open_engine(url)
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def writer(engine: Engine) -> Writer:
    return Writer(engine)


@pytest.fixture
def reader(engine: Engine, url: str) -> Iterator[Reader]:
    read_only = open_engine(url, read_only=True)
    yield Reader(read_only)
    read_only.dispose()


def a_session(number: int = 1, **changes: object) -> Session:
    session = Session(
        sid=f"{number:032x}",
        user="zoë",
        machine="tiny",
        resources=Resources(2, 512, 4),
        persistent=True,
        lifetime_s=3600,
        wait_s=60,
        created_at=1000.0,
        changed_at=1000.0,
    )
    return replace(session, **changes)  # type: ignore[arg-type]


def a_report(host: str = "h1", **changes: object) -> HostReport:
    report = HostReport(host, "i", 1, "boot", 0, False, "127.0.0.1:5700", "tcg", 4, 8192, 0.5, 4096, 1000, 500)
    return replace(report, **changes)  # type: ignore[arg-type]


def test_a_repeated_request_is_one_row(writer: Writer, reader: Reader) -> None:
    with writer.begin() as tx:
        assert tx.add(a_session())
        assert not tx.add(a_session(user="mallory"))
    with writer.begin() as tx:
        assert not tx.add(a_session())
    assert [s.user for s in reader.live()] == ["zoë"]


def test_everything_of_a_session_comes_back(writer: Writer, reader: Reader) -> None:
    before = a_session(resources=Resources(2, 512, 4, 1, "A100"))
    after = place(before, "h1", 7, ("0000:01:00.0",))
    with writer.begin() as tx:
        tx.add(before)
        tx.save(before, after, Event.PLACE)
    assert reader.session(before.sid) == after
    assert [(e.event, e.state, e.host) for e in reader.timeline(before.sid)] == [(Event.PLACE, State.ASSIGNED, "h1")]


def test_a_change_on_a_stale_row_conflicts_and_leaves_nothing(writer: Writer, reader: Reader) -> None:
    before = a_session()
    with writer.begin() as tx:
        tx.add(before)
        tx.save(before, place(before, "h1", 1), Event.PLACE)
    with pytest.raises(Conflict), writer.begin() as tx:
        tx.add(a_session(2))
        tx.save(before, place(before, "h2", 1), Event.PLACE)
    assert [s.host for s in reader.live()] == ["h1"]


def test_a_change_under_an_old_generation_conflicts(writer: Writer) -> None:
    before = a_session()
    first = place(before, "h1", 1)
    second = place(advance(first, Event.RETRY), "h1", 2)
    with writer.begin() as tx:
        tx.add(before)
        tx.save(before, first, Event.PLACE)
        tx.save(first, advance(first, Event.RETRY), Event.RETRY)
        tx.save(advance(first, Event.RETRY), second, Event.PLACE)
    with pytest.raises(Conflict), writer.begin() as tx:
        tx.save(first, advance(first, Event.READY), Event.READY)


def test_a_generation_is_claimed_once(writer: Writer) -> None:
    with writer.begin() as tx:
        tx.add_host("h1")
        tx.add_host("h1")
        assert tx.claim("h1", 0) == 1
    with pytest.raises(Conflict), writer.begin() as tx:
        tx.claim("h1", 0)
    with writer.begin() as tx:
        tx.raise_generation("h1", 9)
        tx.raise_generation("h1", 3)
        assert tx.hosts()[0].generation == 9


def test_i3_a_gpu_is_held_once_and_freed_with_its_session(writer: Writer) -> None:
    one, two = a_session(1), a_session(2)
    held = place(one, "h1", 1, ("0000:01:00.0",))
    with writer.begin() as tx:
        tx.add(one)
        tx.add(two)
        tx.save(one, held, Event.PLACE)
    with pytest.raises(Conflict), writer.begin() as tx:
        tx.save(two, place(two, "h1", 2, ("0000:01:00.0",)), Event.PLACE)
    with writer.begin() as tx:
        tx.save(two, place(two, "h2", 1, ("0000:01:00.0",)), Event.PLACE)
    with writer.begin() as tx:
        tx.save(held, advance(held, Event.RETRY), Event.RETRY)
    with writer.begin() as tx:
        tx.save(advance(held, Event.RETRY), place(one, "h1", 3, ("0000:01:00.0",)), Event.PLACE)


def test_an_end_without_outcome_is_refused_by_the_table_itself(engine: Engine, writer: Writer) -> None:
    with writer.begin() as tx:
        tx.add(a_session())
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(text("UPDATE session SET state = 'ended'"))


def test_hosts_reports_and_drain(writer: Writer, reader: Reader) -> None:
    guest = GuestReport("a" * 32, 3, Phase.ENDED, True, 2, Outcome.FAILED, Reason.QEMU_EXITED, "it fell")
    report = a_report(guests=(guest,), images=("b" * 64,))
    with writer.begin() as tx:
        tx.add_host("h1")
        tx.save_reports([(report, 5.0)])
        assert tx.drain("h1", True, "new disks")
        assert not tx.drain("nowhere", True)
    (host,) = reader.hosts()
    assert (host.report, host.seen_at, host.draining, host.message) == (report, 5.0, True, "new disks")
    newer = replace(report, load1=3.5, memory_free_mib=77, disk_free_mib=5)
    with writer.begin() as tx:
        tx.save_figures([(newer, 6.0)])
        tx.set_dead("h1", True)
    (host,) = reader.hosts()
    assert (host.report, host.seen_at, host.dead) == (newer, 6.0, True)
    with writer.begin() as tx:
        tx.save_reports([(report, 7.0)])
    assert reader.hosts()[0].report == report, "a full report puts older figures out of force"


def test_queue_place_verdicts_and_lists(writer: Writer, reader: Reader) -> None:
    sessions = [a_session(n) for n in (3, 1, 2)]
    verdict = Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free")
    ended = replace(advance(sessions[0], Event.GIVE_UP, outcome=Outcome.NO_CAPACITY), changed_at=2.0)
    with writer.begin() as tx:
        for session in sessions:
            tx.add(session)
        tx.explain([(sessions[1].sid, Wait(1, 90.0, (verdict,)), 12.5)])
        tx.save(sessions[0], ended, Event.GIVE_UP)
    waits = [None, Wait(1, 90.0, (verdict,)), Wait(None, None, ())]
    assert [reader.watched(s.sid) for s in sessions] == [
        (reader.session(s.sid), wait) for s, wait in zip(sessions, waits, strict=True)
    ]
    assert reader.watched("f" * 32) is None
    assert [s.sid for s in reader.of_user("zoë")] == [s.sid for s in reversed(sessions)]
    assert reader.known([sessions[0].sid, "f" * 32]) == {sessions[0].sid}
    assert len(reader.recent()) == 3
    assert [s.waited_s for s in reader.live()] == [12.5, 0.0]


def test_the_reader_cannot_write(writer: Writer, reader: Reader) -> None:
    with pytest.raises(DBAPIError), reader._engine.begin() as connection:
        connection.execute(text("DELETE FROM session"))


def test_a_ledger_of_another_revision_is_refused(engine: Engine) -> None:
    check_revision(engine)
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    with pytest.raises(LedgerError, match="deskfleet migrate"):
        check_revision(engine)
