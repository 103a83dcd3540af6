"""The commands that speak to a portal over its HTTP API."""

from __future__ import annotations

import functools
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import click
import requests
from requests.auth import AuthBase

from deskfleet.portal import words
from deskfleet.portal.cli_common import Duration, Refusal, Unreachable, printable, table
from deskfleet.portal.settings import LOOPBACK_NAMES

_PATIENCE_S = 30.0
_PAUSE_S = 1.0


class _Bearer(AuthBase):
    """A header set by hand would lose against a password for the same host in ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Portal:
    """One portal, for one person's token."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._auth = _Bearer(token)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One call; None when the answer has no body.

        Raises:
            Refusal: the portal says no.
            Unreachable: no answer, or one that is not a portal's.
        """
        try:
            # A redirect would carry the token, or turn a POST into a GET: a portal sends none.
            answer = requests.request(
                method,
                f"{self.url}/api/v1{path}",
                json=body,
                auth=self._auth,
                timeout=_PATIENCE_S,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise Unreachable(f"{self.url} can't be reached: {type(error).__name__}") from None
        if answer.status_code == requests.codes.no_content:
            return None
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.ok and isinstance(content, dict | list):
            return content
        if isinstance(content, dict) and "reason" in content and "message" in content:
            raise Refusal(_refusal(content))
        raise Unreachable(f"{self.url} does not answer like a portal (status {answer.status_code})")


def _refusal(content: dict[str, Any]) -> str:
    lines = [f"{content['message']} ({content['reason']})", *(f"  {line}" for line in content.get("details") or [])]
    if content.get("reference"):
        lines.append(f"  reference: {content['reference']}")
    return "\n".join(printable(line) for line in lines)


def _portal(url: str, token: str, token_file: Path | None) -> Portal:
    if token_file is not None:
        try:
            token = token_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"{token_file} can't be read: {error}") from None
    if not token:
        raise click.UsageError("give a token: DESKFLEET_TOKEN, or --token-file FILE")
    if not token.isascii() or not token.isprintable():
        raise click.UsageError("the token holds characters that no token has")
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise click.UsageError(f"{url!r} is not the address of a portal; write https://HOST")
    if parts.scheme == "http" and host not in LOOPBACK_NAMES:
        raise click.UsageError("a token goes over https:// only, except to this machine")
    return Portal(url, token)


def _remote(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that speaks to a portal, which comes as the first argument."""

    @click.option("--url", envvar="DESKFLEET_URL", required=True, help="The portal's address [DESKFLEET_URL].")
    @click.option("--token-file", type=click.Path(dir_okay=False, path_type=Path), help="Instead of DESKFLEET_TOKEN.")
    @click.option("--token", envvar="DESKFLEET_TOKEN", default="", hidden=True, expose_value=True)
    @click.option("--json", "as_json", is_flag=True, help="Print what the portal answered, as JSON.")
    @functools.wraps(command)
    def wrapper(url: str, token_file: Path | None, token: str, **options: Any) -> None:
        command(_portal(url, token, token_file), **options)

    return wrapper


def _show(as_json: bool, content: Any, text: Callable[[], str]) -> None:
    click.echo(json.dumps(content, indent=2) if as_json else text())


def _line(session: dict[str, Any]) -> str:
    return printable(f"{session['sid']}  {session['state']}  {session['sentence']}")


@click.command()
@click.argument("machine")
@click.option("--cpus", type=int, help="Virtual CPUs.")
@click.option("--memory", "memory_mib", type=int, help="Memory in MiB.")
@click.option("--disk", "disk_gib", type=int, help="Disk in GiB.")
@click.option("--gpu", is_flag=True, help="With a GPU.")
@click.option("--gpu-model", help="With a GPU of this model.")
@click.option("--persistent", is_flag=True, help="Keep it when the last viewer leaves.")
@click.option("--lifetime", "lifetime_s", type=Duration(), help="End it after this time: 90m, 8h, 2d.")
@click.option("--wait", is_flag=True, help="Wait until it runs.")
@_remote
def launch(
    portal: Portal, as_json: bool, wait: bool, gpu: bool, gpu_model: str | None, persistent: bool, **sizes: Any
) -> None:
    """Start a desktop."""
    sid = secrets.token_hex(16)
    body = {name: value for name, value in sizes.items() if value is not None}
    body |= {"sid": sid, "persistent": persistent}
    if gpu or gpu_model:
        body |= {"gpus": 1, "gpu_model": gpu_model or ""}
    try:
        session = portal.call("POST", "/sessions", body)
    except Unreachable as error:
        raise Unreachable(f"{error.message}\nThe request may have arrived: see 'deskfleet show {sid}'.") from None
    said = ""
    while wait and session["state"] not in ("running", "ended"):
        if session["sentence"] != said:
            said = session["sentence"]
            click.echo(printable(said), err=True)
        time.sleep(_PAUSE_S)
        session = portal.call("GET", f"/sessions/{sid}")
    _show(as_json, session, lambda: _line(session))
    if wait and session["state"] == "ended":
        raise Refusal(printable(f"{session['sentence']} ({session['reason'] or session['outcome']})"))


@click.command("list")
@_remote
def list_(portal: Portal, as_json: bool) -> None:
    """Your desktops, newest first."""
    content = portal.call("GET", "/sessions")
    rows = [(s["sid"], s["machine"], s["state"], s["host"], words.utc(s["created_at"])) for s in content["sessions"]]
    _show(as_json, content, lambda: table(("SID", "MACHINE", "STATE", "HOST", "ASKED FOR"), rows))
    if not content["complete"]:
        click.echo("The records can't be read at the moment; desktops may be missing here.", err=True)


@click.command()
@click.argument("sid")
@_remote
def show(portal: Portal, as_json: bool, sid: str) -> None:
    """One desktop and how it got where it is."""
    content = portal.call("GET", f"/sessions/{quote(sid, safe='')}")
    _show(as_json, content, lambda: _story(content))


def _story(content: dict[str, Any]) -> str:
    size = content["resources"]
    rows = [
        ("sid", content["sid"]),
        ("machine", content["machine"]),
        ("state", content["state"]),
        ("", content["sentence"]),
        ("host", content["host"] or "-"),
        ("size", f"{size['cpus']} CPUs, {words.memory(size['memory_mib'])}, {size['disk_gib']} GiB disk"),
        ("GPUs", f"{size['gpus']} {size['gpu_model']}".strip()),
        ("asked for", words.utc(content["created_at"])),
    ]
    if content["time_left_s"] is not None:
        rows.append(("time left", words.duration(content["time_left_s"])))
    if content["place"] is not None:
        rows.append(("place", str(content["place"])))
    if content["unsure"]:
        rows.append(("note", "The records can't be read at the moment; this was true last."))
    lines = [f"{head:<10}{printable(text)}" for head, text in rows]
    if content["verdicts"]:
        verdicts = [(verdict["host"], verdict["reason"], verdict["sentence"]) for verdict in content["verdicts"]]
        lines += ["", table(("HOST", "REASON", "WHY IT IS NOT THERE"), verdicts)]
    if content["steps"]:
        steps = [(words.utc(s["at"]), s["event"], s["state"], s["host"], s["reason"]) for s in content["steps"]]
        lines += ["", table(("TIME", "EVENT", "STATE", "HOST", "REASON"), steps)]
    return "\n".join(lines)


@click.command("open")
@click.argument("sid")
@_remote
def open_(portal: Portal, as_json: bool, sid: str) -> None:
    """Print the address of a desktop's page."""
    session = portal.call("GET", f"/sessions/{quote(sid, safe='')}")
    address = f"{portal.url}/desktop/{session['sid']}"
    _show(as_json, {"sid": session["sid"], "url": address}, lambda: printable(address))


@click.command()
@click.argument("sid")
@_remote
def stop(portal: Portal, as_json: bool, sid: str) -> None:
    """Stop a desktop."""
    session = portal.call("POST", f"/sessions/{quote(sid, safe='')}/stop")
    text = session["sentence"] if session["state"] == "ended" else "Its end is asked for."
    _show(as_json, session, lambda: printable(f"{session['sid']}  {text}"))


@click.command()
@_remote
def machines(portal: Portal, as_json: bool) -> None:
    """The machines that you may start."""
    content = portal.call("GET", "/machines")
    rows = [
        (m["name"], m["title"], *(f"{m[key]['min']}-{m[key]['max']}" for key in ("cpus", "memory_mib", "disk_gib")))
        for m in content
    ]
    _show(as_json, content, lambda: table(("MACHINE", "TITLE", "CPUS", "MEMORY MIB", "DISK GIB"), rows))


@click.command()
@_remote
def hosts(portal: Portal, as_json: bool) -> None:
    """The hosts. For administrators."""
    content = portal.call("GET", "/hosts")
    _show(
        as_json,
        content,
        lambda: table(
            ("HOST", "STATE", "HEARD", "GUESTS", "CPUS", "LOAD", "FREE MIB", "PROBLEMS"), [_host(h) for h in content]
        ),
    )


def _host(host: dict[str, Any]) -> tuple[object, ...]:
    report = host["report"]
    state = "draining" if host["draining"] else "ready" if report else "silent"
    heard = "never" if host["seen_s"] is None else f"{words.duration(host['seen_s'])} ago"
    if report is None:
        return host["name"], state, heard, "", "", "", "", host["message"]
    problems = "; ".join([host["message"], *report["problems"]] if host["message"] else report["problems"])
    free = report["memory_free_mib"]
    return host["name"], state, heard, host["guests"], report["cpus"], f"{report['load1']:.1f}", free, problems


@click.command()
@_remote
def queues(portal: Portal, as_json: bool) -> None:
    """The queues of the broker. For administrators."""
    content = portal.call("GET", "/queues")
    rows = [
        (q["name"], q["messages"], q["consumers"], "LOOK" if q["alarm"] else "", q["problem"] or q["purpose"])
        for q in content
    ]
    _show(as_json, content, lambda: table(("QUEUE", "MESSAGES", "CONSUMERS", "ALARM", "WHAT"), rows))


def _drain(portal: Portal, as_json: bool, host: str, verb: str, sentence: str) -> None:
    portal.call("POST", f"/hosts/{quote(host, safe='')}/{verb}")
    _show(as_json, {"host": host, "asked": verb}, lambda: printable(f"{host}: {sentence}"))


@click.command()
@click.argument("host")
@_remote
def drain(portal: Portal, as_json: bool, host: str) -> None:
    """Place nothing more on a host. For administrators."""
    _drain(portal, as_json, host, "drain", "gets no new desktops; what runs there goes on.")


@click.command()
@click.argument("host")
@_remote
def undrain(portal: Portal, as_json: bool, host: str) -> None:
    """Place desktops on a host again. For administrators."""
    _drain(portal, as_json, host, "undrain", "gets new desktops again.")


COMMANDS: tuple[click.Command, ...] = (
    launch, list_, show, open_, stop, machines, hosts, queues, drain, undrain,
)  # fmt: skip
