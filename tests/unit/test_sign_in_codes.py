"""Logging in by a code that comes by mail, against a mail server that listens; cases C10 and C11."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import Envelope
from flask import Flask
from sqlalchemy import select
from support.portals import Browser, World
from werkzeug.test import TestResponse

from deskfleet.portal import tables
from deskfleet.portal.app import create_app

PATIENCE_S = 30
ADA, EVE = "ada@example.org", "eve@elsewhere.net"


class Sink(Controller):
    """A mail server that takes everything, or nothing."""

    def __init__(self) -> None:
        self.got: list[Envelope] = []
        self.refuses = False
        self._news = threading.Condition()
        super().__init__(self, hostname="127.0.0.1", port=0)
        self.start()

    def _trigger_server(self) -> None:
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()

    async def handle_DATA(self, _server: object, _session: object, envelope: Envelope) -> str:
        with self._news:
            if not self.refuses:
                self.got.append(envelope)
            self._news.notify_all()
        return "451 not now" if self.refuses else "250 OK"

    def mails(self, many: int) -> list[Envelope]:
        """All of them, as soon as there are so many."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.got) >= many, PATIENCE_S), f"{len(self.got)} mails"
            return list(self.got)

    def code(self, many: int = 1) -> str:
        """The code in the newest of so many mails."""
        content = self.mails(many)[many - 1].content
        assert isinstance(content, bytes)
        found = re.search(r"[0-9]{4} [0-9]{4}", content.decode())
        assert found
        return found[0]


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.stop()


def made(folder: Path, sink: Sink, **changes: Any) -> World:
    values: dict[str, Any] = {
        "auth": ["email", "local"],
        "email": {"domains": ["example.org", "lab.example.org"]},
        "mail": {"server": "127.0.0.1", "port": sink.port, "sender": "desktops@example.org", "insecure": True},
    }
    return World(folder, **values | changes)


@pytest.fixture
def world(tmp_path: Path, sink: Sink) -> Iterator[World]:
    world = made(tmp_path, sink)
    yield world
    world.close()


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


def ask(browser: Browser, address: str = ADA, client: str = "127.0.0.1", **more: str) -> TestResponse:
    return browser.post("/login/mail", {"address": address, **more}, environ_base={"REMOTE_ADDR": client})


def use(browser: Browser, code: str) -> TestResponse:
    return browser.post("/login/code", {"code": code}, token=browser.csrf("/login/code") or browser.csrf())


def test_a_code_logs_in_once_and_leads_where_the_person_wanted(app: Flask, sink: Sink, world: World) -> None:
    browser = Browser(app)
    assert "example.org, lab.example.org" in browser.get("/login").text
    answer = ask(browser, "Ada@Example.ORG", next="/desktops")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/login/code")
    code = sink.code()
    (mail,) = sink.got
    assert mail.rcpt_tos == [ADA] and b"http://127.0.0.1:8080" in (mail.content or b"")
    page = browser.get("/login/code").text
    assert ADA in page and code not in page
    answer = use(browser, f" {code} ")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/desktops")
    assert ADA in browser.get("/desktops").text
    (login,) = [line for line in world.portal.audit.newest() if line.action == "login"]
    assert (login.actor, login.detail) == (ADA, "email")


def test_the_code_is_kept_as_a_seal_only(app: Flask, sink: Sink, tmp_path: Path) -> None:
    ask(Browser(app))
    code = sink.code().replace(" ", "")
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("portal.db*"))
    assert ADA.encode() in kept and code.encode() not in kept


def test_who_logs_in_so_gets_single_shot_desktops_only(app: Flask, sink: Sink, world: World) -> None:
    browser = Browser(app)
    ask(browser)
    use(browser, sink.code())
    page = browser.get("/launch/desktop").text
    assert 'name="persistent"' not in page and "single-shot" in page
    token = browser.csrf("/desktops")
    answer = browser.post("/api/v1/sessions", json={"machine": "desktop", "persistent": True}, token=token)
    assert answer.status_code == 422 and answer.json and answer.json["reason"] == "single_shot_only"
    assert world.sent() == []
    assert browser.post("/api/v1/sessions", json={"machine": "desktop"}, token=token).status_code == 202


def test_nobody_learns_which_addresses_may_be_used(app: Flask, sink: Sink, world: World) -> None:
    pages = []
    for address in (ADA, EVE, "nobody@example.org.evil.net"):
        browser = Browser(app)
        answers = [ask(browser, address), browser.get("/login/code"), use(browser, "12345678"), ask(browser, address)]
        texts = [re.sub(r'(csrf_token" value|content)="[^"]*"', "", answer.text) for answer in answers]
        pages.append(
            [(answer.status_code, text.replace(address, "")) for answer, text in zip(answers, texts, strict=True)]
        )
    assert pages[0] == pages[1] == pages[2]
    assert [answer[0] for answer in pages[0]] == [303, 200, 401, 429]
    assert [mail.rcpt_tos for mail in sink.mails(1)] == [[ADA]]
    world.clock.now += 100
    with world.portal.store.reading() as connection:
        assert len(connection.execute(select(tables.code)).all()) == 3


def test_five_tries_and_then_the_right_one_is_too_late(app: Flask, sink: Sink) -> None:
    browser = Browser(app)
    ask(browser)
    code = sink.code()
    wrong = "0000 0000" if code != "0000 0000" else "1111 1111"
    answers = [use(browser, wrong) for _ in range(5)]
    assert all(answer.status_code == 401 and "wrong" in answer.text for answer in answers)
    answer = use(browser, code)
    assert answer.status_code == 401 and "too often" in answer.text and browser.get("/desktops").status_code == 302


@pytest.mark.parametrize("seconds", [601, -3600])
def test_a_code_is_good_for_ten_minutes(app: Flask, sink: Sink, world: World, seconds: float) -> None:
    browser = Browser(app)
    ask(browser)
    code = sink.code()
    world.clock.now += seconds
    answer = use(browser, code)
    assert answer.status_code == 401 and "not good any more" in answer.text


def test_a_code_of_another_kind_is_no_code(app: Flask, sink: Sink) -> None:
    browser = Browser(app)
    ask(browser)
    sink.mails(1)
    for code in ("", " ", "1", "١٢٣٤٥٦٧٨", "\0", "0" * 2000):
        assert use(browser, code).status_code == 401
    assert Browser(app).post("/login/code", {"code": "12345678"}).status_code == 401


# C11.


def test_c11_what_opens_mails_or_pages_logs_nobody_in_and_uses_nothing_up(app: Flask, sink: Sink) -> None:
    browser, scanner = Browser(app), Browser(app)
    ask(browser)
    code = sink.code()
    content = sink.got[0].content
    assert isinstance(content, bytes)
    links = re.findall(r"https?://[^\s]+", content.decode())
    assert links and not any(code.replace(" ", "") in link for link in links)
    for path in ("/login/code", f"/login/code?code={code}", "/login", "/"):
        for method in ("HEAD", "GET", "GET"):
            scanner.client.open(path, method=method)
            browser.client.open(path, method=method)
    assert scanner.get("/desktops").status_code == 302
    assert use(browser, code).status_code == 303


def test_c11_a_code_works_in_the_browser_that_asked_only(app: Flask, sink: Sink) -> None:
    laptop, phone = Browser(app), Browser(app)
    ask(laptop)
    code = sink.code()
    assert use(phone, code).status_code == 401
    ask(phone, EVE)
    assert use(phone, code).status_code == 401 and phone.get("/desktops").status_code == 302
    assert use(laptop, code).status_code == 303


def test_c11_used_twice_and_the_first_of_three(app: Flask, sink: Sink, world: World) -> None:
    browser = Browser(app)
    codes = []
    for n in (1, 2, 3):
        world.clock.now += 300 * (n > 1)
        assert ask(browser).status_code == 303
        codes.append(sink.code(n))
    assert use(browser, codes[0]).status_code == 401
    cookie = browser.client.get_cookie("deskfleet", domain="127.0.0.1")
    assert use(browser, codes[2]).status_code == 303
    copy = Browser(app)
    assert cookie
    copy.client.set_cookie("deskfleet", cookie.value, domain="127.0.0.1")
    answer = use(copy, codes[2])
    assert answer.status_code == 401 and "has been used" in answer.text


def test_c11_many_at_once_are_one_login(app: Flask, sink: Sink, world: World) -> None:
    codes = world.portal.codes
    assert codes
    secret = codes.ask(ADA, known=False)
    code = sink.code()
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(codes.redeem(secret, code))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([one for one in found if getattr(one, "user", "") == ADA]) == 1 and len(found) == 8


# C10.


@pytest.mark.parametrize(
    "address",
    ["", "ada", "ada@example.org\r\nBcc: x@y.org", "ada@example.org\n", "ada@example.org\r",
     "ada%0a@example.org,x@y.org",
     "ada\0@example.org", "ada@example.org\x85", "a@x.org,ada@example.org", "<a@x.org> <ada@example.org>",
     "Ada <ada@example.org>", '"a b"@example.org', "a@[127.0.0.1]", "ada@example.org@example.org", "@example.org",
     "a" * 500 + "@example.org", "a@" + "b" * 300 + ".example.org", "a d@example.org", "ada@example.org;x@y.org",
     "аdа@example.org", "ada@exаmple.org"],
)  # fmt: skip
def test_c10_what_is_not_one_address_is_refused_at_the_edge(app: Flask, sink: Sink, world: World, address: str) -> None:
    answer = ask(Browser(app), address)
    assert answer.status_code == 400 and "not a mail address" in answer.text
    with world.portal.store.reading() as connection:
        assert connection.execute(select(tables.code)).all() == []
    assert sink.got == []


def test_c10_many_requests_from_many_clients_are_one_mail(app: Flask, sink: Sink) -> None:
    answers = [ask(Browser(app), client=f"10.0.{n}.1").status_code for n in range(40)]
    assert answers.count(303) == 1 and set(answers) == {303, 429}
    assert len(sink.mails(1)) == 1


def test_c10_an_hour_has_so_many_mails_for_one_address_and_for_all(tmp_path: Path, sink: Sink) -> None:
    section = {"domains": ["example.org"], "mails_per_hour": 2, "all_mails_per_hour": 3}
    world = made(tmp_path, sink, email=section)
    app = create_app(world.portal)
    for n in range(6):
        assert ask(Browser(app), client=f"10.1.{n}.1").status_code in (303, 429)
        world.clock.now += 500
    assert len(sink.mails(2)) == 2
    for n in range(4):
        assert ask(Browser(app), f"person{n}@example.org").status_code == 303
    assert [mail.rcpt_tos for mail in sink.mails(3)[2:]] == [["person0@example.org"]]
    world.close()


def test_what_strangers_used_up_leaves_the_owners_browser_its_own(app: Flask, sink: Sink, world: World) -> None:
    mine = Browser(app)
    ask(mine)
    use(mine, sink.code())
    mine.post("/logout", token=mine.csrf("/desktops"))
    for n in range(12):
        ask(Browser(app), client=f"10.2.{n}.1")
        world.clock.now += 250
    before = len(sink.got)
    assert ask(mine).status_code == 303
    assert use(mine, sink.code(before + 1)).status_code == 303


def test_a_client_asks_for_so_many_only(app: Flask) -> None:
    answers = [ask(Browser(app), f"person{n}@elsewhere.net", "10.3.0.1") for n in range(12)]
    assert [answer.status_code for answer in answers] == [303] * 10 + [429] * 2
    assert int(answers[-1].headers["Retry-After"]) > 0


def test_a_mail_server_that_takes_nothing_is_told_to_everybody(app: Flask, sink: Sink, world: World) -> None:
    sink.refuses = True
    ask(Browser(app))
    for _ in range(PATIENCE_S * 10):
        if world.portal.codes and world.portal.codes.in_trouble:
            break
        threading.Event().wait(0.1)
    answers = [ask(Browser(app), address) for address in ("bob@example.org", EVE)]
    assert [answer.status_code for answer in answers] == [503, 503]
    sink.refuses = False
    world.clock.now += 61
    browser = Browser(app)
    ask(browser, "carl@example.org")
    assert use(browser, sink.code()).status_code == 303


def test_who_logged_in_by_a_domain_that_was_taken_away_is_out(app: Flask, sink: Sink, world: World) -> None:
    browser = Browser(app)
    ask(browser)
    use(browser, sink.code())
    cookie = browser.client.get_cookie("deskfleet", domain="127.0.0.1")
    mail = {"server": "127.0.0.1", "port": sink.port, "sender": "desktops@example.org", "insecure": True}
    later = create_app(world.build(auth=["email"], email={"domains": ["other.org"]}, mail=mail))
    again = Browser(later)
    assert cookie
    again.client.set_cookie("deskfleet", cookie.value, domain="127.0.0.1")
    assert again.get("/desktops").status_code == 302


def test_old_codes_are_forgotten(app: Flask, sink: Sink, world: World) -> None:
    ask(Browser(app))
    sink.mails(1)
    world.clock.now += 3700
    world.portal.prune()
    with world.portal.store.reading() as connection:
        assert connection.execute(select(tables.code)).all() == []
