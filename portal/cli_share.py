"""The commands about sharing a desktop, over a portal's HTTP API, and what shells need to complete commands."""

from __future__ import annotations

import time
from typing import Any

import click
from click.shell_completion import get_completion_class

from deskfleet.portal import words
from deskfleet.portal.cli_common import Duration, Refusal, printable, table
from deskfleet.portal.cli_portal import Portal, part, remote, show

_ANSWERS_S = 0.5
_FOR = {"signed_in": "signed in", "anybody": "anybody"}


@click.command()
@click.argument("sid")
@click.option("--for", "lifetime_s", type=Duration(), default="1h", show_default=True, help="How long the link works.")
@click.option("--anybody", is_flag=True, help="Also for people who are not signed in.")
@click.option(
    "--passphrase",
    default="",
    help="Ask guests for this. Better by DESKFLEET_PASSPHRASE.",
    envvar="DESKFLEET_PASSPHRASE",
)
@click.option("--watch", is_flag=True, help="For watching only (not offered yet).")
@remote
def share(
    portal: Portal, as_json: bool, sid: str, lifetime_s: int, anybody: bool, passphrase: str, watch: bool
) -> None:
    """Make a link by which others may use your desktop with you. It is printed this once."""
    body = {
        "mode": "watch" if watch else "full",
        "audience": "anybody" if anybody else "signed_in",
        "lifetime_s": lifetime_s,
        "passphrase": passphrase,
    }
    made = portal.call("POST", f"/sessions/{part(sid)}/shares", body)
    show(as_json, made, lambda: printable(made["link"]))


@click.command()
@click.argument("sid")
@remote
def shares(portal: Portal, as_json: bool, sid: str) -> None:
    """The links to a desktop, and who has it open."""
    links = portal.call("GET", f"/sessions/{part(sid)}/shares")
    portal.call("GET", f"/sessions/{part(sid)}/consoles")
    time.sleep(_ANSWERS_S)  # the proxies were asked just now
    open_ = portal.call("GET", f"/sessions/{part(sid)}/consoles")
    show(as_json, {"shares": links, "consoles": open_}, lambda: _shares(links, open_))


def _shares(links: list[dict[str, Any]], consoles: list[dict[str, Any]]) -> str:
    rows = [(s["name"], _FOR[s["audience"]], "yes" if s["locked"] else "", words.utc(s["expires_at"])) for s in links]
    there = [
        (c["user"], c["grant"] if c["grant"].startswith("share-") else "", words.duration(c["open_s"]))
        for c in consoles
    ]
    texts = [table(("LINK", "FOR", "PASSPHRASE", "WORKS UNTIL"), rows) if rows else "No links."]
    texts.append(table(("OPEN BY", "THROUGH", "FOR"), there) if there else "Nobody has it open, as far as is known.")
    return "\n\n".join(texts)


@click.command()
@click.argument("sid")
@click.argument("link")
@remote
def unshare(portal: Portal, as_json: bool, sid: str, link: str) -> None:
    """Take a link back, by its name. Whoever is in by it is out within seconds."""
    portal.call("DELETE", f"/sessions/{part(sid)}/shares/{part(link)}")
    show(as_json, {"sid": sid, "link": link}, lambda: printable(f"{link}  Taken back."))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a SHELL complete commands: eval "$(deskfleet completion bash)"."""
    found = get_completion_class(shell)
    if found is None:
        raise Refusal(f"{shell} is not supported")
    root = click.get_current_context().find_root().command
    click.echo(found(root, {}, "deskfleet", "_DESKFLEET_COMPLETE").source())


COMMANDS: tuple[click.Command, ...] = (share, shares, unshare, completion)
"""Added to the command by cli.py."""
