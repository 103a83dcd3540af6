"""The commands about dead letters, everybody's desktops and the audit, for administrators, over a portal's HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import click

from deskfleet.portal import words
from deskfleet.portal.audit import Entry, as_csv, as_json_lines
from deskfleet.portal.cli_common import Refusal, printable, table
from deskfleet.portal.cli_portal import Portal, part, remote, show

_PAGE = 1000
_AT = "/dead-letters"


@click.group()
def queue() -> None:
    """The queues, and the messages that nobody could take. For administrators."""


@queue.command("dead")
@click.argument("name", required=False)
@remote
def dead(portal: Portal, as_json: bool, name: str | None) -> None:
    """The dead letters, newest first; or one with its body."""
    if name:
        content = portal.call("GET", f"{_AT}/{part(name)}")
        show(as_json, content, lambda: _letter(content))
        return
    content = portal.call("GET", f"{_AT}?limit={_PAGE}")
    rows = [
        (c["name"], words.utc(c["died_at"]), c["type"], c["sender"], c["queue"], c["cause"], c["sid"]) for c in content
    ]
    show(as_json, content, lambda: table(("NAME", "DIED", "TYPE", "SENDER", "QUEUE", "WHY", "SID"), rows))


def _letter(content: dict[str, Any]) -> str:
    heads = ("name", "type", "sender", "queue", "cause", "sid")
    lines = [f"{head:<8}{printable(str(content[head]))}" for head in heads]
    lines += ["", *(printable(line) for line in content["text"].splitlines())]
    return "\n".join([*lines, "", printable(content["obstacle"] or "It can be sent again.")])


@queue.command()
@click.argument("name")
@remote
def replay(portal: Portal, as_json: bool, name: str) -> None:
    """Send a dead letter again to where it was on its way to."""
    portal.call("POST", f"{_AT}/{part(name)}/replay")
    show(as_json, {"replayed": name}, lambda: printable(f"{name}  It was sent again."))


@queue.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="All that are there now.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@remote
def discard(portal: Portal, as_json: bool, name: str | None, everything: bool, yes: bool) -> None:
    """Forget one dead letter, or --all of them."""
    if bool(name) == everything:
        raise click.UsageError("give the name of a dead letter, or --all")
    if name:
        _confirm(yes, f"What {printable(name)} says is lost. Type its first four letters to confirm", name[:4])
        portal.call("DELETE", f"{_AT}/{part(name)}")
        show(as_json, {"discarded": 1}, lambda: printable(f"{name}  It is discarded."))
        return
    found = _every(portal, _AT)
    if not found:
        show(as_json, {"discarded": 0}, lambda: "There is none.")
        return
    _confirm(yes, f"What {len(found)} dead letters say is lost. Type their number to confirm", str(len(found)))
    content = portal.call("POST", f"{_AT}/discard", {"count": len(found), "up_to": found[0]["number"]})
    show(as_json, content, lambda: f"{content['discarded']} are discarded.")


def _confirm(yes: bool, text: str, expected: str) -> None:
    if not yes and click.prompt(text, err=True) != expected:
        raise Refusal("That is not it; nothing was done.")


def _every(portal: Portal, path: str, **query: str) -> list[dict[str, Any]]:
    return list(_pages(portal, path, query))


def _pages(portal: Portal, path: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
    before = 0
    while True:
        page = portal.call("GET", f"{path}?{urlencode({**query, 'limit': _PAGE, 'before': before})}")
        yield from page
        if len(page) < _PAGE:
            return
        before = page[-1]["number"]


@click.group()
def session() -> None:
    """Everybody's desktops. For administrators."""


_FILTERS = tuple(
    click.option(f"--{name}", default="", help=text)
    for name, text in (
        ("user", "Of this person."),
        ("host", "On this host."),
        ("state", "In this state: queued, assigned, starting, running, stopping, unknown."),
        ("machine", "Of this machine."),
        ("text", "With this text anywhere."),
    )
)


def _filtered(command: Any) -> Any:
    for option in reversed(_FILTERS):
        command = option(command)
    return command


@session.command("list")
@_filtered
@remote
def list_all(portal: Portal, as_json: bool, **which: str) -> None:
    """The desktops that have not ended, oldest first."""
    content = portal.call("GET", f"/everybody/sessions?{urlencode(which)}")
    rows = [
        (
            s["sid"],
            s["user"],
            s["machine"],
            "unknown" if s["host_silent"] else s["state"],
            s["host"],
            content["why"].get(s["sid"], ""),
        )
        for s in content["sessions"]
    ]
    show(as_json, content, lambda: table(("SID", "USER", "MACHINE", "STATE", "HOST", "WHY"), rows))
    if content["count"] > len(rows):
        click.echo(f"{content['count']} match; these are the first {len(rows)}.", err=True)


@session.command("stop-all")
@_filtered
@click.option("--count", type=click.IntRange(1), help="How many they are, instead of being asked.")
@remote
def stop_all(portal: Portal, as_json: bool, count: int | None, **which: str) -> None:
    """Stop every desktop that matches; without a filter, every one."""
    if count is None:
        there = portal.call("GET", f"/everybody/sessions?{urlencode(which)}")["count"]
        if not there:
            raise Refusal("No desktop matches; nothing was done.")
        _confirm(False, f"{there} desktops end at once. Type their number to confirm", str(there))
        count = there
    content = portal.call("POST", "/everybody/sessions/stop", {**which, "count": count})
    show(as_json, content, lambda: f"The end of {len(content['sids'])} desktops is asked for.")


@click.group()
def audit() -> None:
    """Who did what. For administrators."""


@audit.command()
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True)
@click.option("--actor", default="", help="Who.")
@click.option("--action", default="", help="Did what.")
@click.option("--text", default="", help="With this text in target or detail.")
@click.option("--since", default="", help="From this day, YYYY-MM-DD (UTC).")
@click.option("--until", default="", help="To this day, included.")
@remote
def export(portal: Portal, as_json: bool, form: str, **query: str) -> None:
    """Write every line that matches to the standard output, newest first."""
    entries = (Entry(**line) for line in _pages(portal, "/audit", query))
    for line in as_json_lines(entries) if as_json or form == "jsonl" else as_csv(entries):
        click.echo(line, nl=False)


@click.command()
@remote
def health(portal: Portal, as_json: bool) -> None:
    """How each part of the service is, and what to do. Exit status 1 when anything is broken. For administrators."""
    content = portal.call("GET", "/health")
    rows = [(c["name"], c["level"], f"{c['sentence']} {c['advice']}".rstrip()) for c in content]
    show(as_json, content, lambda: table(("PART", "LEVEL", "WHAT"), rows))
    if any(check["level"] == "bad" for check in content):
        click.get_current_context().exit(1)


COMMANDS: tuple[click.Command, ...] = (queue, session, audit, health)
