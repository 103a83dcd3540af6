"""The main job on real parts, by the API: RabbitMQ, two agents, qemu guests, the proxy; and what outlives a kill -9."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar

import pytest
from demo.client import ApiError, Client
from demo.fleet import Fleet
from support.canaries import in_files, in_processes, in_text, outside, unsigned
from support.fleets import running_fleet
from support.rfb import LIMIT, Rfb, WebSocketStream
from support.screen import TINY_TEXT, identity, read_identity, region_hash
from websockets.exceptions import ConnectionClosed, InvalidStatus


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with running_fleet() as running:
        yield running


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> Client:
    return Client(fleet.url, fleet.token("demo"))


def console(fleet: Fleet, client: Client, sid: str) -> Rfb:
    return Rfb(WebSocketStream(client.console(sid), fleet.url))


def wait(condition: object, what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.1)


def test_launch_see_type_stop_and_nothing_is_left(fleet: Fleet, client: Client) -> None:
    sid = client.launch("tiny")
    session = client.until_running(sid)
    assert session["host"] in fleet.hosts
    viewer = console(fleet, client, sid)
    wait(lambda: read_identity(viewer.picture()) == identity(sid), "the picture of this very guest")
    before = region_hash(viewer.picture(), TINY_TEXT)
    viewer.type("abc")
    wait(lambda: region_hash(viewer.picture(), TINY_TEXT) != before, "the typed text")
    client.stop(sid)
    ended = client.until_ended(sid)
    assert ended["outcome"] == "stopped"
    with pytest.raises((ConnectionClosed, EOFError, OSError)):
        while True:
            viewer.picture()
    for host in fleet.hosts:
        wait(lambda host=host: not list((fleet.state / host / "run").iterdir()), "the sockets to go")
        assert not list((fleet.state / host / "disks").iterdir())


def test_c29_the_same_request_twenty_times_is_one_desktop(fleet: Fleet, client: Client) -> None:
    sid = "ab" * 16
    for _ in range(20):
        assert client.launch("tiny", sid=sid) == sid
    client.until_running(sid)
    runs = [path for host in fleet.hosts for path in (fleet.state / host / "run").glob(sid)]
    assert len(runs) == 1
    client.stop(sid)
    client.until_ended(sid)


def test_desktops_spread_over_both_hosts(fleet: Fleet, client: Client) -> None:
    sids = [client.launch("tiny", persistent=True) for _ in range(4)]
    hosts = [client.until_running(sid)["host"] for sid in sids]
    assert sorted(set(hosts)) == fleet.hosts
    for sid in sids:
        client.stop(sid)
    for sid in sids:
        client.until_ended(sid)


def test_c19_a_ticket_opens_once_and_only_from_the_portals_page(fleet: Fleet, client: Client) -> None:
    sid = client.launch("tiny", persistent=True)
    client.until_running(sid)
    address = client.console(sid)
    Rfb(WebSocketStream(address, fleet.url)).close()
    with pytest.raises((InvalidStatus, ConnectionClosed)):
        Rfb(WebSocketStream(address, fleet.url))
    with pytest.raises(InvalidStatus):
        WebSocketStream(client.console(sid), "https://portal.example.evil")
    with pytest.raises(InvalidStatus):
        WebSocketStream(address[:-3] + "AAA", fleet.url)
    client.stop(sid)
    client.until_ended(sid)
    with pytest.raises(ApiError) as refused:
        client.console(sid)
    assert refused.value.reason == "ended"


def test_refusals_have_a_reason(client: Client) -> None:
    for body, reason in (
        ({"machine": "no-such"}, "unknown_machine"),
        ({"machine": "tiny", "cpus": 99}, "bad_resources"),
        ({"machine": "tiny", "surprise": 1}, "bad_fields"),
    ):
        with pytest.raises(ApiError) as refused:
            client.call("POST", "/sessions", body)
        assert refused.value.reason == reason
    with pytest.raises(ApiError) as refused:
        client.session("0" * 32)
    assert refused.value.reason == "no_such_desktop"
    with pytest.raises(ApiError) as refused:
        client.call("GET", "/hosts")
    assert refused.value.reason == "not_allowed"


def test_what_fits_nowhere_waits_with_a_reason_for_each_host(fleet: Fleet, client: Client) -> None:
    admin = Client(fleet.url, fleet.token("admin"))
    for host in fleet.hosts:
        admin.call("POST", f"/hosts/{host}/drain")
    sid = client.launch("tiny", persistent=True)
    session = client.until(sid, "queued")
    wait(lambda: len(client.session(sid)["verdicts"]) == len(fleet.hosts), "a verdict of each host")
    session = client.session(sid)
    assert {verdict["reason"] for verdict in session["verdicts"]} == {"draining"}
    assert session["place"] == 1
    admin.call("POST", f"/hosts/{fleet.hosts[0]}/undrain")
    assert client.until_running(sid)["host"] == fleet.hosts[0]
    admin.call("POST", f"/hosts/{fleet.hosts[1]}/undrain")
    client.stop(sid)
    client.until_ended(sid)


@pytest.mark.parametrize("victim", ["agent", "scheduler", "proxy", "portal", "broker"])
def test_c37_c41_a_guest_outlives_a_kill_of_anything_beside_it(fleet: Fleet, client: Client, victim: str) -> None:
    sid = client.launch("tiny", persistent=True)
    host = client.until_running(sid)["host"]
    viewer = console(fleet, client, sid)
    wait(lambda: read_identity(viewer.picture()) == identity(sid), "the picture")
    sockets = fleet.state / host / "run" / sid / "vnc.sock"
    born = sockets.stat().st_ctime_ns
    if victim == "broker":
        assert fleet.broker
        fleet.broker.kill()
        viewer.picture()  # an open console does not notice
        fleet.broker.start()
    else:
        name = f"agent-{host}" if victim == "agent" else victim
        fleet.services[name].kill()
        if victim != "proxy":
            viewer.picture()
        fleet.services[name].start()
        fleet.wait_ready(name)
    for name in fleet.services:
        fleet.wait_ready(name)
    assert client.until_running(sid)["host"] == host
    assert sockets.stat().st_ctime_ns == born, "the guest was started anew"

    def comes_back() -> bool:
        try:
            again = console(fleet, client, sid)
        except (InvalidStatus, ConnectionClosed, OSError):
            return False
        shown = read_identity(again.picture())
        again.close()
        return shown == identity(sid)

    wait(comes_back, "the console to come back")
    fresh = client.launch("tiny", persistent=True)  # I11: new launches work, nobody restarted anything else
    client.until_running(fresh)
    for each in (sid, fresh):
        client.stop(each)
    for each in (sid, fresh):
        client.until_ended(each)


def test_c04_no_secret_stands_outside_its_home(fleet: Fleet) -> None:
    for service in fleet.services.values():  # from here on as when somebody looks for a fault
        service.stop()
        service.argv += ["--log-level", "debug"]
        service.start()
    for name in fleet.services:
        fleet.wait_ready(name)
    # Homes are prefixes of paths below the fleet's folder, by the prefix of the secrets' names.
    homes = {
        "key ": ("keys/secrets.json", "settings/", "broker/definitions.json"),
        "nonce": tuple(f"{host}/nonces/" for host in fleet.hosts),  # spent by then: empty files that make it so
    }
    secrets = {f"key {number}": value for number, value in enumerate(fleet.keys.values())}
    secrets |= {name: f"canary-{name.replace(' ', '-')}-4711" for name in ("wrong password", "passphrase", "typed")}
    secrets["token"] = fleet.token("demo")
    secrets["admin token"] = fleet.token("admin")
    client, answers = Client(fleet.url, secrets["token"]), []
    sid = client.launch("tiny", persistent=True)
    client.until_running(sid)

    def fetch(person: object, path: str, form: dict[str, str] | None = None) -> bytes:
        data = urllib.parse.urlencode(form).encode() if form else None
        try:
            with person.open(f"{fleet.url}{path}", data, timeout=LIMIT) as answer:  # type: ignore[attr-defined]
                body: bytes = str(answer.headers).encode() + answer.read()
        except urllib.error.HTTPError as error:
            body = str(error.headers).encode() + error.read()
        answers.append((path, body))
        return body

    def csrf(body: bytes) -> str:
        found = re.search(rb'name="csrf_token" value="([^"]+)"', body)
        assert found
        return found[1].decode()

    # Somebody mistypes, logs in, shares with a passphrase; a guest mistypes it, and opens the link.
    cookies, stranger = CookieJar(), urllib.request.build_opener()
    person = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(cookies))
    guest = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    for who, user in ((person, "demo"), (guest, "admin")):
        for password in (secrets["wrong password"], fleet.keys.secret(f"login-{user}")):
            form = {"csrf_token": csrf(fetch(who, "/login")), "user": user, "password": password}
            page = fetch(who, "/login", form)
        assert b"/logout" in page, "logged in"
    (cookie,) = [cookie.value for cookie in cookies if cookie.name == "deskfleet"]
    assert cookie
    login = unsigned(cookie)
    assert isinstance(login, dict)
    secrets["login"] = login["login"]
    made = client.call("POST", f"/sessions/{sid}/shares", {"passphrase": secrets["passphrase"]})
    secrets["link"] = made["link"].partition("link=")[2]
    asks = fetch(guest, f"/shared?link={secrets['link']}")
    for passphrase in (secrets["wrong password"], secrets["passphrase"]):
        fetch(guest, "/shared", {"csrf_token": csrf(asks), "link": secrets["link"], "passphrase": passphrase})
    assert b"data-ticket" in answers[-1][1] or b"noVNC" in answers[-1][1], "the guest sees the desktop's page"
    address = client.console(sid)
    secrets["ticket"] = address.partition("ticket=")[2]
    secrets["nonce"] = str(unsigned(secrets["ticket"])[-1])  # type: ignore[index]
    viewer = Rfb(WebSocketStream(address, fleet.url))
    viewer.type(secrets["typed"])
    with pytest.raises((InvalidStatus, ConnectionClosed)):
        Rfb(WebSocketStream(address, fleet.url))
    # What others see while all of it is in use.
    seen = in_processes(secrets)
    for path in (f"/progress/{sid}", f"/desktop/{sid}", f"/desktops/{sid}/share", "/desktops", "/launch", "/admin/"):
        fetch(person, path)
    headers = urllib.request.build_opener()
    headers.addheaders = [("Authorization", f"Bearer {secrets['admin token']}")]
    for path in ("/sessions", f"/sessions/{sid}", f"/sessions/{sid}/shares", "/hosts", "/queues", "/audit", "/tokens"):
        fetch(headers, f"/api/v1{path}")
    for path in ("/static/../portal.db", "/machines/", "/.git/config", "/snapshots/"):
        assert b"Not Found" in fetch(stranger, path) or b"no such page" in answers[-1][1].lower(), path
    for name, service in fleet.services.items():
        with urllib.request.urlopen(f"http://127.0.0.1:{service.ops_port}/metrics", timeout=LIMIT) as answer:
            answers.append((f"metrics of {name}", answer.read()))
    viewer.close()
    client.stop(sid)
    client.until_ended(sid)
    files = in_files(fleet.state, secrets)
    # The search sees what it should see: each key at home, and the nonce that was spent.
    assert {found.secret for found in files} == {name for name in secrets if name.startswith(("key ", "nonce"))}
    seen += outside(files, homes)
    # The page that asks a guest for the passphrase holds the link that it came by.
    seen += outside([found for path, body in answers for found in in_text(body, path, secrets)], {"link": ("/shared",)})
    assert seen == []
