"""A scope with one network, one public address and load-balancer rules, for tests of dnsmasq's and haproxy's files."""

from __future__ import annotations

from netloom.state import Backend, LbRule, Network, Nic, PublicIp, Scope

NETWORK = Network(
    network_id="204",
    implemented=True,
    vlan="1204",
    cidr="10.10.1.0/24",
    gateway="10.10.1.1",
    extension_ip="10.10.1.1",
    dns=True,
    resolvers=("198.51.100.53", "198.51.100.54"),
    domain="cs2cloud.internal",
    nics={
        "u1": Nic(mac="02:01:00:cc:00:03", nic_uuid="u1", ip="10.10.1.45", hostname="web-1", named=True),
        "u2": Nic(mac="02:01:00:cc:00:04", nic_uuid="u2", ip="10.10.1.46", hostname="quiet"),
        "u3": Nic(mac="02:01:00:cc:00:05", nic_uuid="u3", ip="10.10.1.47", ip6="fd00::47", hostname="both", named=True),
    },
)
RULE = LbRule(
    rule_id=951,
    public_ip="203.0.113.21",
    public_port=80,
    protocol="tcp",
    algorithm="roundrobin",
    backends=(Backend(ip="10.10.1.162", port=8080), Backend(ip="10.10.1.45", port=8080)),
)
ADDRESS = PublicIp(address="203.0.113.21", vlan="101", gateway="203.0.113.1", cidr="203.0.113.0/24", exit=1)


def balanced_scope(*rules: LbRule) -> Scope:
    return Scope(
        scope_id="net-204",
        owner="test",
        networks={"204": NETWORK},
        public_ips={ADDRESS.address: ADDRESS},
        lb_rules={str(rule.rule_id): rule for rule in rules},
    )
