"""The commands about hosts and queues, for administrators, over a portal's HTTP API."""

from __future__ import annotations

from typing import Any

import click

from deskfleet.portal import cli_admin, cli_enrol, words
from deskfleet.portal.cli_common import Refusal, printable, table
from deskfleet.portal.cli_portal import Portal, part, remote, show
from deskfleet.portal.history import Span
from deskfleet.schemas.template import TemplateOrder


@click.command()
@remote
def hosts(portal: Portal, as_json: bool) -> None:
    """The hosts. For administrators."""
    content = portal.call("GET", "/hosts")
    show(
        as_json,
        content,
        lambda: table(
            ("HOST", "STATE", "HEARD", "GUESTS", "CPUS", "LOAD", "FREE MIB", "PROBLEMS"), [_host(h) for h in content]
        ),
    )


def _host(host: dict[str, Any]) -> tuple[object, ...]:
    report = host["report"]
    state = "dead" if host["dead"] else "draining" if host["draining"] else "ready" if report else "silent"
    heard = "never" if host["seen_s"] is None else f"{words.duration(host['seen_s'])} ago"
    if report is None:
        return host["name"], state, heard, "", "", "", "", host["message"]
    problems = "; ".join([host["message"], *report["problems"]] if host["message"] else report["problems"])
    free = report["memory_free_mib"]
    return host["name"], state, heard, host["guests"], report["cpus"], f"{report['load1']:.1f}", free, problems


@click.command()
@remote
def queues(portal: Portal, as_json: bool) -> None:
    """The queues of the broker. For administrators."""
    content = portal.call("GET", "/queues")
    rows = [
        (q["name"], q["messages"], q["consumers"], "LOOK" if q["alarm"] else "", q["problem"] or q["purpose"])
        for q in content
    ]
    show(as_json, content, lambda: table(("QUEUE", "MESSAGES", "CONSUMERS", "ALARM", "WHAT"), rows))


@click.command()
@remote
def images(portal: Portal, as_json: bool) -> None:
    """Which hosts hold which machine. For administrators."""
    content = portal.call("GET", "/images")
    rows = [(c["machine"], c["sha256"][:12], ", ".join(_holder(h) for h in c["hosts"]) or "none") for c in content]
    show(as_json, content, lambda: table(("MACHINE", "IMAGE", "HOSTS"), rows))


def _holder(found: dict[str, Any]) -> str:
    return str(found["host"]) if found["state"] == "held" else f"{found['host']} ({found['state']})"


@click.group()
def host() -> None:
    """Look at a host, take it out of use, or back. For administrators."""


def _change(portal: Portal, as_json: bool, name: str, verb: str, body: dict[str, Any], sentence: str) -> None:
    portal.call("POST", f"/hosts/{part(name)}/{verb}", body)
    show(as_json, {"host": name, "asked": verb}, lambda: printable(f"{name}: {sentence}"))


@host.command("show")
@click.argument("name")
@remote
def show_host(portal: Portal, as_json: bool, name: str) -> None:
    """One host, the images that it holds or fetches, and what it keeps ready."""
    content = portal.call("GET", f"/hosts/{part(name)}")
    fields = ("HOST", "STATE", "HEARD", "GUESTS", "CPUS", "LOAD", "FREE MIB", "PROBLEMS")
    rows = [
        (i["sha256"][:12], ", ".join(i["machines"]), words.image_state(i["state"], i["percent"], i["mib"], i["detail"]))
        for i in content["images"]
    ]
    ready = [_template(t) for t in (content["report"] or {}).get("templates") or ()]
    parts = [table(fields, [_host(content)]), "", table(("IMAGE", "MACHINES", "STATE"), rows)]
    if ready:
        parts += ["", table(("TEMPLATE", "MACHINE", "SIZE", "STATE", "MIB", "FORKS", "HITS", "MISSES", "WHY"), ready)]
    show(as_json, content, lambda: "\n".join(parts))


@host.command("history")
@click.argument("name")
@click.option("--span", type=click.Choice([span.value for span in Span]), default=Span.HOUR.value, show_default=True)
@remote
def history(portal: Portal, as_json: bool, name: str, span: str) -> None:
    """What a host had over time; an empty field is unknown."""
    content = portal.call("GET", f"/hosts/{part(name)}/history?span={span}")
    figures = content["figures"]
    rows = [(words.utc(at), *_at(figures, i)) for i, at in enumerate(content["times"])]
    header = ("WHEN", "LOAD", "CPUS", "FREE MIB", "OF MIB", "DISK FREE MIB", "OF MIB", "GUESTS", "GPUS USED", "OF")
    show(as_json, content, lambda: table(header, rows))


_ORDER = ("load1", "cpus", "memory_free_mib", "memory_mib", "disk_free_mib", "disk_mib", "guests", "gpus_used", "gpus")


def _at(figures: dict[str, list[float | None]], index: int) -> tuple[str, ...]:
    return tuple("" if (found := figures[name][index]) is None else f"{found:g}" for name in _ORDER)


def _template(found: dict[str, Any]) -> tuple[object, ...]:
    size = f"{found['cpus']} CPUs, {found['memory_mib']} MiB"
    machine = f"{found['machine']} ({found['tenant']})" if found["tenant"] else found["machine"]
    figures = found["mib"], found["forks"], found["hits"], found["misses"]
    return found["key"], machine, size, found["state"], *figures, found["detail"]


@host.command("template")
@click.argument("order", type=click.Choice([order.value for order in TemplateOrder]))
@click.argument("name")
@click.argument("key")
@remote
def template(portal: Portal, as_json: bool, order: str, name: str, key: str) -> None:
    """Have a host's template made anew, or removed; `host show` lists them with their keys."""
    portal.call("POST", f"/hosts/{part(name)}/templates/{part(key)}", {"order": order})
    sentence = "is made anew; the old one serves until then." if order == TemplateOrder.REBUILD else "is removed."
    show(as_json, {"host": name, "template": key, "asked": order}, lambda: printable(f"{key} on {name} {sentence}"))


@host.command()
@click.argument("name")
@click.option("--message", default="", help="What the people on it are told; at most 400 characters.")
@remote
def drain(portal: Portal, as_json: bool, name: str, message: str) -> None:
    """Place nothing more on a host; what runs there goes on."""
    _change(portal, as_json, name, "drain", {"text": message}, "gets no new desktops; what runs there goes on.")


@host.command()
@click.argument("name")
@remote
def undrain(portal: Portal, as_json: bool, name: str) -> None:
    """Place desktops on a host again."""
    _change(portal, as_json, name, "undrain", {}, "gets new desktops again.")


@host.command("declare-dead")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask for the name again.")
@remote
def declare_dead(portal: Portal, as_json: bool, name: str, yes: bool) -> None:
    """Give up a host and every desktop on it.

    Only when you are sure that the machine is off, or cut from the network: its sessions are given up, and their
    people may start new ones. A host that comes back stops what was given up.
    """
    if not yes:
        typed = click.prompt(f"Everything on {printable(name)} is given up. Type the host's name to confirm", err=True)
        if typed != name:
            raise Refusal("That is not the host's name; nothing was done.")
    _change(portal, as_json, name, "declare-dead", {}, "is declared dead; its desktops are given up.")


for _command in cli_enrol.COMMANDS:
    host.add_command(_command)

cli_admin.queue.add_command(queues, "list")

COMMANDS: tuple[click.Command, ...] = (hosts, queues, images, host)
