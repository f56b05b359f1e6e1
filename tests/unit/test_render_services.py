"""The configuration files of dnsmasq and haproxy."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from netloom.render import dns_names, dns_zones, dnsmasq, haproxy
from netloom.render.services import services
from netloom.state import Network, Nic, Scope
from unit.balanced_scope import NETWORK, RULE, balanced_scope


def test_only_named_nics_have_a_hosts_file() -> None:
    watched_files = dnsmasq.service("net-204", NETWORK).watched_files
    assert watched_files == {
        "device": "10.10.1.1 data-server.cs2cloud.internal data-server\n",
        "nic-u1": "10.10.1.45 web-1.cs2cloud.internal web-1\n",
        "nic-u3": "10.10.1.47 both.cs2cloud.internal both\nfd00::47 both.cs2cloud.internal both\n",
    }


def test_a_new_vm_changes_no_configuration() -> None:
    """So dnsmasq is neither restarted nor signalled."""
    more = replace(
        NETWORK, nics={**NETWORK.nics, "u4": Nic(mac="02:01:00:cc:00:06", hostname="new", ip="10.10.1.50", named=True)}
    )
    assert dnsmasq.service("net-204", more).config == dnsmasq.service("net-204", NETWORK).config


@pytest.mark.mutation("reserved-names-are-no-vms")
@pytest.mark.parametrize("name", ["wpad", "WPAD", "isatap", "localhost", "data-server", "instance-data"])
def test_reserved_names_are_not_given_to_vms(name: str) -> None:
    nic = Nic(mac="02:01:00:cc:00:06", hostname=name, ip="10.10.1.50", named=True)
    network = replace(NETWORK, nics={"u4": nic})
    assert dnsmasq.service("net-204", network).watched_files.keys() == {"device"}
    assert dns_names.reserved(network) == {"u4": name}


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("10.10.1.0/24", ["1.10.10.in-addr.arpa"]),
        ("10.0.0.0/8", ["10.in-addr.arpa"]),
        ("10.10.4.0/23", ["4.10.10.in-addr.arpa", "5.10.10.in-addr.arpa"]),
        ("192.0.2.6/31", ["6.2.0.192.in-addr.arpa", "7.2.0.192.in-addr.arpa"]),
        ("192.0.2.9/32", ["9.2.0.192.in-addr.arpa"]),
        ("fc00::/7", ["c.f.ip6.arpa", "d.f.ip6.arpa"]),
        ("2001:db8:50:1::/64", ["1.0.0.0.0.5.0.0.8.b.d.0.1.0.0.2.ip6.arpa"]),
        ("2001:db8::/30", [f"{digit}.b.d.0.1.0.0.2.ip6.arpa" for digit in "89ab"]),
    ],
)
def test_the_reverse_zones_cover_a_prefix_exactly(prefix: str, expected: list[str]) -> None:
    assert list(dns_zones.zones(prefix)) == expected


@pytest.mark.parametrize("length", range(33))
def test_a_prefix_has_at_most_128_reverse_zones(length: int) -> None:
    assert 1 <= len(dns_zones.zones(f"10.10.1.0/{length}")) <= (256 if length == 0 else 128)


def test_private_reverse_questions_go_to_private_resolvers_only() -> None:
    mixed = dns_zones.reverse_options(["10.10.1.0/24", "8.8.4.0/24"], ["8.8.8.8", "172.20.0.53"])
    assert mixed[:2] == ["local=/1.10.10.in-addr.arpa/", "local=/4.8.8.in-addr.arpa/"]
    assert {"server=/10.in-addr.arpa/172.20.0.53", "server=/31.172.in-addr.arpa/172.20.0.53"} <= set(mixed)
    assert not [it for it in mixed if "8.8.8.8" in it]
    public = dns_zones.reverse_options(["10.10.1.0/24"], ["8.8.8.8", "198.51.100.53"])
    assert {"local=/10.in-addr.arpa/", "local=/254.169.in-addr.arpa/", "local=/127.100.in-addr.arpa/"} <= set(public)
    # A zone that is the network's own has one option.
    assert [it for it in dns_zones.reverse_options(["10.0.0.0/8"], ["10.0.0.53"]) if "/10.in" in it] == [
        "local=/10.in-addr.arpa/"
    ]


def tiers(**more: Network) -> Scope:
    """A VPC of two tiers with these networks besides."""
    other = replace(
        NETWORK,
        network_id="205",
        cidr="10.10.2.0/24",
        gateway="10.10.2.1",
        extension_ip="10.10.2.1",
        nics={"u7": Nic(mac="02:01:00:cc:00:07", hostname="db", ip="10.10.2.7", ip6="fd00::2:7", named=True),
              "u8": Nic(mac="02:01:00:cc:00:08", hostname="WEB-1", ip="10.10.2.8", ip6="fd00::2:8", named=True),
              "u9": Nic(mac="02:01:00:cc:00:09", hostname="wpad", ip="10.10.2.9", named=True)},
    )  # fmt: skip
    return Scope(scope_id="vpc-7", owner="test", vpc_cidr="10.10.0.0/16",
                 networks={"204": NETWORK, "205": other} | more)  # fmt: skip


@pytest.mark.mutation("own-tier-first")
def test_a_tier_knows_the_names_of_other_tiers_but_its_own_come_first() -> None:
    first, second = (it.watched_files for it in services(tiers()))
    # Over IPv4 dnsmasq chooses by tier, over IPv6 it cannot.
    assert {key: text for key, text in first.items() if key.startswith("tier-")} == {
        "tier-205-nic-u7": "10.10.2.7 db.cs2cloud.internal db\nfd00::2:7 db.cs2cloud.internal db\n",
        "tier-205-nic-u8": "10.10.2.8 WEB-1.cs2cloud.internal WEB-1\n",
    }
    assert second["device"] == "10.10.2.1 data-server.cs2cloud.internal data-server\n"
    assert {key for key in second if key.startswith("tier-")} == {"tier-204-nic-u1", "tier-204-nic-u3"}


def test_a_new_tier_changes_no_configuration_of_the_others() -> None:
    more = replace(NETWORK, network_id="206", cidr="10.10.3.0/24", gateway="10.10.3.1", extension_ip="10.10.3.1")
    before, after = services(tiers()), services(tiers(**{"206": more}))
    assert [it.config for it in before] == [it.config for it in after[:2]]
    assert [it for it in after[2].config["dnsmasq.conf"].splitlines() if it == "local=/10.10.in-addr.arpa/"]


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
    [
        (1, haproxy.Shares(8000, 8000, 8000, 2000, 2000)),
        (2, haproxy.Shares(8000, 4000, 4000, 1000, 2000)),
        (160, haproxy.Shares(8000, 50, 50, 12, 2000)),
        (161, haproxy.Shares(8000, 50, 24, 12, 2000)),
        (700, haproxy.Shares(8000, 50, 5, 12, 2000)),
        (5000, haproxy.Shares(10000, 50, 1, 12, 2500)),
    ],
)
@pytest.mark.mutation("rules-have-reserved-connections")
def test_all_rules_have_equal_shares(rules: int, share: haproxy.Shares) -> None:
    scope = balanced_scope(*(replace(RULE, rule_id=at, public_port=1000 + at) for at in range(rules)))
    wanted = haproxy.service(scope)
    assert wanted is not None
    assert haproxy.shares(scope, rules) == share
    # Whatever the other rules use, what is reserved for a rule is free.
    borrowed = share.borrowed_below if share.reserved < share.rule else 0
    assert borrowed + rules * share.reserved <= share.in_all
    head, *sections = wanted.config["haproxy.cfg"].split("listen ")
    assert f"    maxconn {share.in_all}\n" in head
    assert all(f"    maxconn {share.rule}\n" in it for it in sections)
    borrowing = f"reject if {{ fe_conn gt {share.reserved} }} {{ sc2_conn_cur gt {share.borrowed_below} }}\n"
    assert all((borrowing in it) == (share.reserved < share.rule) for it in sections)


def test_the_order_of_rules_and_backends_does_not_matter() -> None:
    other = replace(RULE, rule_id=7, public_port=90)
    turned = replace(RULE, backends=RULE.backends[::-1])
    assert haproxy.service(balanced_scope(RULE, other)) == haproxy.service(balanced_scope(other, turned))
