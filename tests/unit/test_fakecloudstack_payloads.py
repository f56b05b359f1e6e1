"""The payloads of the fake CloudStack equal those of the real client (tests/payloads), byte for byte."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bed import payloads as cs
from bed.payloads import Backend, FirewallRule, LoadBalancerRule, NetworkFacts, PortForwardRule, PublicAddress
from unit.recorded_calls import FAKE_KEY, KEY, USER_DATA, WEB, WEB_VM, nic, uuid

FIXTURES = Path(__file__).resolve().parents[1] / "payloads"

REGISTRATION = {
    "hosts": "192.0.2.11, 192.0.2.12",
    "username": "root",
    "guest.network.device": "eth1",
    "port": "22",
    "sshkey": KEY,
    "public.network.device": "eth2",
    "physicalnetworkname": "Physical Network 1",
}
BY_PASSWORD = {
    "hosts": "192.0.2.11,192.0.2.12",
    "username": "netadmin",
    "password": "FAKE-<pw>&'=\"\\$x",
    "physicalnetworkname": "Physical Network 1",
}
STORED = '{"host":"192.0.2.11","namespace":"cs-net-204"}'

NET = NetworkFacts("204", "10.10.1.0/24", "10.10.1.1", vlan="1204", state="implemented")
STARTING = dataclasses.replace(NET, state="implementing")
STOPPING = dataclasses.replace(NET, state="shutdown")
SHUT = dataclasses.replace(NET, state="allocated", vlan="")
AGAIN = dataclasses.replace(STARTING, vlan="1377")
DENYING = cs.Offering.of(*cs.ALL_SERVICES.services, default_egress_allow=False)

SNAT = PublicAddress("203.0.113.20", "vlan://101", "203.0.113.1", "203.0.113.0/24", source_nat=True)
SECOND = PublicAddress("203.0.113.21", "vlan://101", "203.0.113.1", "203.0.113.0/24")
THIRD = PublicAddress("203.0.113.22", "vlan://101", "203.0.113.1", "203.0.113.0/24")
UNTAGGED = PublicAddress("198.51.100.20", "vlan://untagged", "198.51.100.1", "198.51.100.0/24")


PLAIN_VM = dataclasses.replace(WEB_VM, user_data="", public_key="")
MOVED_VM = dataclasses.replace(WEB_VM, hypervisor="kvm-07.example.org")
WIN_VM = cs.VirtualMachine(
    "win-db-1",
    uuid(32),
    service_offering="Größe M",
    zone="Zürich 1",
    user_data='<powershell>\r\nWrite-Output "héllo"\r\n</powershell>\r\n',
    parameters={"db_name": "orders", "tier": "gold"},
    hypervisor="kvm-07.example.org",
    domain="ROOT",
    domain_uuid="6f000000-0000-4000-8000-000000000001",
    cloud_name="Example Cloud",
    windows=True,
)
WIN_PLAIN_VM = cs.VirtualMachine("win-db-1", uuid(32))
DUAL_VM = cs.VirtualMachine("dual-1", uuid(33), public_key=f"{FAKE_KEY} user@example.org")


WEB_PLAIN = dataclasses.replace(WEB, vm=PLAIN_VM)
WEB_MOVED = dataclasses.replace(WEB, vm=MOVED_VM)
WIN = nic(5102, "02:01:00:cc:00:04", "10.10.1.162", WIN_VM)
WIN_PLAIN = dataclasses.replace(WIN, vm=WIN_PLAIN_VM)
DUAL = nic(5103, "02:01:00:cc:00:05", "10.10.1.77", DUAL_VM, device_id=1)

SSH = PortForwardRule(1, SECOND, "2222", "10.10.1.45", "22", "tcp")
RANGE = PortForwardRule(2, SECOND, "8080-8090", "10.10.1.45", "8080-8090", "tcp")
DNS = PortForwardRule(3, SNAT, "53", "10.10.1.162", "53", "udp")

ANY = ("0.0.0.0/0",)
GUESTS = ("10.10.1.0/24",)
INGRESS = [
    FirewallRule(901, "tcp", SECOND, 2222, 2222, source_cidrs=ANY),
    FirewallRule(902, "tcp", SECOND, 8080, 8090, source_cidrs=("198.51.100.0/24", "192.0.2.0/24")),
    FirewallRule(903, "icmp", THIRD, icmp_type=8, icmp_code=0, source_cidrs=ANY),
    FirewallRule(904, "icmp", SNAT, icmp_type=-1, icmp_code=-1, source_cidrs=ANY),
    FirewallRule(905, "udp", SNAT, 53, 53, source_cidrs=ANY),
]
FORBIDDEN = [
    FirewallRule(906, "tcp", None, 25, 25, source_cidrs=GUESTS, dest_cidrs=ANY),
    FirewallRule(907, "icmp", None, icmp_type=-1, icmp_code=-1, source_cidrs=GUESTS, dest_cidrs=("198.51.100.0/24",)),
    FirewallRule(908, "all", None, source_cidrs=("10.10.1.128/25",), dest_cidrs=ANY),
]
ALLOWED = [FirewallRule(909, "tcp", None, 443, 443, source_cidrs=GUESTS, dest_cidrs=ANY)]

BOTH = [Backend("10.10.1.45", 8080), Backend("10.10.1.162", 8080)]
LB = LoadBalancerRule(951, "lb-web", SECOND, 80, 8080, backends=BOTH)
API = LoadBalancerRule(952, 'lb "api" & <v1>', SECOND, 443, 8443, "source", backends=[Backend("10.10.1.45", 8443)])
PROXY = LoadBalancerRule(953, "lb-proxy", SECOND, 25, 2525, backends=[Backend("10.10.1.45", 2525)])


def lb(**changes: object) -> cs.Fields:
    return cs.lb_rules(NET, [dataclasses.replace(LB, **changes)])  # type: ignore[arg-type]


def with_services(network_id: str, cidr: str, *services: str, reserved: str = "") -> NetworkFacts:
    gateway = cs.first_address(cidr)
    vlan = f"1{network_id}"
    offering = cs.Offering.of(*services)
    return NetworkFacts(
        network_id, cidr, gateway, vlan=vlan, state="implementing", offering=offering, reserved_ip=reserved
    )


ROWS: dict[str, Callable[[], cs.Fields]] = {
    "010-isolated-ensure-first": lambda: cs.ensure_network_device(STARTING, "{}"),
    "011-isolated-ensure-again-implementing": lambda: cs.ensure_network_device(STARTING, STORED),
    "012-isolated-ensure-implemented": lambda: cs.ensure_network_device(NET, STORED),
    "013-isolated-ensure-after-earlier-failure": lambda: cs.ensure_network_device(STARTING, "{}"),
    "014-isolated-ensure-password-auth": lambda: cs.ensure_network_device(STARTING, "{}"),
    "020-isolated-implement-network": lambda: cs.implement_network(STARTING),
    "021-isolated-assign-ip-source-nat-implementing": lambda: cs.public_ip(STARTING, SNAT),
    "022-isolated-apply-fw-rules-empty-egress-allow": lambda: cs.fw_rules(STARTING, []),
    "023-isolated-apply-fw-rules-empty-egress-deny": lambda: cs.fw_rules(
        dataclasses.replace(STARTING, offering=DENYING), []
    ),
    "024-isolated-restore-network-first-implement": lambda: cs.restore_network(STARTING, [WEB], {}),
    "030-isolated-prepare-nic": lambda: cs.prepare_nic(NET, WEB),
    "031-isolated-config-dhcp-subnet": lambda: cs.config_subnet(NET, WEB),
    "032-isolated-add-dhcp-entry": lambda: cs.add_dhcp_entry(NET, WEB),
    "033-isolated-config-dns-subnet": lambda: cs.config_subnet(NET, WEB),
    "034-isolated-add-dns-entry": lambda: cs.add_dns_entry(NET, WEB),
    "035-isolated-save-vm-data-first-start": lambda: cs.save_vm_data(NET, WEB, password="FAKE-pass-4711"),
    "036-isolated-save-vm-data-later-start": lambda: cs.save_vm_data(NET, WEB),
    "037-isolated-save-vm-data-minimal": lambda: cs.save_vm_data(NET, WEB_PLAIN),
    "038-isolated-save-vm-data-windows-all": lambda: cs.save_vm_data(
        NET, WIN, static_nat_ip="203.0.113.22", password="FAKE-Win&<9>"
    ),
    "039-isolated-prepare-nic-second-nic": lambda: cs.prepare_nic(NET, DUAL),
    "040-isolated-add-dhcp-entry-second-nic": lambda: cs.add_dhcp_entry(NET, DUAL),
    "041-isolated-prepare-nic-second-vm": lambda: cs.prepare_nic(NET, WIN),
    "050-isolated-assign-ip-second": lambda: cs.public_ip(NET, SECOND),
    "051-isolated-assign-ip-source-nat-implemented": lambda: cs.public_ip(NET, SNAT),
    "052-isolated-assign-ip-untagged-public": lambda: cs.public_ip(NET, UNTAGGED),
    "053-isolated-add-port-forward-single": lambda: cs.port_forward(NET, SSH),
    "054-isolated-add-port-forward-range": lambda: cs.port_forward(NET, RANGE),
    "055-isolated-add-port-forward-on-source-nat-ip": lambda: cs.port_forward(NET, DNS),
    "056-isolated-delete-port-forward": lambda: cs.port_forward(NET, SSH),
    "057-isolated-assign-ip-static-nat": lambda: cs.public_ip(NET, THIRD),
    "058-isolated-add-static-nat": lambda: cs.static_nat(NET, THIRD, "10.10.1.162"),
    "059-isolated-delete-static-nat": lambda: cs.static_nat(NET, THIRD, "10.10.1.162"),
    "060-isolated-release-ip-second": lambda: cs.public_ip(NET, SECOND),
    "070-isolated-apply-fw-rules-full-egress-allow": lambda: cs.fw_rules(NET, INGRESS + FORBIDDEN),
    "071-isolated-apply-fw-rules-full-egress-deny": lambda: cs.fw_rules(
        dataclasses.replace(NET, offering=DENYING), INGRESS + ALLOWED
    ),
    "072-isolated-apply-fw-rules-last-rule-deleted": lambda: cs.fw_rules(NET, []),
    "073-isolated-apply-fw-rules-empty-cidrs-uppercase": lambda: cs.fw_rules(
        NET, [FirewallRule(906, "TCP", None, 25, 25)]
    ),
    "080-isolated-apply-lb-rules-add": lb,
    "081-isolated-apply-lb-rules-no-backends": lambda: lb(backends=[]),
    "082-isolated-apply-lb-rules-revoked-backend": lambda: lb(
        algorithm="leastconn", backends=[Backend("10.10.1.45", 8080), Backend("10.10.1.162", 8080, revoked=True)]
    ),
    "083-isolated-apply-lb-rules-revoked-rule": lambda: lb(
        algorithm="leastconn", revoke=True, backends=[Backend("10.10.1.45", 8080, revoked=True)]
    ),
    "084-isolated-apply-lb-rules-restart-all": lambda: cs.lb_rules(STARTING, [LB, API]),
    "085-isolated-apply-lb-rules-tcp-proxy-as-sent": lambda: cs.lb_rules(NET, [PROXY]),
    "086-isolated-apply-lb-rules-tcp-proxy-as-documented": lambda: cs.lb_rules(
        NET, [dataclasses.replace(PROXY, protocol="tcp-proxy")]
    ),
    "090-isolated-save-password": lambda: cs.save_item(NET, WEB, "password", 'FAKE-new-pass "9" <&>\'='),
    "091-isolated-save-userdata": lambda: cs.save_item(NET, WEB, "userdata", USER_DATA),
    "092-isolated-save-sshkey": lambda: cs.save_item(
        NET, WEB, "sshkey", f"{FAKE_KEY} user@example.org\n{FAKE_KEY} second@example.org"
    ),
    "093-isolated-save-hypervisor-hostname": lambda: cs.save_item(
        NET, WEB, "hypervisor_hostname", "kvm-08.example.org"
    ),
    "100-isolated-release-nic": lambda: cs.release_nic(NET, WEB),
    "101-isolated-remove-dhcp-entry": lambda: cs.remove_dhcp_entry(NET, WEB),
    "102-isolated-remove-dns-entry": lambda: cs.remove_dns_entry(NET, WEB),
    "103-isolated-release-nic-network-shut": lambda: cs.release_nic(SHUT, WEB),
    "104-isolated-remove-dhcp-entry-network-shut": lambda: cs.remove_dhcp_entry(SHUT, WEB),
    "110-isolated-restore-network": lambda: cs.restore_network(
        NET, [WEB_MOVED, WIN_PLAIN, DUAL], {"10.10.1.162": "203.0.113.22"}
    ),
    "111-isolated-restore-network-no-userdata": lambda: cs.restore_network(
        dataclasses.replace(NET, offering=cs.Offering.of("SourceNat", "Dhcp", "Dns")), [WEB], {}
    ),
    "120-isolated-ensure-shutdown": lambda: cs.ensure_network_device(STOPPING, STORED),
    "121-isolated-delete-port-forward-shutdown": lambda: cs.port_forward(STOPPING, RANGE),
    "122-isolated-apply-lb-rules-shutdown": lambda: cs.lb_rules(STOPPING, [dataclasses.replace(LB, revoke=True)]),
    "123-isolated-apply-fw-rules-shutdown": lambda: cs.fw_rules(STOPPING, INGRESS + FORBIDDEN),
    "124-isolated-delete-static-nat-shutdown": lambda: cs.static_nat(STOPPING, THIRD, "10.10.1.162"),
    "125-isolated-release-ip-source-nat-shutdown": lambda: cs.public_ip(STOPPING, SNAT),
    "126-isolated-shutdown-network": lambda: cs.bare(STOPPING),
    "127-isolated-shutdown-network-restart-cleanup": lambda: cs.bare(NET),
    "128-isolated-shutdown-network-after-failed-implement": lambda: cs.bare(STOPPING),
    "130-isolated-ensure-before-destroy": lambda: cs.ensure_network_device(SHUT, "{}"),
    "131-isolated-destroy-network": lambda: cs.bare(SHUT),
    "132-isolated-destroy-network-never-implemented": lambda: cs.bare(SHUT),
    "135-isolated-ensure-second-life": lambda: cs.ensure_network_device(AGAIN, "{}"),
    "136-isolated-implement-network-second-life": lambda: cs.implement_network(AGAIN),
    "137-isolated-implement-network-restart": lambda: cs.implement_network(NET),
    "138-isolated-implement-network-after-failover": lambda: cs.implement_network(NET),
    "139-isolated-prepare-nic-after-failover": lambda: cs.prepare_nic(NET, WEB),
    "140-dhcponly-implement-network": lambda: cs.implement_network(
        with_services("205", "10.11.1.0/24", "Dhcp", "Dns", "UserData", reserved="10.11.1.7")
    ),
    "141-natonly-implement-network-no-extension-ip": lambda: cs.implement_network(
        with_services("206", "10.12.1.0/24", "Lb", reserved="10.12.1.7")
    ),
}


def fixture_names() -> list[str]:
    """Every payload file of an isolated network."""
    return sorted(path.stem for path in FIXTURES.glob("[01]*.json"))


@pytest.mark.parametrize("name", fixture_names())
def test_payloads_match_the_clients_byte_for_byte(name: str) -> None:
    expected = (FIXTURES / f"{name}.json").read_text(encoding="utf-8")
    details = json.loads(expected)["network-extension-details"]
    registration = BY_PASSWORD if "password-auth" in name else REGISTRATION
    written = cs.envelope(registration, details, ROWS[name]())
    # Compare the parsed texts first, because pytest then shows the differing key.
    assert json.loads(written) == json.loads(expected)
    assert written == expected


@pytest.mark.parametrize(
    ("name", "network", "stored", "action", "params"),
    [
        (
            "500-custom-action-network",
            NET,
            STORED,
            "pbr-add-route",
            {"table-id": "101", "route": "default via 192.0.2.1 dev eth0"},
        ),
        ("501-custom-action-network-no-params", NET, STORED, "reboot-device", {}),
        ("504-custom-action-nothing-stored", SHUT, "{}", "dump-config", {}),
    ],
)
def test_custom_actions_match_the_clients_byte_for_byte(
    name: str, network: cs.NetworkFacts, stored: str, action: str, params: dict[str, str]
) -> None:
    written = cs.custom_action(REGISTRATION, json.loads(stored), cs.network(network), action, params)
    assert written == (FIXTURES / f"{name}.json").read_text(encoding="utf-8")


def test_every_fixture_has_a_row_and_every_row_a_fixture() -> None:
    assert fixture_names() == sorted(ROWS)
