"""deskfleet: the command line, for people who start desktops and for who runs the fleet."""

from __future__ import annotations

import click

from deskfleet.portal import cli_admin, cli_fleet, cli_local, cli_machines, cli_remote, cli_share


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Remote desktops on a fleet of hosts.

    The commands about desktops, hosts and queues speak to a portal: give its address by DESKFLEET_URL or --url, and a
    token by DESKFLEET_TOKEN or --token-file. The commands migrate, user, token, config and machine work on this
    machine, with the settings file.

    Exit status: 0 done, 1 refused, 2 wrong usage, 3 the portal can't be reached.
    """


for _module in (cli_remote, cli_share, cli_fleet, cli_admin, cli_local, cli_machines):
    for _command in _module.COMMANDS:
        main.add_command(_command)
