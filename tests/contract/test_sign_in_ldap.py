"""Logging in by a real OpenLDAP: who gets in, who does not, with which rights; cases C05, C06, C08 and C09."""

from __future__ import annotations

import base64
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ldap3
import pytest
from flask import Flask
from support.bus_harness import TickingClock
from support.consoles import Authority
from support.directory_server import BASE, SERVICE, SERVICE_PASSWORD, Slapd
from support.eavesdropper import Eavesdropper
from support.portals import PASSWORD, Browser, World, settings, signed_in

from deskfleet.portal.app import create_app
from deskfleet.portal.auth import Answer, Chain, Identity, Realm, Unavailable, WrongPassword
from deskfleet.portal.auth_ldap import Directory

NAMES = [
    "gutiérrez", "Company\\User", "a.b@c.org", "经济", "O'Neil", "a b", "a+b@x", "-rf", "con", "שלום",
    "x" * 64, "y" * 300, "star*", "(paren)", "comma,equal=",
]  # fmt: skip
PEOPLE, GROUPS = f"ou=people,{BASE}", f"ou=groups,{BASE}"
PATIENCE_S = 60

# ldap3 leaves the socket to the garbage collector when the first of a name's addresses does not answer.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def entry(dn: str, *classes: str, **attributes: str | list[str]) -> str:
    lines = [f"dn:: {base64.b64encode(dn.encode()).decode()}", *(f"objectClass: {name}" for name in classes)]
    for key, values in attributes.items():
        for value in [values] if isinstance(values, str) else values:
            lines.append(f"{key}:: {base64.b64encode(value.encode()).decode()}")
    return "\n".join(lines) + "\n\n"


def person(cn: str, uid: str | list[str], **more: str | list[str]) -> str:
    values: dict[str, str | list[str]] = {"cn": cn, "sn": "x", "uid": uid, "userPassword": PASSWORD}
    return entry(f"cn={cn},{PEOPLE}", "inetOrgPerson", **values | more)


def ldif(black_hole: int) -> str:
    staff, admins, elsewhere = f"cn=staff,{GROUPS}", f"cn=desk admins,{GROUPS}", f"cn=desk admins,ou=clubs,{BASE}"
    return (
        entry(BASE, "dcObject", "organization", dc="example", o="Example")
        + entry(PEOPLE, "organizationalUnit", ou="people")
        + entry(GROUPS, "organizationalUnit", ou="groups")
        + entry(f"ou=clubs,{BASE}", "organizationalUnit", ou="clubs")
        + entry(SERVICE, "organizationalRole", "simpleSecurityObject", cn="portal", userPassword=SERVICE_PASSWORD)
        + person("Alice", "alice", memberOf=staff, mail="alice@example.org")
        + person("Boss", "boss", memberOf=[staff, admins])
        + person("Fan", "fan", memberOf=elsewhere)
        + person("Leaver", "leaver", description="disabled")
        + person("Twin", "twin1")
        + person("Two names", ["two", "names"])
        + person("Pretender", "root@imap")
        + entry(
            f"cn=Twin,ou=clubs,{BASE}", "inetOrgPerson", cn="Twin", sn="x", uid="twin2", userPassword="another password"
        )
        + "".join(person(f"Person {n}", uid) for n, uid in enumerate(NAMES))
        + entry(staff, "groupOfNames", cn="staff", member=[f"cn=Alice,{PEOPLE}", f"cn=Boss,{PEOPLE}"])
        + entry(admins, "groupOfNames", cn="desk admins", member=f"cn=Boss,{PEOPLE}")
        + entry(elsewhere, "groupOfNames", cn="desk admins", member=f"cn=Fan,{PEOPLE}")
        + entry(f"cn=posix,{GROUPS}", "posixGroup", cn="posix", gidNumber="5000", memberUid=["alice", "comma,equal="])
        + entry(f"cn=alias,{PEOPLE}", "alias", "extensibleObject", cn="alias", uid="nick",
                aliasedObjectName=f"cn=Boss,{PEOPLE}", userPassword=PASSWORD)
        + entry(f"ou=away,{BASE}", "referral", "extensibleObject", ou="away", ref=f"ldap://127.0.0.1:{black_hole}/{BASE}")
    )  # fmt: skip


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Eavesdropper]:
    """Where the directory's referral leads."""
    server = Eavesdropper(lambda _: b"", greeting=b"")
    yield server
    server.close()


@pytest.fixture(scope="module")
def slapd(tmp_path_factory: pytest.TempPathFactory, authority: Authority, elsewhere: Eavesdropper) -> Iterator[Slapd]:
    pair = authority.issue("localhost", "serverAuth")
    server = Slapd(tmp_path_factory.mktemp("ldap"), pair, ldif(elsewhere.port))
    server.start()
    yield server
    server.stop()


def section(slapd: Slapd, authority: Authority, **changes: Any) -> dict[str, Any]:
    return {
        "servers": [f"ldap://localhost:{slapd.port}"],
        "ca": authority.ca,
        "realm": "",
        "bind_dn": SERVICE,
        "bind_password": SERVICE_PASSWORD,
        "base": BASE,
        "user_filter": "(&(objectClass=inetOrgPerson)(uid={user})(!(description=disabled)))",
        "member_attribute": "memberOf",
        "group_base": GROUPS,
        "admin_groups": ["desk admins"],
    } | changes


@pytest.fixture
def clock() -> TickingClock:
    return TickingClock()


def directory(slapd: Slapd, authority: Authority, clock: TickingClock, **changes: Any) -> Directory:
    loaded = settings(auth=["ldap"], ldap=section(slapd, authority, **changes))
    assert loaded.ldap
    return Directory(loaded.ldap, Realm(loaded.ldap.realm, frozenset({"imap"})), clock)


@pytest.fixture
def method(slapd: Slapd, authority: Authority, clock: TickingClock) -> Directory:
    return directory(slapd, authority, clock)


def chain(method: Directory) -> Chain:
    return Chain([method], frozenset())


class Asked:
    """What the directory logs from here on."""

    def __init__(self, slapd: Slapd) -> None:
        self._path = slapd.log
        self._at = slapd.log.stat().st_size

    def lines(self, word: str) -> list[str]:
        text = self._path.read_bytes()[self._at :].decode("utf-8", "replace")
        return [line for line in text.splitlines() if word in line]

    def personal_binds(self) -> int:
        return len([line for line in self.lines(" BIND dn=") if "cn=portal," not in line and "mech=" not in line])


@pytest.mark.parametrize("tls", [False, True])
def test_starttls_and_tls_prove_a_person(slapd: Slapd, authority: Authority, clock: TickingClock, tls: bool) -> None:
    server = f"ldaps://localhost:{slapd.tls_port}" if tls else f"ldap://localhost:{slapd.port}"
    method = directory(slapd, authority, clock, servers=[server])
    assert method.check("alice", PASSWORD) == Identity("alice", "ldap", ("staff",))
    assert method.check("alice", PASSWORD + "x") == WrongPassword()
    assert method.check("nobody", PASSWORD) == WrongPassword()


def test_groups_make_administrators_and_count_below_their_base_only(method: Directory) -> None:
    assert method.check("boss", PASSWORD) == Identity("boss", "ldap", ("desk admins", "staff"), admin=True)
    assert method.check("fan", PASSWORD) == Identity("fan", "ldap", ()), "a club of the same name is another group"


def test_without_a_base_a_group_is_called_by_its_whole_name(
    slapd: Slapd, authority: Authority, clock: TickingClock
) -> None:
    whole = f"cn=desk admins,ou=clubs,{BASE}"
    method = directory(slapd, authority, clock, group_base="", admin_groups=[whole])
    assert method.check("fan", PASSWORD) == Identity("fan", "ldap", (whole,), admin=True)
    answer = method.check("boss", PASSWORD)
    assert isinstance(answer, Identity) and not answer.admin


def test_groups_are_searched_for_too(slapd: Slapd, authority: Authority, clock: TickingClock) -> None:
    named = directory(slapd, authority, clock, member_attribute="", group_filter="(member={dn})")
    assert named.check("boss", PASSWORD) == Identity("boss", "ldap", ("desk admins", "staff"), admin=True)
    posix = directory(slapd, authority, clock, member_attribute="", group_filter="(memberUid={user})")
    for user in ("alice", "comma,equal="):
        assert posix.check(user, PASSWORD) == Identity(user, "ldap", ("posix",))


def test_only_some_groups_may_log_in(slapd: Slapd, authority: Authority, clock: TickingClock) -> None:
    method = directory(slapd, authority, clock, allowed_groups=["staff"])
    assert isinstance(method.check("alice", PASSWORD), Identity)
    assert method.check("fan", PASSWORD) == WrongPassword()


def test_the_id_is_the_entrys_and_stands_in_the_realm(slapd: Slapd, authority: Authority, clock: TickingClock) -> None:
    method = directory(slapd, authority, clock, realm="example.org", user_filter="(|(uid={user})(mail={user}))")
    for typed in ("alice", "ALICE", "alice@example.org", "Alice@Example.org"):
        answer = method.check(typed, PASSWORD)
        assert isinstance(answer, Identity) and answer.user == "alice@example.org"
        assert method.current(answer) is not None


def test_a_name_in_another_methods_realm_is_nobody(method: Directory) -> None:
    assert method.check("root@imap", PASSWORD) == WrongPassword()


def test_an_entry_with_two_ids_is_nobody(method: Directory) -> None:
    assert method.check("two", PASSWORD) == WrongPassword()


# C05.


@pytest.mark.parametrize("password", ["", " ", "\t", "\u200b\u200b", "\0"])
@pytest.mark.parametrize("user", ["alice", "nobody"])
def test_c05_an_empty_password_is_no_password(slapd: Slapd, method: Directory, user: str, password: str) -> None:
    asked = Asked(slapd)
    assert chain(method).check(user, password) == WrongPassword()
    assert asked.lines("conn=") == [], "it is refused before any packet is sent"


def test_c05_the_server_of_this_test_says_yes_to_an_empty_password(slapd: Slapd) -> None:
    server = ldap3.Server("127.0.0.1", slapd.port, get_info=ldap3.NONE)
    connection = ldap3.Connection(server, f"cn=Alice,{PEOPLE}", "x")
    connection.open()
    connection.password = b""  # the library refuses an empty text
    connection.authentication = ldap3.SIMPLE
    connection.strategy.send("bindRequest", _empty_bind(f"cn=Alice,{PEOPLE}"))
    answer = connection.strategy.receiving()
    assert answer and b"\x0a\x01\x00" in answer[0], "success, though it is nobody's password"
    connection.unbind()


def _empty_bind(dn: str) -> Any:
    from ldap3.operation.bind import bind_operation
    from ldap3.protocol.rfc4511 import Simple

    request = bind_operation(3, ldap3.SIMPLE, dn, "x", auto_encode=True)
    request["authentication"]["simple"] = Simple(b"")
    return request


def test_c05_a_bind_that_leaves_us_anonymous_is_not_believed(
    method: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = ldap3.Connection.bind

    def anonymously(self: Any, **options: Any) -> Any:
        if self.user and "Alice" in self.user:
            self.authentication, self.user, self.password = ldap3.ANONYMOUS, None, None
        return bind(self, **options)

    monkeypatch.setattr(ldap3.Connection, "bind", anonymously)
    assert method.check("alice", PASSWORD) == WrongPassword()


# C06.


@pytest.mark.parametrize(
    "name",
    ["*", "a*", "*)(uid=*))(|(uid=*", "x)(memberOf=*", "\\2a", "cn=alice,dc=x", "alice,ou=staff", "nick", "leaver",
     "alice)(description=*", "*)(objectClass=*"],
)  # fmt: skip
def test_c06_a_name_is_never_part_of_a_filter(slapd: Slapd, method: Directory, name: str) -> None:
    asked = Asked(slapd)
    assert chain(method).check(name, PASSWORD) == WrongPassword()
    assert asked.personal_binds() == 0, "nobody's password was tried"


def test_c06_the_directory_sees_the_escapes(slapd: Slapd, method: Directory) -> None:
    asked = Asked(slapd)
    method.check("*)(uid=*", PASSWORD)
    assert any(r"(uid=\2A\29\28uid=\2A)" in line for line in asked.lines("filter=")), asked.lines("filter=")


def test_c06_two_entries_for_one_name_are_nobody(slapd: Slapd, authority: Authority, clock: TickingClock) -> None:
    method = directory(slapd, authority, clock, user_filter="(cn={user})")
    asked = Asked(slapd)
    for password in (PASSWORD, "another password"):
        assert method.check("Twin", password) == WrongPassword()
    assert asked.personal_binds() == 0


def test_c06_one_attempt_is_one_bind(slapd: Slapd, method: Directory) -> None:
    asked = Asked(slapd)
    method.check("alice", "wrong password")
    assert asked.personal_binds() == 1


# C08.


def checked(method: Directory, user: str = "alice") -> Answer:
    """The answer, in a time that no hanging server could make."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(method.check(user, PASSWORD)), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert answers, "the directory hangs, and the portal hangs with it"
    return answers[0]


def test_c08_referrals_are_not_followed(
    slapd: Slapd, authority: Authority, clock: TickingClock, method: Directory, elsewhere: Eavesdropper
) -> None:
    assert isinstance(method.check("alice", PASSWORD), Identity), "one is among what is found"
    answer = checked(directory(slapd, authority, clock, base=f"ou=away,{BASE}", timeout_s=1))
    assert isinstance(answer, Unavailable) and "referral" in answer.detail
    assert elsewhere.connections == 0


def test_c08_a_directory_that_is_paused_is_away_and_heals_by_itself(
    tmp_path: Path, authority: Authority, clock: TickingClock
) -> None:
    own = Slapd(tmp_path / "own", authority.issue("localhost", "serverAuth"), ldif(9))
    own.start()
    try:
        method = directory(own, authority, clock, timeout_s=1)
        assert isinstance(method.check("alice", PASSWORD), Identity)
        assert own._process
        os.kill(own._process.pid, signal.SIGSTOP)
        try:
            assert isinstance(checked(method), Unavailable)
            again = checked(method)
            assert isinstance(again, Unavailable) and "rests" in again.detail
        finally:
            os.kill(own._process.pid, signal.SIGCONT)
        clock.now += 60
        assert isinstance(checked(method), Identity)
    finally:
        own.stop()


def test_c08_the_second_server_answers_while_the_first_is_away(
    slapd: Slapd, authority: Authority, clock: TickingClock
) -> None:
    with Eavesdropper(lambda _: b"", greeting=b"") as silent:
        servers = [f"ldap://localhost:{silent.port}", f"ldap://localhost:{slapd.port}"]
        method = directory(slapd, authority, clock, servers=servers, timeout_s=1)
        assert isinstance(checked(method), Identity)
        assert isinstance(checked(method), Identity)
        assert silent.connections == 1, "one that failed rests"


def test_a_directory_that_refuses_the_service_account_is_away_and_not_a_wrong_password(
    slapd: Slapd, authority: Authority, clock: TickingClock
) -> None:
    assert isinstance(directory(slapd, authority, clock, bind_password="stale").check("alice", PASSWORD), Unavailable)
    gone = directory(slapd, authority, clock, base="ou=nowhere,dc=example,dc=com")
    assert isinstance(gone.check("alice", PASSWORD), Unavailable)


# Later on.


def test_who_left_is_out_when_the_directory_is_asked_again(
    tmp_path: Path, authority: Authority, clock: TickingClock
) -> None:
    text = ldif(9)
    own = Slapd(tmp_path / "own", authority.issue("localhost", "serverAuth"), text)
    own.start()
    try:
        method = directory(own, authority, clock, timeout_s=2)
        alice, boss = (method.check(user, PASSWORD) for user in ("alice", "boss"))
        assert isinstance(alice, Identity) and isinstance(boss, Identity)
        own.stop()
        clock.now += 601
        assert method.current(boss) == boss, "while it is away, what it said last holds"
        own.replace(text.replace(person("Alice", "alice", memberOf=f"cn=staff,{GROUPS}", mail="alice@example.org"), "")
                    .replace(person("Boss", "boss", memberOf=[f"cn=staff,{GROUPS}", f"cn=desk admins,{GROUPS}"]),
                             person("Boss", "boss", memberOf=f"cn=staff,{GROUPS}")))  # fmt: skip
        own.start()
        clock.now += 61
        assert method.current(boss) == Identity("boss", "ldap", ("staff",)), "no administrator any more"
        assert method.current(alice) is None
    finally:
        own.stop()


# C09, and the whole portal.


@pytest.fixture
def world(tmp_path: Path, slapd: Slapd, authority: Authority) -> Iterator[World]:
    world = World(tmp_path, auth=["ldap", "local"], ldap=section(slapd, authority))
    world.machine("special", users="[]\ngroups = ['staff']")
    world.host("h1")
    yield world
    world.close()


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


@pytest.mark.parametrize("name", NAMES)
def test_c09_a_name_of_any_letters_goes_the_whole_way(world: World, app: Flask, name: str) -> None:
    browser = signed_in(app, name)
    made = browser.post("/api/v1/sessions", json={"machine": "desktop"}, token=browser.csrf("/desktops"))
    assert made.status_code == 202 and made.json and made.json["user"] == name
    sid = made.json["sid"]
    world.take_up()
    for path in ("/desktops", f"/progress/{sid}", "/launch", "/launch/desktop"):
        assert browser.get(path).status_code == 200, path
    assert browser.post(f"/desktops/{sid}/stop", token=browser.csrf("/desktops")).status_code == 303
    boss = signed_in(app, "boss")
    assert boss.get("/admin/").status_code == boss.get("/admin/audit").status_code == 200
    assert browser.post("/logout", token=browser.csrf("/desktops")).status_code == 303
    assert browser.get("/desktops").status_code == 302


def test_the_directorys_groups_open_machines_and_the_admin_page(app: Flask) -> None:
    alice, fan, boss = (signed_in(app, user) for user in ("alice", "fan", "boss"))
    assert alice.get("/launch/special").status_code == 200 and fan.get("/launch/special").status_code == 404
    assert boss.get("/admin/").status_code == 200
    assert alice.get("/admin/").status_code == fan.get("/admin/").status_code == 403


def test_what_is_away_is_told_as_such_and_the_rescue_account_works_meanwhile(tmp_path: Path, slapd: Slapd,
                                                                             authority: Authority) -> None:  # fmt: skip
    away = section(slapd, authority, servers=["ldap://127.0.0.1:1"], timeout_s=1)
    world = World(tmp_path, auth=["ldap", "local"], ldap=away)
    world.portal.accounts.add("rescue", PASSWORD, admin=True)
    app = create_app(world.portal)
    answer = Browser(app).log_in("alice")
    assert answer.status_code == 503 and "can&#39;t be checked" in answer.text and PASSWORD not in answer.text
    assert signed_in(app, "rescue").get("/admin/").status_code == 200
    text = world.portal.metrics.registry
    assert text.get_sample_value("deskfleet_portal_logins_total", {"method": "ldap", "result": "unavailable"}) == 2
    assert text.get_sample_value("deskfleet_portal_logins_total", {"method": "local", "result": "right"}) == 1
    world.close()
