"""News from the bus, health, figures and settings of a proxy."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from support.consoles import report

from deskfleet.proxy.__main__ import main
from deskfleet.proxy.refusals import Refusal, Refused
from deskfleet.proxy.routes import RouteTable
from deskfleet.proxy.service import Figures, News, health
from deskfleet.proxy.settings import ProxySchema, ProxySettings
from deskfleet.proxy.stats import Stats
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.runtime.settings import SettingsError, load
from deskfleet.schemas import topology
from deskfleet.schemas.host import HostReport, Phase, beat_of
from deskfleet.schemas.messages import (
    Console,
    ConsolesAsked,
    ConsolesListed,
    GrantRevoked,
    Message,
    SessionChanged,
    StopRequested,
)
from deskfleet.schemas.session import State
from deskfleet.schemas.wire import decode, encode

S = "a" * 32
GRANT = "share-" + "1" * 16


@pytest.fixture(autouse=True)
def _logging_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskfleet.proxy.__main__.logs.configure", lambda *_: None)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


class Cuts:
    """Stands for the server: notes what it is told to cut."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str | None]] = []

    def cut(self, sid: str, host: str | None = None) -> int:
        self.told.append((sid, host))
        return 0

    def revoke(self, grant: str) -> int:
        self.told.append((grant, None))
        return 0

    def consoles(self, sid: str) -> tuple[Console, ...]:
        return (Console("ann", GRANT, 4.5),) if sid == S else ()


class Stage:
    def __init__(self) -> None:
        self.clock, self.stats, self.server = Clock(), Stats(), Cuts()
        self.broker = MemoryBroker(random.Random(1), self.clock)
        self.broker.declare(topology.core())
        self.routes = RouteTable(600.0, 5.0)
        self.bus = self.broker.connect("proxy", lambda action: action(), topology.for_proxy("r1"))
        news = News(self.routes, self.server, self.stats, self.clock, self.bus, "r1")  # type: ignore[arg-type]
        self.bus.on_connect(news.on_connect)
        self.bus.consume(topology.proxy_queue("r1"), news.on_delivery)
        self._senders: dict[str, MemoryBus] = {}

    def send(
        self,
        login: str,
        key: str,
        message: Message | None,
        body: bytes = b"",
        kind: str = "",
        exchange: str = topology.EVENTS,
    ) -> None:
        if login not in self._senders:
            self._senders[login] = self.broker.connect(login, lambda action: action())
            self._senders[login].start()
        if message is not None:
            kind, body = encode(message)
        sent = self._senders[login].publish(Outgoing(exchange, key, kind, body, mandatory=False))
        sent.result(0)
        self.broker.run()
        assert self.broker.pending(topology.proxy_queue("r1")) == ()

    def knows(self, generation: int = 7) -> bool:
        try:
            return bool(self.routes.find(S, generation, "h1", self.clock.now))
        except Refusal:
            return False


def beat(seq: int = 1, phase: Phase = Phase.RUNNING, host: str = "h1") -> Message:
    return report(host, {S: (7, phase)}, seq)


def changed(state: State) -> SessionChanged:
    return SessionChanged(S, state, None, "h1", 7)


@pytest.fixture
def on() -> Stage:
    made = Stage()
    made.bus.start()
    return made


def test_heartbeats_make_routes_and_announcements_cut(on: Stage) -> None:
    on.send("agent-h1", "host.h1.heartbeat", beat())
    assert on.knows()
    on.send("scheduler", f"session.{S}", changed(State.STOPPING))
    assert on.server.told == [(S, None)]
    assert not on.knows()


def test_a_restarted_proxy_opens_desktops_after_one_small_heartbeat(on: Stage) -> None:
    assert not on.knows()
    told = beat(seq=40)
    assert isinstance(told, HostReport)
    on.send("agent-h1", "host.h1.heartbeat", beat_of(told))
    assert on.knows()
    on.send("agent-h1", "host.h1.heartbeat", beat(seq=39, phase=Phase.STOPPING))
    assert on.server.told == [], "an older one, which came late"
    on.send("agent-h2", "host.h1.heartbeat", beat_of(told))
    assert on.stats.dropped == {"wrong_sender": 1}


def test_a_heartbeat_cuts_on_its_own_host_only(on: Stage) -> None:
    on.send("agent-h1", "host.h1.heartbeat", beat(phase=Phase.STOPPING))
    assert on.server.told == [(S, "h1")]


@pytest.mark.parametrize("login", ["agent-h2", "portal", "proxy"])
def test_messages_of_other_senders_are_dropped_and_counted(on: Stage, login: str) -> None:
    on.send(login, "host.h1.heartbeat", beat())
    on.send(login, f"session.{S}", changed(State.ENDED))
    assert not on.knows()
    assert on.server.told == []
    assert on.stats.dropped == {"wrong_sender": 2}


def test_the_agent_may_not_announce_nor_the_scheduler_report(on: Stage) -> None:
    on.send("agent-h1", f"session.{S}", changed(State.RUNNING))
    on.send("scheduler", "host.h1.heartbeat", beat())
    assert on.stats.dropped == {"wrong_sender": 2}


def test_what_cannot_be_read_is_dropped_and_counted(on: Stage) -> None:
    for kind, body in (
        ("host.heartbeat.v1", b"{"),
        ("host.heartbeat.v1", b"{}"),
        ("host.heartbeat.v9", b"{}"),
        ("", b""),
    ):
        on.send("agent-h1", "host.h1.heartbeat", None, body, kind)
    on.send("agent-h1", "host.h1.heartbeat", StopRequested(S, "ana", False))
    assert on.stats.dropped == {"unreadable": 4, "wrong_sender": 1}
    on.send("agent-h1", "host.h1.heartbeat", beat())
    assert on.knows(), "it goes on after that"


def test_old_routes_are_forgotten(on: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskfleet.proxy.service.EXPIRE_S", 0.0)
    on.send("agent-h1", "host.h1.heartbeat", beat())
    news = News(on.routes, on.server, on.stats, on.clock, on.bus, "r1")  # type: ignore[arg-type]

    async def run() -> None:
        task = asyncio.create_task(news.expire())
        await asyncio.sleep(0.01)
        assert on.knows()
        on.clock.now = 1000.0
        while on.routes.size != (0, 0):
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_readiness_waits_for_a_whole_heartbeat_interval_from_the_connection() -> None:
    made = Stage()
    made.clock.now = 100.0
    state = health(made.bus, made.routes, made.clock)
    assert not state.ready
    assert len(state.reasons) == 2
    made.bus.start()
    assert health(made.bus, made.routes, made.clock).reasons == ("hosts have not had the time to report",)
    made.clock.now = 105.0
    assert health(made.bus, made.routes, made.clock).ready
    made.broker.crash()
    away = health(made.bus, made.routes, made.clock)
    assert away.ready, "known desktops can be opened without the broker"
    assert away.reasons == ("the broker is not connected",)


def test_a_restarted_proxy_says_later_instead_of_unknown(on: Stage) -> None:
    with pytest.raises(Refusal) as caught:
        on.routes.find(S, 7, "h1", 1.0)
    assert caught.value.reason is Refused.NOT_READY


def test_figures_are_read_on_the_loop_from_another_thread() -> None:
    stats, routes = Stats(opened=3, up=10, down=20), RouteTable(600.0, 5.0)
    stats.refused["bad_ticket"] += 2
    stats.endings["cut"] += 1

    class Tunnel:
        moved = (1, 2)

    class Server:
        tunnels = (Tunnel(), Tunnel())

    async def run() -> None:
        registry = CollectorRegistry()
        registry.register(Figures(asyncio.get_running_loop(), Server(), routes, stats, "deskfleet_proxy"))  # type: ignore[arg-type]
        thread_names: list[str] = []

        def scrape() -> str:
            thread_names.append(threading.current_thread().name)
            return generate_latest(registry).decode()

        text = await asyncio.to_thread(scrape)
        assert thread_names != [threading.current_thread().name]
        for line in (
            "deskfleet_proxy_tunnels 2.0",
            "deskfleet_proxy_opened_total 3.0",
            'deskfleet_proxy_bytes_total{direction="up"} 12.0',
            'deskfleet_proxy_bytes_total{direction="down"} 24.0',
            'deskfleet_proxy_refused_total{reason="bad_ticket"} 2.0',
            'deskfleet_proxy_ended_total{ending="cut"} 1.0',
        ):
            assert line in text.splitlines()

    asyncio.run(run())


GOOD = {
    "broker_url": '"amqp://proxy:secretword@127.0.0.1/"',
    "origins": '["https://portal.example"]',
    "ticket_keys": f'["{"k" * 32}"]',
}


def settings(path: Path, changes: Mapping[str, str]) -> ProxySettings:
    path.write_text("[proxy]\n" + "".join(f"{key} = {value}\n" for key, value in (GOOD | dict(changes)).items()))
    made: ProxySettings = load(path, {"proxy": ProxySchema()}, {})["proxy"]
    return made


def test_settings_have_working_defaults(tmp_path: Path) -> None:
    made = settings(tmp_path / "c.toml", {"originless": '["127.0.0.0/8", "::1/128"]'})
    assert made.origins == {"https://portal.example"}
    assert made.limits.tunnels == 4000
    assert made.tls is None
    assert not made.insecure_plain_hosts
    assert [str(network) for network in made.originless] == ["127.0.0.0/8", "::1/128"]
    assert "k" * 32 not in repr(made)


def test_ticket_keys_may_stand_in_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text(f"{'a' * 40}\n{'b' * 40}\n")
    text = "".join(f"{key} = {value}\n" for key, value in GOOD.items() if key != "ticket_keys")
    (tmp_path / "c.toml").write_text(f'[proxy]\n{text}ticket_keys_file = "{keys}"\n')
    made: ProxySettings = load(tmp_path / "c.toml", {"proxy": ProxySchema()}, {})["proxy"]
    assert [key.reveal() for key in made.ticket_keys] == ["a" * 40, "b" * 40]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("origins", "[]"),
        ("origins", '["*"]'),
        ("origins", '["null"]'),
        ("origins", '["https://portal.example/"]'),
        ("origins", '["https://Portal.example"]'),
        ("origins", '["https://portal.example:443"]'),
        ("origins", '["http://portal.example:80"]'),
        ("origins", '["https://portal.example:x"]'),
        ("origins", '["https://a@portal.example"]'),
        ("origins", '["portal.example"]'),
        ("origins", '["wss://portal.example"]'),
        ("ticket_keys", '["short"]'),
        ("ticket_keys", "[]"),
        ("ticket_keys", "5"),
        ("listen", '"8081"'),
        ("front_proxies", '["10.0.0.1/8"]'),
        ("originless", '["everybody"]'),
        ("max_tunnels", "0"),
        ("max_tunnels", "1.5"),
        ("dial_s", "0"),
        ("keep_s", "nan"),
        ("tls_cert", '"/x.pem"'),
        ("orgins", '["https://portal.example"]'),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(tmp_path / "c.toml", {key: value})
    assert any(line.startswith(f"proxy.{key}") or key == "tls_cert" for line in caught.value.problems)
    assert main(["--config", str(tmp_path / "c.toml")]) == 2
    assert "secretword" not in capsys.readouterr().err


def test_the_command_line_checks_settings_only(tmp_path: Path) -> None:
    settings(tmp_path / "c.toml", {})
    assert main(["--config", str(tmp_path / "c.toml"), "--check"]) == 0
    assert main(["--config", str(tmp_path / "none.toml"), "--check"]) == 2


def test_more_consoles_than_files_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(tmp_path / "c.toml", {"max_tunnels": "100000"})
    monkeypatch.setattr("deskfleet.proxy.__main__.resource.getrlimit", lambda _: (1024, 4096))
    assert main(["--config", str(tmp_path / "c.toml")]) == 2
    assert "open files" in capsys.readouterr().err


def test_c20_a_right_that_ended_is_cut_when_the_portal_says_so_and_nobody_else(on: Stage) -> None:
    for login in ("agent-h1", "proxy", "scheduler"):
        on.send(login, "", GrantRevoked(GRANT), exchange=topology.CONSOLES)
        on.send(login, "", ConsolesAsked(S, "w1"), exchange=topology.CONSOLES)
    assert on.server.told == [] and on.stats.dropped["wrong_sender"] == 6
    on.send("portal", "", GrantRevoked(GRANT), exchange=topology.CONSOLES)
    assert on.server.told == [(GRANT, None)]


def test_a_portal_that_asks_is_told_who_is_there_and_nothing_about_desktops_that_are_elsewhere(on: Stage) -> None:
    on.broker.declare(topology.for_portal("w1"))
    for sid in (S, "b" * 32):
        on.send("portal", "", ConsolesAsked(sid, "w1"), exchange=topology.CONSOLES)
    (answer,) = on.broker.pending(topology.viewers_queue("w1"))
    assert decode(answer.type, answer.body) == ConsolesListed("r1", S, (Console("ann", GRANT, 4.5),))
