"""The configuration files of dnsmasq and haproxy."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from netloom.render import dnsmasq, haproxy
from netloom.render.services import services
from netloom.state import Nic
from unit.balanced_scope import NETWORK, RULE, balanced_scope


def test_only_named_nics_have_a_hosts_file() -> None:
    watched_files = dnsmasq.service("net-204", NETWORK).watched_files
    assert watched_files == {
        "device": "10.10.1.1 data-server\n",
        "nic-u1": "10.10.1.45 web-1\n",
        "nic-u3": "10.10.1.47 both\nfd00::47 both\n",
    }


def test_a_new_vm_changes_no_configuration() -> None:
    """So dnsmasq is neither restarted nor signalled."""
    more = replace(
        NETWORK, nics={**NETWORK.nics, "u4": Nic(mac="02:01:00:cc:00:06", hostname="new", ip="10.10.1.50", named=True)}
    )
    assert dnsmasq.service("net-204", more).config == dnsmasq.service("net-204", NETWORK).config


@pytest.mark.mutation("resolver-reads-no-hosts-file")
def test_defect_20_the_resolver_uses_nothing_of_the_host() -> None:
    text = dnsmasq.service("net-204", NETWORK).config["dnsmasq.conf"].splitlines()
    assert {"no-hosts", "no-resolv", "server=198.51.100.53", "server=198.51.100.54"} <= set(text)


def test_a_scope_without_rules_has_no_haproxy() -> None:
    assert haproxy.service(balanced_scope()) is None
    assert haproxy.service(balanced_scope(replace(RULE, protocol="udp"))) is None


def test_a_rule_without_its_address_is_left_out() -> None:
    assert haproxy.service(replace(balanced_scope(RULE), public_ips={})) is None


def test_an_inactive_network_has_no_services() -> None:
    assert [it.name for it in services(balanced_scope(RULE))] == ["dns-204", "lb"]
    remembered = replace(NETWORK, implemented=False)
    assert services(replace(balanced_scope(RULE), networks={"204": remembered})) == ()


def test_the_proxy_protocol_is_used_by_tcp_proxy_rules_only() -> None:
    proxied = replace(RULE, rule_id=952, public_port=81, protocol="tcp-proxy")
    wanted = haproxy.service(balanced_scope(RULE, proxied))
    assert wanted is not None
    plain, proxy = wanted.config["haproxy.cfg"].split("listen ")[1:]
    assert "send-proxy" not in plain
    assert proxy.count("send-proxy\n") == 2


@pytest.mark.parametrize(
    ("rules", "share"),
    [(1, haproxy.Shares(8000, 2000)), (16, haproxy.Shares(500, 125)), (700, haproxy.Shares(100, 25))],
)
def test_all_rules_have_equal_shares_and_the_process_has_room_for_all(rules: int, share: haproxy.Shares) -> None:
    scope = balanced_scope(*(replace(RULE, rule_id=at, public_port=1000 + at) for at in range(rules)))
    wanted = haproxy.service(scope)
    assert wanted is not None
    assert haproxy.shares(scope, rules) == share
    head, *sections = wanted.config["haproxy.cfg"].split("listen ")
    assert f"    maxconn {rules * share.rule}\n" in head
    assert all(f"    maxconn {share.rule}\n" in it for it in sections)


def test_the_order_of_rules_and_backends_does_not_matter() -> None:
    other = replace(RULE, rule_id=7, public_port=90)
    turned = replace(RULE, backends=RULE.backends[::-1])
    assert haproxy.service(balanced_scope(RULE, other)) == haproxy.service(balanced_scope(other, turned))
