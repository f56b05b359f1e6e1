"""Payloads about VPC 7 and its two tiers, for random walks: each list is a pool that a walk draws from."""

from __future__ import annotations

from itertools import product
from typing import Any

ADDRESSES = ("203.0.113.2", "203.0.113.20", "203.0.113.21")
VPC = {"vpc_id": "7", "zone_id": "1", "vpc_state": "enabled", "vpc_cidr": "10.20.0.0/16"}
TIERS = [
    {
        "vpc_id": "7",
        "network_id": number,
        "vlan": f"1{number}",
        "gateway": f"10.20.{at}.1",
        "cidr": f"10.20.{at}.0/24",
        "guest_type": "isolated",
        "network_state": "implemented",
    }
    for at, number in ((1, "310"), (2, "311"))
]
PUBLIC = [
    {
        "public_ip": address,
        "public_vlan": vlan,
        "public_gateway": "203.0.113.1",
        "public_cidr": "203.0.113.0/24",
        "source_nat": source_nat,
    }
    for address, vlan, source_nat in product(ADDRESSES, ("vlan://101", "vlan://101", "102"), ("true", "false"))
]
WHOLE = [{**VPC, **it, "source_nat": "true"} for it in PUBLIC]
IN_TIER = [{**tier, **it} for tier, it in product(TIERS, PUBLIC)]
GUESTS = [{**it, "private_ip": it["gateway"][:-1] + last} for it, last in product(IN_TIER, ("45", "46"))]
FORWARDS = [
    {**it, "public_port": port, "private_port": "22", "protocol": "tcp"} for it, port in product(GUESTS, ("22", "80"))
]


def balanced(asked: dict[str, Any], port: int, name: str = "", *, revoke: bool = False) -> dict[str, Any]:
    rule = {
        "id": int(asked["network_id"]),
        "name": name,
        "publicIp": asked["public_ip"],
        "publicPort": 81,
        "privatePort": port,
        "protocol": "tcp",
        "algorithm": "roundrobin",
        "revoke": revoke,
        "backends": [{"ip": asked["private_ip"], "port": port, "revoked": False}],
    }
    return {**asked, "lb_rules": [rule]}


BALANCED = [
    *(balanced(it, port) for it, port in product(GUESTS, (80, 8080))),
    *(balanced(it, 80, "dns [udp]") for it in GUESTS),
    *(balanced(it, 80, revoke=True) for it in GUESTS),
]
ALLOW: dict[str, Any] = {"action": "allow", "trafficType": "ingress"}
LISTS: list[list[dict[str, Any]]] = [[], [{"protocol": "all"}], [{"protocol": "tcp", "portStart": 80}]]
ACLS = [{**tier, "acl_rules": [{"number": 1, **ALLOW, **it} for it in rules]} for tier, rules in product(TIERS, LISTS)]
