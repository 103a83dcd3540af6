"""Servers that fail rest and are tried again; a conversation ends in time; many at once don't take every thread."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.bus_harness import TickingClock
from support.portals import PASSWORD

from deskfleet.portal.auth import Answer, Chain, Identity, Realm, Rights, Unavailable, WrongPassword
from deskfleet.portal.auth_ldap import group_name
from deskfleet.portal.auth_settings import Endpoint
from deskfleet.portal.distant import Away, Deadline, Servers
from deskfleet.portal.room import Room
from deskfleet.portal.throttle import folded

PATIENCE_S = 30
FIRST, SECOND = Endpoint("one", 1, True, True), Endpoint("two", 2, True, True)


class Question:
    """Answers by server; remembers who was asked."""

    def __init__(self, clock: TickingClock) -> None:
        self.clock = clock
        self.away: set[Endpoint] = set()
        self.asked: list[Endpoint] = []
        self.takes_s = 0.0

    def __call__(self, endpoint: Endpoint) -> str:
        self.asked.append(endpoint)
        self.clock.now += self.takes_s
        if endpoint in self.away:
            raise Away("no route")
        return endpoint.host


@pytest.fixture
def clock() -> TickingClock:
    return TickingClock()


def test_the_first_that_works_answers_and_one_that_fails_rests_longer_each_time(clock: TickingClock) -> None:
    servers, question = Servers([FIRST, SECOND], 5, clock), Question(clock)
    assert servers.ask(question) == "one"
    question.away = {FIRST}
    for pause in (2, 4, 8, 16, 32, 60, 60):
        question.asked.clear()
        assert servers.ask(question) == "two" and question.asked == [FIRST, SECOND]
        clock.now += pause - 0.5
        assert servers.ask(question) == "two" and question.asked == [FIRST, SECOND, SECOND]
        clock.now += 0.5
    question.away = set()
    clock.now += 60
    assert servers.ask(question) == servers.ask(question) == "one"


def test_all_away_is_told_at_once_while_they_rest(clock: TickingClock) -> None:
    servers, question = Servers([FIRST], 5, clock), Question(clock)
    question.away = {FIRST}
    for _ in range(5):
        with pytest.raises(Away, match="one:1"):
            servers.ask(question)
    assert question.asked == [FIRST]


def test_one_person_tries_it_again_and_the_others_do_not_wait(clock: TickingClock) -> None:
    servers, question = Servers([FIRST], 5, clock), Question(clock)
    question.away = {FIRST}
    with pytest.raises(Away):
        servers.ask(question)
    clock.now += 3

    def again(endpoint: Endpoint) -> str:
        with pytest.raises(Away, match="rests"):
            servers.ask(question)  # somebody else, meanwhile
        return endpoint.host

    assert servers.ask(again) == "one" and question.asked == [FIRST]


def test_no_further_server_is_begun_with_when_the_time_is_over(clock: TickingClock) -> None:
    servers, question = Servers([FIRST, SECOND], 5, clock), Question(clock)
    question.away, question.takes_s = {FIRST, SECOND}, 5
    with pytest.raises(Away):
        servers.ask(question)
    assert question.asked == [FIRST]
    with pytest.raises(Away):
        servers.ask(question)
    assert question.asked in ([FIRST, SECOND], [FIRST, FIRST])


def test_a_deadline_cuts_what_it_watches() -> None:
    mine, other = socket.socketpair()
    with mine, other, Deadline(0.05) as deadline:
        deadline.watch(mine)
        mine.settimeout(PATIENCE_S)
        assert mine.recv(1) == b"", "cut, long before the socket's own limit"


def test_a_deadline_that_is_met_cuts_nothing() -> None:
    mine, other = socket.socketpair()
    with mine, other:
        with Deadline(PATIENCE_S) as deadline:
            deadline.watch(mine)
        other.sendall(b"x")
        assert mine.recv(1) == b"x"


class Hanging:
    """A method that does not answer until it is told to."""

    name = "hanging"
    distant = True

    def __init__(self) -> None:
        self.inside = threading.Semaphore(0)
        self.go = threading.Event()

    def check(self, user: str, password: str) -> Answer:
        del user, password
        self.inside.release()
        self.go.wait(PATIENCE_S)
        return WrongPassword()

    def current(self, identity: Identity) -> Identity | None:
        return identity


def test_c08_whoever_comes_while_one_hangs_holds_no_thread() -> None:
    now = [0.0]
    room = Room(2, lambda: now[0])
    with room.place() as first:
        now[0] = 0.6  # it has waited for longer than any healthy server takes
        with room.place() as second:
            assert first and second, "there was room"
            for _ in range(1000):
                with room.place() as third:
                    assert not third
    with room.place() as again:
        assert again


def test_c08_a_class_that_logs_in_at_once_gets_in_one_after_another() -> None:
    room, inside, most = Room(2, time.monotonic), [0], [0]

    def log_in(_: int) -> bool:
        with room.place() as found:
            inside[0] += found
            most[0] = max(most[0], inside[0])
            time.sleep(0.005)
            inside[0] -= found
            return found

    with ThreadPoolExecutor(16) as people:
        assert all(people.map(log_in, range(50)))
    assert most[0] <= 2


def test_c08_a_method_that_hangs_takes_some_threads_only() -> None:
    method = Hanging()
    chain = Chain([method], frozenset(), room=Room(2, time.monotonic))
    threads = [threading.Thread(target=chain.check, args=("alice", PASSWORD)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert method.inside.acquire(timeout=PATIENCE_S)
    answer = chain.check("bob", PASSWORD)
    assert isinstance(answer, Unavailable) and "too many others" in answer.detail
    method.go.set()
    for thread in threads:
        thread.join()
    assert isinstance(chain.check("bob", PASSWORD), WrongPassword)


class Fixed:
    """A method that always says the same."""

    def __init__(self, name: str, answer: Answer, distant: bool) -> None:
        self.name = name
        self.distant = distant
        self._answer = answer

    def check(self, user: str, password: str) -> Answer:
        del user, password
        return self._answer

    def current(self, identity: Identity) -> Identity | None:
        return identity


def test_c08_one_that_is_away_never_falls_through_to_a_yes_of_another_but_to_the_rescue_accounts() -> None:
    away = Fixed("ldap", Unavailable("no route"), True)
    imap, local = Fixed("imap", Identity("alice", "imap"), True), Fixed("local", Identity("rescue", "local"), False)
    assert isinstance(Chain([away, imap], frozenset()).check("alice", PASSWORD), Unavailable)
    assert Chain([away, imap, local], frozenset()).check("rescue", PASSWORD) == Identity("rescue", "local")


def test_every_answer_is_counted_by_method() -> None:
    counted: list[tuple[str, str]] = []
    methods = [Fixed("ldap", WrongPassword(), True), Fixed("imap", Unavailable("x"), True)]
    methods.append(Fixed("local", Identity("a", "local"), False))
    Chain(methods, frozenset(), count=lambda *labels: counted.append(labels)).check("alice", PASSWORD)
    assert counted == [("ldap", "wrong"), ("imap", "unavailable"), ("local", "right")]


@pytest.mark.parametrize(
    ("own", "name", "user"),
    [
        ("example.org", "root", "root@example.org"),
        ("example.org", "root@example.org", "root@example.org"),
        ("example.org", "root@Example.ORG", "root@example.org"),
        ("example.org", "root@imap", "root@imap@example.org"),
        ("example.org", "@example.org", "@example.org@example.org"),
        ("", "root", "root"),
        ("", "root@imap", None),
        ("", "root@IMAP", None),
        ("", "root@elsewhere", "root@elsewhere"),
        ("", "gutie\u0301rrez", "guti\u00e9rrez"),
    ],
)
def test_c09_a_name_of_one_method_is_never_that_of_another(own: str, name: str, user: str | None) -> None:
    assert Realm(own, frozenset({"imap"})).user_of(name) == user


def test_rights_by_group_are_exact() -> None:
    rights = Rights(frozenset({"admins"}), frozenset({"staff"}))
    assert rights.judge("a", "ldap", ["staff", "admins"]) == Identity("a", "ldap", ("admins", "staff"), admin=True)
    assert rights.judge("a", "ldap", ["admins"]) is None
    other = rights.judge("a", "ldap", ["staff", "ADMINS", "admins2", "admin"])
    assert other is not None and not other.admin


@pytest.mark.parametrize(
    ("dn", "name"),
    [
        ("cn=staff,ou=groups,dc=x", "staff"),
        ("CN=Staff,OU=Groups,DC=X", "Staff"),
        ("cn=a\\,b,ou=groups,dc=x", "a,b"),
        ("cn=caf\\c3\\a9,ou=groups,dc=x", "café"),
        ("cn=inner,ou=sub,ou=groups,dc=x", "inner"),
        ("cn=staff,ou=clubs,dc=x", None),
        ("cn=staff,ou=groups,dc=x,dc=y", None),
        ("ou=groups,dc=x", None),
        ("cn=evil\\,ou\\=groups\\,dc\\=x,dc=y", None),
        ("cn=a+sn=b,ou=groups,dc=x", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_what_a_group_is_called(dn: str, name: str | None) -> None:
    assert group_name(dn, "ou=groups,dc=x") == name


def test_all_ways_to_type_a_name_share_one_counter() -> None:
    typed = ["alice", "ALICE", "Alice@Example.org", "\uff41lice", "alice@EXAMPLE.ORG"]
    assert {folded(text, {"example.org"}) for text in typed} == {"alice"}
    assert folded("alice@other.org", {"example.org"}) == "alice@other.org"
