"""Showing a text by the agent inside a guest: one that answers, one that is not there, and ones that mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from deskfleet.agent import guest_agent as module
from deskfleet.agent.guest_agent import GuestAgentError, guest_agent
from deskfleet.schemas.machine import Os

Answer = Callable[[dict[str, Any]], bytes]


def said(answer: Answer, work: Callable[[module.GuestAgent], Awaitable[None]], folder: Path) -> list[dict[str, Any]]:
    """Let `work` talk to a guest's agent that answers each command so; what the agent heard."""
    heard: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                heard.append(json.loads(line))
                writer.write(answer(heard[-1]))
                await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_unix_server(serve, str(folder / "qga.sock"))
        async with server, guest_agent(folder / "qga.sock") as inside:
            assert inside
            await work(inside)

    asyncio.run(run())
    return heard


def obeys(command: dict[str, Any]) -> bytes:
    if command["execute"] == "guest-sync":
        return json.dumps({"return": command["arguments"]["id"]}).encode() + b"\n"
    return b'{"return": {"pid": 4}}\n'


def test_a_text_is_an_argument_and_never_a_part_of_a_script(tmp_path: Path) -> None:
    text = "ends in 5 min; rm -rf / $(reboot)"
    heard = said(obeys, lambda inside: inside.show(text, Os.LINUX), tmp_path)
    assert [command["execute"] for command in heard] == ["guest-sync", "guest-exec"]
    line = heard[1]["arguments"]
    assert (line["path"], line["arg"][0], line["arg"][2:]) == ("/bin/sh", "-c", ["sh", text])
    assert text not in line["arg"][1]


def test_windows_is_told_by_its_own_program(tmp_path: Path) -> None:
    heard = said(obeys, lambda inside: inside.show("ends", Os.WINDOWS), tmp_path)
    assert heard[1]["arguments"] == {"path": "C:\\Windows\\System32\\msg.exe", "arg": ["*", "ends"]}


def test_late_answers_are_skipped(tmp_path: Path) -> None:
    late = b'{"return": 1}\n{"return": {"pid": 1}}\n'
    heard = said(lambda c: late * (c["execute"] == "guest-sync") + obeys(c), lambda i: i.show("x", Os.LINUX), tmp_path)
    assert len(heard) == 2


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: b"",
        lambda _: b"no json\n",
        lambda _: b"[" * 60000 + b"\n",
        lambda _: b"x" * 200_000,
        lambda _: b'{"return": 0}\n' * 60,
        lambda _: b'"text"\n' * 60,
        lambda _: b"\xff\xfe\n",
        lambda c: obeys(c) if c["execute"] == "guest-sync" else b'{"error": {"class": "CommandNotFound"}}\n',
    ],
    ids=["silent", "no json", "deep", "no end", "other numbers", "no object", "no text", "forbidden"],
)
def test_what_does_not_obey_is_an_error_and_no_hang(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT_S", 0.3)

    async def work(inside: module.GuestAgent) -> None:
        with pytest.raises(GuestAgentError):
            await inside.show("x", Os.LINUX)

    said(answer, work, tmp_path)


def test_a_guest_without_a_channel_has_no_agent(tmp_path: Path) -> None:
    async def run() -> None:
        async with guest_agent(tmp_path / "none.sock") as inside:
            assert inside is None

    asyncio.run(run())


def test_a_kind_of_guest_that_nobody_knows_is_not_asked(tmp_path: Path) -> None:
    async def work(inside: module.GuestAgent) -> None:
        with pytest.raises(GuestAgentError):
            await inside.show("x", Os.OTHER)

    assert said(obeys, work, tmp_path) == []
