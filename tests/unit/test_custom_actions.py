"""Custom actions without a host: names, output that CloudStack can store, and descriptions of a scope."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from netloom.commands.actions import (
    BUILT_IN,
    OUTPUT_CHARACTERS_MAX,
    as_sections,
    bounded_output,
    check_known,
    hook_output,
    page_of,
    printable_ascii,
    success_json,
    truncated,
)
from netloom.errors import BadRequest, HostRefused
from netloom.render import describe
from netloom.secret import Secret
from netloom.state import (
    Backend,
    Firewall,
    FirewallRule,
    LbRule,
    Network,
    Nic,
    PortForward,
    Ports,
    PublicIp,
    Scope,
    StaticNat,
)


@pytest.mark.parametrize("action", [*BUILT_IN, "restart-vpn"])
def test_known_actions_are_accepted(action: str) -> None:
    check_known(action, ["restart-vpn"])


def test_an_unknown_action_is_refused_with_the_known_names() -> None:
    with pytest.raises(BadRequest) as refused:
        check_known("reboot", ["restart-vpn"])
    assert refused.value.message == "custom-action reboot: there is no such action on this host"
    assert refused.value.hint == f"known: {', '.join(sorted([*BUILT_IN, 'restart-vpn']))}"
    assert sum(it.startswith("pbr-") for it in BUILT_IN) == 9


@given(st.text())
def test_output_is_ascii_and_the_same_json(text: str) -> None:
    assert json.loads(success_json(text)) == {"status": "success", "printmessage": "true", "message": text}
    assert success_json(text).isascii()
    within = json.dumps({"a": text}, ensure_ascii=False)
    assert printable_ascii(within).isascii()
    # Raw control characters in JSON are escaped; the value stays the same.
    assert json.loads(printable_ascii(within), strict=False) == {"a": text}


@pytest.mark.parametrize(
    ("printed", "answered"),
    [
        ("", ""),
        ("  ok \r\n", "ok"),
        ('{"status": "Success", "message": [1]}\n', '{"status": "Success", "message": [1]}'),
        ('{"state": "failed"}', '{"state": "failed"}'),
        ('[{"status": "failed"}]', '[{"status": "failed"}]'),
        ('{"status": ""}', '{"status": ""}'),
        ("[" * 10_000, "[" * 10_000),
        ("\x1b[31mred\x07", "\\u001b[31mred\\u0007"),
        ("\U0001f600", "\\ud83d\\ude00"),
    ],
)
def test_the_output_of_a_hook_is_returned(printed: str, answered: str) -> None:
    assert hook_output("x", printed) == answered


@pytest.mark.parametrize("status", ['"failed"', '"SUCCES"', "0", "true", "{}", "[1]"])
def test_any_status_but_success_is_a_failure(status: str) -> None:
    with pytest.raises(HostRefused, match="^hook x says status .*: because of y$"):
        hook_output("x", f'{{"status": {status}, "message": "because\\nof y"}}')


@given(st.lists(st.text("ab", max_size=30), max_size=30), st.integers(0, 300))
def test_truncated_output_states_the_number_of_omitted_lines(lines: list[str], limit: int) -> None:
    shown = truncated(lines, limit).split("\n") if lines else []
    if shown != lines:
        left_out = int(shown[-1].split()[1])
        assert left_out > 0
        assert shown[:-1] == lines[: len(lines) - left_out]
        assert sum(len(it) + 1 for it in shown[:-1]) <= limit


@given(st.lists(st.lists(st.text("ab", max_size=30), max_size=20), max_size=6), st.integers(0, 2000))
def test_a_long_section_does_not_truncate_a_short_one(sections: list[list[str]], limit: int) -> None:
    told = as_sections([(f"== {at}", lines) for at, lines in enumerate(sections)], limit)
    assert len(told) <= limit + len(sections) * 60
    share = limit // len(sections) if sections else 0
    for lines in sections:
        body = "\n".join(f"  {it}" for it in lines)
        if len(body) < share:
            assert body in told


def test_lists_can_be_filtered_and_paged() -> None:
    lines = [f"line {at:04} {'x' * 90}" for at in range(1000)]
    assert page_of(lines, {"filter": "line 0999"}, none="-") == lines[999]
    assert page_of(lines, {"filter": "nobody", "verbose": "true"}, none="-") == "-"
    shown: list[str] = []
    while True:
        page = page_of(lines, {"skip": str(len(shown))}, none="-").split("\n")
        assert sum(len(it) + 1 for it in page) <= OUTPUT_CHARACTERS_MAX + 200
        if not page[-1].startswith("..."):
            break
        shown += page[:-1]
    assert shown + page == lines
    with pytest.raises(BadRequest, match=r"^payload\.action-params\.skip: "):
        page_of(lines, {"skip": "-1"}, none="-")


# ---------------------------------------------------------------------------------------------------- a scope in words


def rule(at: int, direction: Literal["ingress", "egress"], **fields: object) -> FirewallRule:
    return FirewallRule(**{"rule_id": at, "direction": direction, "protocol": "tcp", **fields})  # type: ignore[arg-type]


def scope(*rules: FirewallRule) -> Scope:
    network = Network(
        network_id="204",
        implemented=True,
        vlan="1204",
        cidr="10.10.1.0/24",
        gateway="10.10.1.1",
        firewall=Firewall(default_egress_allow=True, rules=rules) if rules else None,
    )
    public = PublicIp(
        address="203.0.113.20", vlan="101", gateway="203.0.113.1", cidr="203.0.113.0/24", exit=1, source_nat=True
    )
    return Scope(
        scope_id="net-204",
        owner="zone1",
        networks={"204": network},
        public_ips={public.address: public},
    )


def test_a_network_without_rules_shows_the_defaults() -> None:
    assert describe.firewall(scope()) == [
        "ingress of network 204: deny (no firewall rules received yet)",
        "egress of network 204: allow (no firewall rules received yet)",
        "source-nat 10.10.1.0/24 leaves as 203.0.113.20",
    ]
    assert describe.firewall(replace(scope(), ingress_open=True))[0].startswith("ingress any: allow")


def test_rules_are_described() -> None:
    whole = scope(
        rule(1, "ingress", ports=Ports(443, 443), public_ip="203.0.113.20", source_cidrs=("0.0.0.0/0",)),
        rule(2, "ingress", ports=Ports(22, 22), public_ip="203.0.113.20", source_cidrs=("0.0.0.0/0",)),
        rule(3, "ingress", ports=None, public_ip="203.0.113.20", source_cidrs=("192.0.2.0/24",)),
        rule(4, "ingress", ports=Ports(1, 2), public_ip="203.0.113.99"),
        rule(5, "ingress", protocol="icmp", icmp_type=8, icmp_code=0, public_ip="203.0.113.20"),
        rule(
            6, "egress", protocol="udp", ports=Ports(53, 54), source_cidrs=("10.10.1.0/24",), dest_cidrs=("9.9.9.9/32",)
        ),
        rule(7, "egress", protocol="all"),
        rule(8, "egress", protocol="icmp", icmp_type=-1, icmp_code=-1),
    )
    whole = replace(
        whole,
        static_nats={"203.0.113.99": StaticNat(public_ip="203.0.113.99", private_ip="10.10.1.4", network_id="204")},
        port_forwards={
            "k": PortForward(
                public_ip="203.0.113.20",
                protocol="tcp",
                public_ports=Ports(80, 81),
                private_ip="10.10.1.5",
                private_ports=Ports(8080, 8081),
                network_id="204",
            )
        },
        lb_rules={
            "9": LbRule(
                rule_id=9,
                public_ip="203.0.113.20",
                public_port=99,
                protocol="tcp",
                algorithm="source",
                backends=(Backend(ip="10.10.1.7", port=1), Backend(ip="10.10.1.6", port=1)),
            )
        },
    )
    unless = " (not in force: the address or the network is not active)"
    assert describe.firewall(whole) == [
        "ingress 203.0.113.20 icmp type 8 code 0 from any: allow",
        "ingress 203.0.113.20 tcp any from 192.0.2.0/24: allow",
        "ingress 203.0.113.20 tcp 22,443 from 0.0.0.0/0: allow",
        f"ingress 203.0.113.99 tcp 1-2 from any: allow{unless}",
        "ingress anything else: deny",
        "egress all from any to any: deny",
        "egress icmp from any to any: deny",
        "egress udp 53-54 from 10.10.1.0/24 to 9.9.9.9/32: deny",
        "egress of network 204, anything else: allow",
        "source-nat 10.10.1.0/24 leaves as 203.0.113.20",
        f"static-nat 203.0.113.99 <-> 10.10.1.4{unless}",
        "port-forward 203.0.113.20 tcp 80-81 -> 10.10.1.5 8080-8081",
        "load-balancing 203.0.113.20 tcp 99 source -> 10.10.1.6:1, 10.10.1.7:1",
    ]
    gone = replace(whole, networks={"204": replace(whole.networks["204"], implemented=False)})
    assert all(it.endswith(unless) for it in describe.firewall(gone) if it.startswith(("ingress 2", "static", "port")))


def test_exactly_the_services_of_a_nic_are_described() -> None:
    nic = Nic(mac="02:01:00:cc:00:03", ip="10.10.1.45", hostname="web-1", leased=True, named=True)
    base = scope()

    def told(nic: Nic, **of_network: bool) -> str:
        network = replace(base.networks["204"], nics={nic.key: nic}, **{"dhcp": True, "dns": True, **of_network})
        (line,) = describe.leases(replace(base, networks={"204": network}))
        return line.rpartition(": ")[2]

    assert told(nic) == "default, lease, names"
    assert told(nic, dhcp=False, dns=False) == told(nic, implemented=False) == "default"
    assert told(replace(nic, ip="192.0.2.45")) == "default, names"  # outside the subnet: no lease
    assert told(replace(nic, default=False, leased=False, hostname="")) == "secondary"


@given(st.text("0123456789abcdef", min_size=12, max_size=60))
def test_descriptions_contain_no_secrets(secret: str) -> None:
    nic = Nic(
        mac="02:01:00:cc:00:03",
        ip="10.10.1.45",
        hostname="web-1",
        user_data=Secret(secret),
        password=Secret(secret),
        metadata={"instance-id": "i-1", "tenants-own": secret, "public-keys": secret},
    )
    base = scope()
    whole = replace(base, networks={"204": replace(base.networks["204"], nics={nic.key: nic})})
    told = "\n".join(
        describe.state(whole) + describe.leases(whole) + describe.summary(whole) + describe.firewall(whole)
    )
    assert secret not in told
    assert f'"tenants-own": "({len(secret)} bytes)"' in told
    assert '"password": "***"' in told
    assert '"instance-id": "i-1"' in told
    assert "password waiting" in told


@pytest.mark.mutation("escapes-count-as-printed", instead="len(output) <= _PRINTED_CHARACTERS_MAX")
@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b]0;x\x07\x1b[2J\u202egnp.exe\n" + "x" * 500_000,
        "\U0001f4a3" * 90_000,  # each becomes 12 characters
        "\x00" * 20_000,
        "\r" * 1_000_000,
        "\x9b2J\u2028" * 50_000,
    ],
)
def test_the_output_of_a_host_is_printable_and_bounded(hostile: str) -> None:
    printed = bounded_output(hostile)
    assert printed.isascii()
    assert printed.replace("\n", "").isprintable()
    assert len(printed) < 48_100
    assert printed.endswith("cut here, after 48000 characters")


def test_the_longest_output_of_an_action_is_not_cut() -> None:
    assert bounded_output(success_json('"' * 48_000)) == success_json('"' * 48_000)
