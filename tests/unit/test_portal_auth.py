"""The chain of methods, and local accounts: who gets in, and above all who does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.portals import PASSWORD, STRONG_HASHING, World

from deskfleet.portal import accounts
from deskfleet.portal.accounts import AccountError
from deskfleet.portal.auth import Answer, Chain, Identity, Unavailable, WrongPassword, plausible
from deskfleet.portal.scopes import Scope


class Scripted:
    """A method that gives one answer and remembers what it was asked."""

    distant = True

    def __init__(self, name: str, answer: Answer | Exception) -> None:
        self.name = name
        self.answer = answer
        self.asked: list[str] = []

    def check(self, user: str, password: str) -> Answer:
        self.asked.append(user)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def current(self, identity: Identity) -> Identity | None:
        return self.answer if isinstance(self.answer, Identity) else None


def yes(name: str) -> Scripted:
    return Scripted(name, Identity("alice", name))


def no(name: str) -> Scripted:
    return Scripted(name, WrongPassword())


def away(name: str) -> Scripted:
    return Scripted(name, Unavailable("no route"))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


@pytest.mark.parametrize(
    "password",
    ["", " ", "\t", "\u200b\u200b", "\u2060", "\ufeff", "\u00a0", "pass\0word", "pass\nword", "\ud800", "x" * 1025],
)
def test_blank_and_broken_passwords_reach_no_method(password: str) -> None:
    method = yes("local")
    assert isinstance(Chain([method], frozenset()).check("alice", password), WrongPassword)
    assert method.asked == []


@pytest.mark.parametrize("user", ["", " ", " alice", "alice ", "admin\0", "a\r\nb", "x" * 321, "\x1b[2J"])
def test_names_that_no_directory_should_see(user: str) -> None:
    assert not plausible(user, PASSWORD)


@pytest.mark.parametrize("user", ["gutiérrez", "Company\\User", "a.b@c.org", "经济", "O'Neil", "a b", "-rf", "שלום"])
def test_names_that_people_have(user: str) -> None:
    assert plausible(user, PASSWORD)


def test_the_first_yes_wins_and_nobody_after_it_is_asked() -> None:
    last = yes("third")
    found = Chain([no("first"), yes("second"), last], frozenset()).check("alice", PASSWORD)
    assert isinstance(found, Identity) and found.method == "second"
    assert last.asked == []


def test_a_method_that_is_away_is_not_a_no() -> None:
    assert isinstance(Chain([away("a"), no("b")], frozenset()).check("alice", PASSWORD), Unavailable)
    assert isinstance(Chain([no("a"), no("b")], frozenset()).check("alice", PASSWORD), WrongPassword)


def test_a_method_that_breaks_counts_as_away(caplog: pytest.LogCaptureFixture) -> None:
    broken = Scripted("broken", RuntimeError("kaput"))
    assert isinstance(Chain([broken], frozenset()).check("alice", PASSWORD), Unavailable)
    assert PASSWORD not in caplog.text


def test_without_a_method_nobody_gets_in() -> None:
    assert isinstance(Chain([], frozenset()).check("alice", PASSWORD), WrongPassword)


def test_an_administrator_is_named_exactly() -> None:
    chain = Chain([yes("local")], frozenset({"alice"}))
    found = chain.check("whoever was typed", PASSWORD)
    assert isinstance(found, Identity) and found.admin, "the method's id counts, not what was typed"
    for pattern in (".....", ".*", "ALICE", "alice ", "alice|x", "alic", "alice@elsewhere"):
        other = Chain([yes("local")], frozenset({pattern})).check("alice", PASSWORD)
        assert isinstance(other, Identity) and not other.admin


def test_a_login_of_a_method_that_was_taken_away_counts_no_more() -> None:
    assert Chain([yes("local")], frozenset()).current(Identity("alice", "ldap")) is None


def test_a_local_account(world: World) -> None:
    accounts = world.portal.accounts
    assert accounts.add("alice", PASSWORD, groups=("lab",)) == "alice"
    assert accounts.check("alice", PASSWORD) == Identity("alice", "local", ("lab",))
    for user, password in (("alice", PASSWORD + "x"), ("ALICE", PASSWORD), ("alice2", PASSWORD), (".....", PASSWORD)):
        assert accounts.check(user, password) == WrongPassword()
    assert PASSWORD not in (accounts.find("alice") or "").__repr__()


def test_accents_may_be_typed_either_way(world: World) -> None:
    world.portal.accounts.add("gutie\u0301rrez", PASSWORD)
    answer = world.portal.accounts.check("gutie\u0301rrez", PASSWORD)
    assert isinstance(answer, Identity) and answer.user == "guti\u00e9rrez"
    assert isinstance(world.portal.accounts.check("guti\u00e9rrez", PASSWORD), Identity)


def test_the_password_is_kept_as_scrypt_only(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "HASHING", STRONG_HASHING)
    world.portal.accounts.add("alice", PASSWORD)
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("portal.db*"))
    assert b"scrypt:32768:8:1$" in kept and PASSWORD.encode() not in kept


@pytest.mark.parametrize(("user", "password"), [("", PASSWORD), ("a\nb", PASSWORD), ("bob", "short"), ("bob", " " * 9)])
def test_accounts_that_are_not_made(world: World, user: str, password: str) -> None:
    with pytest.raises(AccountError):
        world.portal.accounts.add(user, password)
    assert world.portal.accounts.all() == []


def test_a_name_is_given_once(world: World) -> None:
    world.portal.accounts.add("alice", PASSWORD)
    with pytest.raises(AccountError, match="already"):
        world.portal.accounts.add("alice", "another password")


@pytest.mark.parametrize("change", ["disable", "password"])
def test_a_change_ends_logins_and_tokens_at_once(world: World, change: str) -> None:
    portal = world.portal
    portal.accounts.add("alice", PASSWORD)
    portal.accounts.add("bob", PASSWORD)
    alice = Identity("alice", "local")
    login, (token, _) = (
        portal.logins.open(alice, 3600),
        portal.logins.make_token(alice, "script", 3600, [Scope.DESKTOPS]),
    )
    others = portal.logins.open(Identity("bob", "local"), 3600)
    if change == "disable":
        portal.accounts.set_disabled("alice", True)
        assert portal.accounts.check("alice", PASSWORD) == WrongPassword()
        assert portal.chain.current(alice) is None
    else:
        portal.accounts.set_password("alice", "a new password")
        assert isinstance(portal.accounts.check("alice", "a new password"), Identity)
    assert portal.logins.find(login) is None and portal.logins.find_token(token) is None
    assert portal.logins.find(others) is not None


def test_changing_nobody_is_refused(world: World) -> None:
    with pytest.raises(AccountError, match="no account"):
        world.portal.accounts.set_disabled("ghost", True)


def test_rights_are_read_again_at_each_use(world: World) -> None:
    world.portal.accounts.add("root@example.org", PASSWORD)
    world.portal.accounts.add("boss", PASSWORD, admin=True)
    current = world.portal.chain.current
    # A row written before the right was taken away must not keep it.
    alice = current(Identity("root@example.org", "local", admin=False))
    boss = current(Identity("boss", "local"))
    assert alice and alice.admin and boss and boss.admin


def test_a_login_lasts_as_long_as_it_was_given(world: World) -> None:
    logins = world.portal.logins
    secret = logins.open(Identity("alice", "local", ("lab",)), 3600)
    assert logins.find(secret) == Identity("alice", "local", ("lab",))
    assert logins.find(secret + "x") is None and logins.find("") is None
    world.clock.now += 3601
    assert logins.find(secret) is None
    world.clock.now -= 7200
    assert logins.find(secret) is None, "a clock that was set back revives nothing"


def test_secrets_of_logins_and_tokens_are_kept_as_hashes(world: World, tmp_path: Path) -> None:
    alice = Identity("alice", "local")
    login, (token, info) = (
        world.portal.logins.open(alice, 60),
        world.portal.logins.make_token(alice, "x", 60, [Scope.DESKTOPS]),
    )
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("portal.db*"))
    assert login.encode() not in kept and token.encode() not in kept
    assert token.startswith("dft_") and len(token) > 40
    assert [t.name for t in world.portal.logins.tokens_of("alice")] == [info.name]


def test_a_token_is_removed_by_its_owner_alone(world: World) -> None:
    token, info = world.portal.logins.make_token(Identity("alice", "local"), "x", 60, [Scope.DESKTOPS])
    assert not world.portal.logins.drop_token("bob", info.name)
    assert world.portal.logins.find_token(token)
    assert world.portal.logins.drop_token("alice", info.name)
    assert world.portal.logins.find_token(token) is None


def test_pruning_takes_the_expired_only(world: World) -> None:
    logins = world.portal.logins
    logins.open(Identity("alice", "local"), 10)
    kept = logins.open(Identity("alice", "local"), 1000)
    world.clock.now += 100
    world.portal.sweep()
    assert logins.find(kept)
