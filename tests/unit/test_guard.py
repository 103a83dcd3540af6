"""The rules that keep guests from the host and from what a site has blocked, and the tap devices of a bridge."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from deskfleet.agent import guard, lan
from deskfleet.agent.guard import GuardError
from deskfleet.agent.settings import AgentSchema

SETTINGS = AgentSchema().load({"host": "h1", "broker_url": "amqp://x", "console_address": "h1:1"})


def test_c27_metadata_services_and_link_local_addresses_are_blocked_unless_it_is_said_otherwise() -> None:
    text = guard.rules("h1", 200, 299, SETTINGS.blocked_networks)
    assert 'meta skuid 200-299 oifname "lo" counter reject' in text
    four, six = (line for line in text.splitlines() if "daddr" in line)
    assert "169.254.0.0/16" in four and "100.100.100.200/32" in four and four.strip().startswith("meta skuid 200-299")
    assert "fd00:ec2::254/128" in six and "fe80::/10" in six


def test_networks_that_overlap_are_one_since_nftables_takes_no_others() -> None:
    networks = [ip_network(text) for text in ("10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8", "fd00::/8")]
    assert guard.destinations(networks) == ["ip daddr { 10.0.0.0/8 }", "ip6 daddr { fd00::/8 }"]
    assert guard.destinations([]) == []


def test_a_rule_that_is_refused_is_an_error() -> None:
    with pytest.raises(GuardError, match=r"could not set the rule.*No such device"):
        guard.apply("h1", 1, 2, run=lambda *_: (1, "No such device"))


def test_a_bridge_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "class/net/eth0").mkdir(parents=True)
    for name in ("br0", "eth0"):
        wire = lan.Lan("h1", name, (), isolated=True, run=lambda *_: (0, ""))
        with pytest.raises(GuardError, match=f"no bridge {name}"):
            wire.guard(tmp_path)


def test_a_tap_that_can_t_be_made_is_said(tmp_path: Path) -> None:
    wire = lan.Lan("h1", "br0", (), isolated=True, run=lambda *_: (0, ""), tun=tmp_path / "none")
    with pytest.raises(lan.LanError, match="df-0a0b0c: No such file"):
        wire.plug("52:54:00:0a:0b:0c")
