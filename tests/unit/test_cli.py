"""The command line: on this machine with a settings file, and against the HTTP API on a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner, Result
from flask import Flask, jsonify
from support.bus_harness import MemoryHarness
from support.portals import report
from werkzeug.serving import make_server

from deskfleet.ledger.engine import check_revision, open_engine
from deskfleet.ledger.reader import Wait
from deskfleet.ledger.writer import Writer
from deskfleet.portal import api, api_admin, languages
from deskfleet.portal.auth import Identity
from deskfleet.portal.cli import main
from deskfleet.portal.errors import Problem
from deskfleet.portal.scopes import Scope
from deskfleet.portal.services import EXTENSION, Services, build
from deskfleet.portal.settings import PortalSchema
from deskfleet.portal.sharing import sharing
from deskfleet.portal.web import check_access
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.service import SystemClock
from deskfleet.runtime.settings import load
from deskfleet.schemas.config import SECTIONS
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Fetch, FetchState
from deskfleet.schemas.messages import (
    DrainRequested,
    HostDeclaredDead,
    LaunchRequested,
    StopRequested,
)
from deskfleet.schemas.session import Event, Outcome, Resources, Session, advance
from deskfleet.schemas.topology import COMMANDS, SCHEDULER_COMMANDS, core
from deskfleet.schemas.verdict import Forecast, Outlook, Verdict
from deskfleet.schemas.wire import decode, encode

TINY = """
title = "Tiny"
text = "For tests."
os = "linux"
[image]
file = "tiny.qcow2"
format = "qcow2"
sha256 = "{digest}"
[cpus]
min = 1
default = 1
max = 2
[memory_mib]
min = 128
default = 128
max = 256
[disk_gib]
min = 1
default = 1
max = 2
[access]
users = ["*"]
""".format(digest="0" * 64)
KEY = "a-secret-key-of-at-least-32-characters"
OTHER_KEY = "another-secret-key-of-32-characters-too"

Run = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "catalogue").mkdir()
    (tmp_path / "catalogue" / "tiny.toml").write_text(TINY)
    path = tmp_path / "deskfleet.toml"
    path.write_text(
        f"""
[portal]
public_url = "http://localhost:8080"
console_url = "ws://localhost:6080/console"
broker_url = "amqp://portal:broker-password@localhost/"
database = "sqlite:///{tmp_path}/portal.db"
secret_key = "{KEY}"
ticket_keys = ["{OTHER_KEY}"]
admins = ["root"]
auth = ["local"]
[ledger]
url = "sqlite:///{tmp_path}/ledger.db"
[machines]
catalogue = "{tmp_path}/catalogue"
"""
    )
    return path


@pytest.fixture
def run(config: Path) -> Run:
    def call(*arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(main, [*arguments, "--config", str(config)], input=stdin)

    return call


@pytest.fixture
def harness() -> Iterator[MemoryHarness]:
    harness = MemoryHarness()
    yield harness
    harness.close()


@pytest.fixture
def parts(config: Path, run: Run, harness: MemoryHarness) -> Iterator[Services]:
    assert run("migrate").exit_code == 0
    for name, rights in (("ann", []), ("bob", []), ("root", ["--admin"])):
        assert run("user", "add", name, *rights, stdin="long enough\n").exit_code == 0
    settings = load(config, {"portal": PortalSchema()}, {}, SECTIONS)["portal"]
    ledger = open_engine(f"sqlite:///{config.parent}/ledger.db", read_only=True)
    made = build(settings, ledger, config.parent / "catalogue", harness.bus(), SystemClock(), lambda _: None, "p1")
    yield made
    made.store.close()
    ledger.dispose()


@pytest.fixture
def portal(parts: Services) -> Iterator[str]:
    """The address of a server with the API, guarded and refusing as the portal does."""
    app = Flask("portal")
    app.config["SECRET_KEY"] = KEY
    app.extensions[EXTENSION] = parts
    app.before_request(check_access)
    languages.install(app, [languages.ENGLISH], languages.ENGLISH, "/api/")
    api.register(app, api_admin.blueprint)
    app.register_blueprint(sharing)

    @app.errorhandler(Problem)
    def refuse(problem: Problem) -> object:
        body = jsonify(reason=problem.reason, message=problem.message, details=problem.details, reference="")
        return body, problem.status

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def token(parts: Services, user: str) -> str:
    return parts.logins.make_token(Identity(user, "local"), "test", 3600, [Scope.FLEET])[0]


def remote(url: str, secret: str, *arguments: str, stdin: str = "") -> Result:
    environ = {"DESKFLEET_URL": url, "DESKFLEET_TOKEN": secret}
    return CliRunner().invoke(main, list(arguments), env=environ, input=stdin)


# --- on this machine ----------------------------------------------------------------------------------------


def test_migrate_makes_both_databases_and_may_be_repeated(run: Run, config: Path) -> None:
    for _ in range(2):
        done = run("migrate")
        assert (done.exit_code, done.stderr) == (0, "")
    engine = open_engine(f"sqlite:///{config.parent}/ledger.db")
    check_revision(engine)
    engine.dispose()


def test_without_migration_the_command_that_mends_it_is_named(run: Run) -> None:
    done = run("user", "list")
    assert done.exit_code == 1
    assert "deskfleet migrate" in done.stderr


def test_accounts_are_made_listed_and_shut(run: Run) -> None:
    run("migrate")
    assert run("user", "add", "ann", stdin="long enough\n").exit_code == 0
    assert run("user", "add", "eve", "--admin", "--group", "staff", stdin="long enough\n").exit_code == 0
    assert run("user", "disable", "ann").exit_code == 0
    lines = [line.split() for line in run("user", "list").stdout.splitlines()]
    assert lines == [
        ["NAME", "RIGHTS", "STATE", "GROUPS"],
        ["ann", "person", "disabled", "-"],
        ["eve", "administrator", "enabled", "staff"],
    ]
    assert run("user", "enable", "ann").exit_code == 0
    assert "ann   person         enabled" in run("user", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (("user", "add", "ann"), "long enough\n", "already"),
        (("user", "add", "new"), "short\n", "at least 8"),
        (("user", "add", "new"), "", "at least 8"),
        (("user", "passwd", "nobody"), "long enough\n", "no account 'nobody'"),
        (("user", "disable", "nobody"), "", "no account 'nobody'"),
        (("token", "create", "nobody"), "", "no account 'nobody'"),
    ],
)
def test_refusals_say_why(run: Run, arguments: tuple[str, ...], stdin: str, words: str) -> None:
    run("migrate")
    run("user", "add", "ann", stdin="long enough\n")
    done = run(*arguments, stdin=stdin)
    assert (done.exit_code, done.stdout) == (1, "")
    assert words in done.stderr


def test_a_token_may_do_what_was_said_and_nothing_else(run: Run, parts: Services) -> None:
    secret = run("token", "create", "ann", "--scope", "desktops:read", "--scope", "fleet:read").stdout.strip()
    found = parts.logins.find_token(secret)
    assert found and found[1] == (Scope.DESKTOPS_READ, Scope.FLEET_READ)
    assert run("token", "create", "ann", "--scope", "everything").exit_code == 2


def test_a_token_is_printed_alone_and_ends_with_the_password(run: Run, parts: Services) -> None:
    done = run("token", "create", "ann", "--days", "2")
    secret = done.stdout.strip()
    assert (done.exit_code, done.stdout) == (0, f"{secret}\n")
    found = parts.logins.find_token(secret)
    assert found is not None
    assert (found[0].user, found[1]) == ("ann", (Scope.DESKTOPS,))
    assert run("user", "passwd", "ann", stdin="another one\n").exit_code == 0
    assert parts.logins.find_token(secret) is None


def test_a_disabled_account_gets_no_token(run: Run, parts: Services) -> None:
    run("user", "disable", "ann")
    done = run("token", "create", "ann")
    assert (done.exit_code, done.stdout) == (1, "")
    assert parts.logins.tokens_of("ann") == []


def test_changes_are_audited(run: Run, parts: Services) -> None:
    run("user", "disable", "ann")
    newest = parts.audit.newest(1)[0]
    assert (newest.action, newest.target, newest.address) == ("account disabled", "ann", "command line")


def test_config_check_names_every_fault(run: Run, config: Path) -> None:
    assert run("config", "check").exit_code == 0
    (config.parent / "catalogue" / "broken.toml").write_text("title = ")
    done = run("config", "check")
    assert done.exit_code == 1
    assert "broken" in done.stderr
    text = config.read_text().replace('auth = ["local"]', 'auth = ["magic"]').replace("[machines]", "[machines]\nx = 1")
    config.write_text(text)
    done = run("config", "check")
    assert done.exit_code == 1
    assert "portal.auth" in done.stderr
    assert "machines.x" in done.stderr


def test_config_show_hides_secrets(run: Run, config: Path) -> None:
    config.write_text(config.read_text().replace("sqlite:///", "postgresql+psycopg://someone:database-password@db/"))
    shown = run("config", "show").stdout
    assert 'secret_key = "***"' in shown
    assert 'ticket_keys = ["***"]' in shown
    for secret in (KEY, OTHER_KEY, "broker-password", "database-password"):
        assert secret not in shown


def test_config_show_tells_of_mail_without_its_password(run: Run, config: Path) -> None:
    assert "[portal.mail]" not in run("config", "show").stdout
    secret = config.parent / "mail.secret"
    secret.write_text("mail-password\n")
    secret.chmod(0o600)
    mail = f"""
[portal.mail]
server = "mail.example.org"
sender = "a@example.org"
user = "portal"
password_file = "{secret}"
[ledger]
"""
    config.write_text(config.read_text().replace("[ledger]", mail))
    assert run("config", "check").exit_code == 0, run("config", "check").stderr
    shown = run("config", "show").stdout
    assert '[portal.mail]\nserver = "mail.example.org"\nport = 587' in shown and 'password = "***"' in shown
    assert "mail-password" not in shown and "mail = " not in shown
    config.write_text(config.read_text().replace('sender = "a@example.org"', 'sender = "nobody"'))
    assert "portal.mail.sender: is not a mail address" in run("config", "check").stderr


# --- against a portal ---------------------------------------------------------------------------------------


def test_a_desktop_is_launched_shown_listed_and_stopped(portal: str, parts: Services) -> None:
    ann = token(parts, "ann")
    done = remote(portal, ann, "launch", "tiny", "--cpus", "2", "--lifetime", "2h", "--persistent", "--json")
    assert done.exit_code == 0, done.stderr
    session = json.loads(done.stdout)
    assert session["resources"]["cpus"] == 2
    assert (session["lifetime_s"], session["persistent"], session["user"]) == (7200, True, "ann")
    sid = session["sid"]
    assert sid in remote(portal, ann, "list").stdout
    assert "saved" in remote(portal, ann, "show", sid).stdout
    assert remote(portal, ann, "open", sid).stdout == f"{portal}/desktop/{sid}\n"
    assert remote(portal, ann, "stop", sid).exit_code == 0
    shown = json.loads(remote(portal, ann, "show", sid, "--json").stdout)
    assert (shown["state"], shown["outcome"], shown["reason"]) == ("ended", "cancelled", "stopped_by_user")


def test_another_persons_desktop_is_as_unknown_as_none(portal: str, parts: Services) -> None:
    session = json.loads(remote(portal, token(parts, "ann"), "launch", "tiny", "--json").stdout)
    bob = token(parts, "bob")
    for sid in (session["sid"], "f" * 32, "no-sid"):
        for command in ("show", "open", "stop"):
            done = remote(portal, bob, command, sid)
            assert (done.exit_code, done.stdout) == (1, "")
            assert "no_such_desktop" in done.stderr


def test_the_same_request_is_the_same_desktop(portal: str, parts: Services) -> None:
    headers = {"Authorization": f"Bearer {token(parts, 'ann')}"}
    body = {"machine": "tiny", "sid": "a" * 32}
    answers = [requests.post(f"{portal}/api/v1/sessions", json=body, headers=headers, timeout=60) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 200]
    assert len(remote(portal, token(parts, "ann"), "list").stdout.splitlines()) == 2


def test_bad_requests_are_refused_with_every_fault(portal: str, parts: Services) -> None:
    headers = {"Authorization": f"Bearer {token(parts, 'ann')}"}
    body = {"machine": "tiny", "cpus": "two", "sid": "XYZ", "colour": "red"}
    answer = requests.post(f"{portal}/api/v1/sessions", json=body, headers=headers, timeout=60)
    content = answer.json()
    assert (answer.status_code, content["reason"]) == (422, "bad_fields")
    assert {line.split(":")[0] for line in content["details"]} == {"cpus", "sid", "colour"}
    answer = requests.post(
        f"{portal}/api/v1/sessions", data="{", headers={**headers, "Content-Type": "application/json"}, timeout=60
    )
    assert (answer.status_code, answer.json()["reason"]) == (400, "bad_request")


def test_a_size_outside_the_range_is_refused_in_words(portal: str, parts: Services) -> None:
    done = remote(portal, token(parts, "ann"), "launch", "tiny", "--cpus", "9", "--memory", "1")
    assert done.exit_code == 1
    for words in ("bad_resources", "CPUs: 9 is not between 1 and 2", "memory (MiB): 1"):
        assert words in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["hosts"],
        ["queues"],
        ["host", "show", "h1"],
        ["host", "drain", "h1"],
        ["host", "undrain", "h1"],
        ["host", "declare-dead", "h1", "--yes"],
    ],
)
def test_the_fleet_is_for_administrators(portal: str, parts: Services, command: list[str]) -> None:
    done = remote(portal, token(parts, "ann"), *command)
    assert done.exit_code == 1
    assert "not_allowed" in done.stderr


def test_an_administrator_sees_the_fleet(portal: str, parts: Services) -> None:
    root = token(parts, "root")
    assert remote(portal, root, "hosts").stdout.startswith("HOST")
    assert "scheduler.commands" in remote(portal, root, "queues").stdout
    done = remote(portal, root, "host", "drain", "h1")
    assert done.exit_code == 1
    assert "no_such_host" in done.stderr


def ledger(config: Path) -> Writer:
    return Writer(open_engine(f"sqlite:///{config.parent}/ledger.db"))


def test_a_host_is_drained_and_declared_dead(
    portal: str, parts: Services, config: Path, harness: MemoryHarness
) -> None:
    harness.broker.declare(core())
    with ledger(config).begin() as tx:
        tx.add_host("h1")
    root = token(parts, "root")
    done = remote(portal, root, "host", "drain", "h1", "--message", "New disks on Friday")
    assert done.exit_code == 0, done.stderr
    assert remote(portal, root, "host", "undrain", "h1").exit_code == 0
    for typed in ("", "h2\n", "yes\n"):
        done = remote(portal, root, "host", "declare-dead", "h1", stdin=typed)
        assert done.exit_code == 1 and done.stdout == ""
    assert remote(portal, root, "host", "declare-dead", "h1", stdin="h1\n").exit_code == 0
    assert remote(portal, root, "host", "declare-dead", "h1", "--yes").exit_code == 0
    assert [decode(message.type, message.body) for message in harness.broker.pending(SCHEDULER_COMMANDS)] == [
        DrainRequested("h1", True, "root", "New disks on Friday"),
        DrainRequested("h1", False, "root"),
        HostDeclaredDead("h1", "root"),
        HostDeclaredDead("h1", "root"),
    ]
    with ledger(config).begin() as tx:
        tx.set_dead("h1", True)
    assert remote(portal, root, "hosts").stdout.splitlines()[1].split()[:2] == ["h1", "dead"]


def test_a_host_is_shown_with_its_images(portal: str, parts: Services, config: Path) -> None:
    fetch = Fetch("2" * 64, FetchState.FETCHING, 40, 20_000)
    with ledger(config).begin() as tx:
        tx.add_host("h1")
        tx.save_reports([(report("h1", images=("1" * 64,), fetches=(fetch,)), SystemClock().wall())])
    root = token(parts, "root")
    lines = remote(portal, root, "host", "show", "h1").stdout.splitlines()
    assert lines[1].split()[:2] == ["h1", "ready"]
    assert [line.split() for line in lines[3:]] == [
        ["IMAGE", "MACHINES", "STATE"],
        ["2" * 12, "-", "fetching,", "40", "%", "of", "19.5", "GiB"],
        ["1" * 12, "-", "held"],
    ]
    shown = json.loads(remote(portal, root, "host", "show", "h1", "--json").stdout)
    assert [image["state"] for image in shown["images"]] == ["fetching", "held"]


def test_the_help_says_when_to_declare_a_host_dead() -> None:
    said = " ".join(CliRunner().invoke(main, ["host", "declare-dead", "--help"]).stdout.split())
    assert "Only when you are sure that the machine is off, or cut" in said and "its sessions are given up" in said


def test_why_tells_place_estimate_and_the_reason_of_each_host(portal: str, parts: Services, config: Path) -> None:
    ann = token(parts, "ann")
    session = Session("a" * 32, "ann", "tiny", Resources(1, 128, 1), False, 3600)
    verdicts = (
        Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free"),
        Verdict("", Reason.USER_CAP, "2 of 2 desktops in use"),
    )
    with ledger(config).begin() as tx:
        tx.add(session)
        tx.explain([(session.sid, Wait(3, 700.0, verdicts), 5.0)])
    lines = remote(portal, ann, "why", session.sid).stdout.splitlines()
    assert lines[:3] == [
        "It waits for a place on a host.",
        "place in the queue: 3",
        "estimate: starts at the latest in about 12 min",
    ]
    rows = [line.split(None, 2) for line in lines[5:]]
    assert rows == [["h1", "memory_short", "h1: 2.1 of 4 GiB free"], ["-", "user_cap", "2 of 2 desktops in use"]]
    with ledger(config).begin() as tx:
        tx.explain([(session.sid, Wait(1, None, ()), 5.0)])
    assert "estimate: unknown" in remote(portal, ann, "why", session.sid).stdout
    ended = advance(session, Event.GIVE_UP, outcome=Outcome.NO_CAPACITY, reason=Reason.WAITED_TOO_LONG)
    with ledger(config).begin() as tx:
        tx.save(session, ended, Event.GIVE_UP)
    said = remote(portal, ann, "why", session.sid).stdout
    assert "Found no room." in said and "reason: waited_too_long" in said and "place" not in said.splitlines()[-1]
    assert json.loads(remote(portal, ann, "why", session.sid, "--json").stdout)["state"] == "ended"
    assert "no_such_desktop" in remote(portal, token(parts, "bob"), "why", session.sid).stderr


@pytest.mark.parametrize(
    ("forecast", "status", "says"),
    [
        (Forecast(Outlook.NOW, "h1", why="most room"), 0, "Starts now on h1"),
        (Forecast(Outlook.WAITS, place=2, verdicts=(Verdict("h1", Reason.CPUS_SHORT),)), 0, "h1    cpus_short"),
        (Forecast(Outlook.NEVER, largest=Resources(8, 16384, 9)), 1, "the largest is 8 CPUs, 16 GiB"),
        (None, 1, "can't be told right now"),
    ],
)
def test_a_dry_run_starts_nothing(
    portal: str, parts: Services, monkeypatch: pytest.MonkeyPatch, forecast: Forecast | None, status: int, says: str
) -> None:
    asked: list[LaunchRequested] = []
    monkeypatch.setattr(parts.forecasts, "ask", lambda request: (asked.append(request), forecast)[1])
    ann = token(parts, "ann")
    done = remote(portal, ann, "place", "--dry-run", "tiny", "--cpus", "2", "--lifetime", "1h")
    assert (done.exit_code, says in done.stdout) == (status, True), done.output
    assert (asked[0].resources.cpus, asked[0].lifetime_s, asked[0].user) == (2, 3600, "ann")
    assert len(remote(portal, ann, "list").stdout.splitlines()) == 1


def test_place_without_dry_run_points_to_launch(portal: str, parts: Services) -> None:
    done = remote(portal, token(parts, "ann"), "place", "tiny")
    assert done.exit_code == 2 and "deskfleet launch" in done.stderr


def test_a_token_makes_no_tokens(portal: str, parts: Services) -> None:
    headers = {"Authorization": f"Bearer {token(parts, 'ann')}"}
    answer = requests.post(f"{portal}/api/v1/tokens", json={"label": "more"}, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["reason"]) == (403, "cookie_needed")
    assert len(parts.logins.tokens_of("ann")) == 1


def test_the_description_is_public_and_complete(portal: str) -> None:
    spec = requests.get(f"{portal}/api/v1/openapi.json", timeout=60).json()
    assert spec["openapi"].startswith("3.")
    assert set(spec["paths"]["/api/v1/sessions"]) >= {"get", "post"}


def test_a_wrong_token_is_refused(portal: str) -> None:
    done = remote(portal, "dft_wrong", "list")
    assert done.exit_code == 1
    assert "not_logged_in" in done.stderr


def test_no_portal_is_another_exit_status(tmp_path: Path) -> None:
    done = remote("http://127.0.0.1:1", "dft_x", "list")
    assert (done.exit_code, done.stdout) == (3, "")


@pytest.mark.parametrize(
    ("url", "secret"), [("http://portal.example", "dft_x"), ("ftp://localhost", "dft_x"), ("http://localhost", "")]
)
def test_a_token_is_never_sent_in_the_clear_or_to_nowhere(url: str, secret: str) -> None:
    assert remote(url, secret, "list").exit_code == 2


def test_a_desktop_is_shared_shown_and_taken_back(portal: str, parts: Services) -> None:
    ann = token(parts, "ann")
    sid = json.loads(remote(portal, ann, "launch", "tiny", "--json").output)["sid"]
    link = remote(portal, ann, "share", sid, "--for", "30m", "--passphrase", "open sesame").output.strip()
    assert link.startswith("http://localhost:8080/shared?link=")
    (made,) = parts.shares.of(sid)
    assert made.locked and 1700 < made.expires_at - made.created_at <= 1800
    listed = remote(portal, ann, "shares", sid)
    assert made.name in listed.output and "signed in" in listed.output and "Nobody has it open" in listed.output
    assert remote(portal, token(parts, "bob"), "unshare", sid, made.name).exit_code == 1
    assert remote(portal, ann, "unshare", sid, made.name).exit_code == 0
    assert parts.shares.of(sid) == []
    for options, reason in ((("--watch",), "watch_only"), (("--anybody",), "sharing_off")):
        refused = remote(portal, ann, "share", sid, *options)
        assert refused.exit_code == 1 and reason in refused.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_learns_to_complete_commands(shell: str) -> None:
    found = CliRunner().invoke(main, ["completion", shell])
    assert found.exit_code == 0 and "_DESKFLEET_COMPLETE" in found.output


# --- for administrators ---------------------------------------------------------------------------------------


def bury(harness: MemoryHarness, sid: str) -> None:
    """A launch of the portal's own login that the scheduler refuses."""
    bus, reader = harness.bus("portal"), harness.bus("scheduler", core())
    reader.consume(SCHEDULER_COMMANDS, lambda delivery: delivery.reject())
    launch = LaunchRequested(sid, "ann", (), "tiny", Resources(1, 128, 1), True, 3600, 600)
    bus.publish(Outgoing(COMMANDS, "scheduler", *encode(launch))).result(0)
    harness.settle()
    reader.stop()


def test_dead_letters_are_listed_shown_sent_again_and_discarded(
    portal: str, parts: Services, harness: MemoryHarness
) -> None:
    root = token(parts, "root")
    for digit in "abc":
        bury(harness, digit * 32)
    lines = remote(portal, root, "queue", "dead").stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["c" * 32, "b" * 32, "a" * 32]
    newest = lines[1].split()[0]
    shown = remote(portal, root, "queue", "dead", newest).stdout
    assert '"machine": "tiny"' in shown and shown.splitlines()[-1] != ""
    for arguments in (("queue", "discard"), ("queue", "discard", newest, "--all")):
        assert remote(portal, root, *arguments).exit_code == 2
    assert remote(portal, root, "queue", "discard", newest, stdin="nope\n").exit_code == 1
    assert remote(portal, root, "queue", "discard", newest, stdin=f"{newest[:4]}\n").exit_code == 0
    assert remote(portal, root, "queue", "discard", "--all", stdin="3\n").exit_code == 1
    assert parts.letters.count() == 2
    assert remote(portal, root, "queue", "discard", "--all", stdin="2\n").exit_code == 0
    assert parts.letters.count() == 0
    assert "There is none" in remote(portal, root, "queue", "discard", "--all").stdout
    assert remote(portal, root, "queue", "replay", newest).exit_code == 1
    assert "scheduler.commands" in remote(portal, root, "queue", "list").stdout
    ann = token(parts, "ann")
    for arguments in (("queue", "dead"), ("session", "list"), ("audit", "export"), ("health",)):
        refused = remote(portal, ann, *arguments)
        assert refused.exit_code == 1 and "not_allowed" in refused.stderr


def test_a_dead_letter_is_sent_again(portal: str, parts: Services, harness: MemoryHarness) -> None:
    bury(harness, "a" * 32)
    (letter,) = parts.letters.newest()
    done = remote(portal, token(parts, "root"), "queue", "replay", letter.name)
    assert done.exit_code == 0, done.stderr
    (again,) = harness.broker.pending(SCHEDULER_COMMANDS)
    assert (again.type, again.body) == (letter.type, letter.body)


def test_everybodys_desktops_are_listed_and_stopped_by_their_number(
    portal: str, parts: Services, harness: MemoryHarness, config: Path
) -> None:
    harness.broker.declare(core())
    with ledger(config).begin() as tx:
        for digit, user in (("a", "ann"), ("b", "bob"), ("c", "ann")):
            tx.add(
                Session(
                    sid=digit * 32,
                    user=user,
                    machine="tiny",
                    resources=Resources(1, 128, 1),
                    persistent=False,
                    lifetime_s=3600,
                    wait_s=600,
                    created_at=1.0,
                    changed_at=1.0,
                )
            )
    root = token(parts, "root")
    lines = remote(portal, root, "session", "list", "--user", "ann").stdout.splitlines()
    assert [line.split()[0][0] for line in lines[1:]] == ["a", "c"]
    assert remote(portal, root, "session", "stop-all", "--user", "ann", stdin="3\n").exit_code == 1
    assert remote(portal, root, "session", "stop-all", "--user", "ann", "--count", "3").exit_code == 1
    assert remote(portal, root, "session", "stop-all", "--user", "eve").exit_code == 1
    assert harness.broker.pending(SCHEDULER_COMMANDS) == ()
    assert remote(portal, root, "session", "stop-all", "--user", "ann", stdin="2\n").exit_code == 0
    stopped = [decode(message.type, message.body) for message in harness.broker.pending(SCHEDULER_COMMANDS)]
    assert [stop.sid[0] for stop in stopped if isinstance(stop, StopRequested)] == ["a", "c"]


def test_the_audit_is_exported_whole(portal: str, parts: Services) -> None:
    for number in range(1005):
        parts.audit.note("=ann", "10.0.0.1", "launch", f"{number}", "tiny")
    parts.audit.note("bob", "10.0.0.1", "stop", "x")
    root = token(parts, "root")
    lines = remote(portal, root, "audit", "export", "--action", "launch").stdout.splitlines()
    assert lines[0].startswith("at,actor,") and len(lines) == 1006 and ",'=ann," in lines[1]
    objects = remote(portal, root, "audit", "export", "--format", "jsonl", "--actor", "bob").stdout.splitlines()
    assert [json.loads(line)["action"] for line in objects] == ["stop"]
    assert remote(portal, root, "audit", "export", "--since", "yesterday").exit_code == 1


def test_health_tells_what_is_broken_and_ends_so(portal: str, parts: Services, harness: MemoryHarness) -> None:
    root = token(parts, "root")
    done = remote(portal, root, "health")
    assert done.exit_code == 1 and "scheduler" in done.stdout and "bad" in done.stdout
