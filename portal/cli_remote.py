"""The commands about desktops, over a portal's HTTP API."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import click

from deskfleet.portal import words
from deskfleet.portal.cli_common import Duration, Refusal, Unreachable, printable, table
from deskfleet.portal.cli_portal import Portal, part, remote, show

_PAUSE_S = 1.0


def _state(session: dict[str, Any]) -> str:
    return "unknown" if session["host_silent"] else str(session["state"])


def _line(session: dict[str, Any]) -> str:
    return printable(f"{session['sid']}  {_state(session)}  {session['sentence']}")


def _sized(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which desktop is meant."""
    for option in (
        click.option("--lifetime", "lifetime_s", type=Duration(), help="End it after this time: 90m, 8h, 2d."),
        click.option("--persistent", is_flag=True, help="Keep it when the last viewer leaves."),
        click.option("--gpu-model", help="With a GPU of this model."),
        click.option("--gpu", is_flag=True, help="With a GPU."),
        click.option("--disk", "disk_gib", type=int, help="Disk in GiB."),
        click.option("--memory", "memory_mib", type=int, help="Memory in MiB."),
        click.option("--cpus", type=int, help="Virtual CPUs."),
        click.argument("machine"),
    ):
        command = option(command)
    return command


def _wish(gpu: bool, gpu_model: str | None, **sizes: Any) -> dict[str, Any]:
    body = {name: value for name, value in sizes.items() if value is not None}
    return body | ({"gpus": 1, "gpu_model": gpu_model or ""} if gpu or gpu_model else {})


@click.command()
@_sized
@click.option("--wait", is_flag=True, help="Wait until it runs.")
@remote
def launch(portal: Portal, as_json: bool, wait: bool, **wish: Any) -> None:
    """Start a desktop."""
    sid = secrets.token_hex(16)
    try:
        session = portal.call("POST", "/sessions", {"sid": sid, **_wish(**wish)})
    except Unreachable as error:
        raise Unreachable(f"{error.message}\nThe request may have arrived: see 'deskfleet show {sid}'.") from None
    said = ""
    while wait and session["state"] not in ("running", "ended"):
        if session["sentence"] != said:
            said = session["sentence"]
            click.echo(printable(said), err=True)
        time.sleep(_PAUSE_S)
        session = portal.call("GET", f"/sessions/{sid}")
    show(as_json, session, lambda: _line(session))
    if wait and session["state"] == "ended":
        raise Refusal(printable(f"{session['sentence']} ({session['reason'] or session['outcome']})"))


@click.command()
@_sized
@click.option("--dry-run", is_flag=True, help="Only say what would become of it.")
@remote
def place(portal: Portal, as_json: bool, dry_run: bool, **wish: Any) -> None:
    """What would become of a launch, if it were asked for now.

    Nothing is started and no place is kept. The exit status is 1 when it can never fit, or when nobody can tell.
    """
    if not dry_run:
        raise click.UsageError("place only answers questions: give --dry-run, or start it with 'deskfleet launch'")
    answer = portal.call("POST", "/placements", _wish(**wish))
    show(as_json, answer, lambda: _forecast(answer))
    if answer["outlook"] in ("never", "unknown"):
        click.get_current_context().exit(1)


def _forecast(answer: dict[str, Any]) -> str:
    where = f" on {answer['host']}" if answer["host"] else ""
    lines = [printable(f"{answer['sentence']}{where}"), *([printable(answer["why"])] if answer["why"] else [])]
    return "\n".join([*lines, *_reasons(answer)])


def _reasons(content: dict[str, Any]) -> list[str]:
    """Why a desktop is on no host yet; a rule of the queue has no host."""
    rows = [(verdict["host"], verdict["reason"], verdict["sentence"]) for verdict in content["verdicts"]]
    return ["", table(("HOST", "REASON", "WHY IT IS NOT THERE"), rows)] if rows else []


@click.command("list")
@remote
def list_(portal: Portal, as_json: bool) -> None:
    """Your desktops, newest first."""
    content = portal.call("GET", "/sessions")
    rows = [(s["sid"], s["machine"], _state(s), s["host"], words.utc(s["created_at"])) for s in content["sessions"]]
    show(as_json, content, lambda: table(("SID", "MACHINE", "STATE", "HOST", "ASKED FOR"), rows))
    if not content["complete"]:
        click.echo("The records can't be read at the moment; desktops may be missing here.", err=True)


@click.command("show")
@click.argument("sid")
@remote
def show_(portal: Portal, as_json: bool, sid: str) -> None:
    """One desktop and how it got where it is."""
    content = portal.call("GET", f"/sessions/{part(sid)}")
    show(as_json, content, lambda: _story(content))


def _story(content: dict[str, Any]) -> str:
    size = content["resources"]
    rows = [
        ("sid", content["sid"]),
        ("machine", content["machine"]),
        ("state", _state(content)),
        ("", content["sentence"]),
        ("host", content["host"] or "-"),
        ("size", f"{size['cpus']} CPUs, {words.memory(size['memory_mib'])}, {size['disk_gib']} GiB disk"),
        ("GPUs", f"{size['gpus']} {size['gpu_model']}".strip()),
        ("asked for", words.utc(content["created_at"])),
    ]
    if content["time_left_s"] is not None:
        rows.append(("time left", words.duration(content["time_left_s"])))
    if content["place"] is not None:
        rows += [("place", str(content["place"])), ("estimate", _estimate(content))]
    if content["host_message"]:
        rows.append(("notice", content["host_message"]))
    if content["unsure"]:
        rows.append(("note", "The records can't be read at the moment; this was true last."))
    lines = [f"{head:<10}{printable(text)}" for head, text in rows]
    lines += _reasons(content)
    if content["steps"]:
        steps = [(words.utc(s["at"]), s["event"], s["state"], s["host"], s["reason"]) for s in content["steps"]]
        lines += ["", table(("TIME", "EVENT", "STATE", "HOST", "REASON"), steps)]
    return "\n".join(lines)


def _estimate(content: dict[str, Any]) -> str:
    if content["estimate_s"] is None:
        return "unknown"
    return f"starts at the latest in about {words.about(content['estimate_s'])}"


@click.command()
@click.argument("session")
@remote
def why(portal: Portal, as_json: bool, session: str) -> None:
    """Why a desktop has not started yet, host by host; or how it ended."""
    content = portal.call("GET", f"/sessions/{part(session)}")
    show(as_json, content, lambda: _why(content))


def _why(content: dict[str, Any]) -> str:
    lines = [content["sentence"]]
    if content["reason"]:
        lines.append(f"reason: {content['reason']}")
    if content["place"] is not None:
        lines += [f"place in the queue: {content['place']}", f"estimate: {_estimate(content)}"]
    return "\n".join([*map(printable, lines), *_reasons(content)])


@click.command("open")
@click.argument("sid")
@remote
def open_(portal: Portal, as_json: bool, sid: str) -> None:
    """Print the address of a desktop's page."""
    session = portal.call("GET", f"/sessions/{part(sid)}")
    address = f"{portal.url}/desktop/{session['sid']}"
    show(as_json, {"sid": session["sid"], "url": address}, lambda: printable(address))


@click.command()
@click.argument("sid")
@remote
def stop(portal: Portal, as_json: bool, sid: str) -> None:
    """Stop a desktop."""
    session = portal.call("POST", f"/sessions/{part(sid)}/stop")
    text = session["sentence"] if session["state"] == "ended" else "Its end is asked for."
    show(as_json, session, lambda: printable(f"{session['sid']}  {text}"))


@click.command()
@click.argument("sid")
@click.argument("longer", type=Duration())
@remote
def extend(portal: Portal, as_json: bool, sid: str, longer: int) -> None:
    """Let a running desktop last LONGER: 30m, 2h, 1d more."""
    session = portal.call("POST", f"/sessions/{part(sid)}/extend", {"extra_s": longer})
    show(as_json, session, lambda: printable(f"{session['sid']}  Asked for {words.duration(longer)} more."))


@click.command()
@remote
def machines(portal: Portal, as_json: bool) -> None:
    """The machines that you may start."""
    content = portal.call("GET", "/machines")
    rows = [
        (m["name"], m["title"], *(f"{m[key]['min']}-{m[key]['max']}" for key in ("cpus", "memory_mib", "disk_gib")))
        for m in content
    ]
    show(as_json, content, lambda: table(("MACHINE", "TITLE", "CPUS", "MEMORY MIB", "DISK GIB"), rows))


COMMANDS: tuple[click.Command, ...] = (launch, place, list_, show_, why, open_, stop, extend, machines)
