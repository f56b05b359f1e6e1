"""A call does not look at a network that nobody has touched. test_agent_network.py tests what a call repairs."""

from __future__ import annotations

import re

from kernel.agent_host import NO_CHECKS, agent_host, done, steps, wait_until
from kernel.isolated_network import DEPLOY, NS, live, snapshot

FORWARD = {"public_port": "2222", "private_port": "22"}
SYSCTL = "net.ipv4.conf.pub-101.rp_filter"


def test_what_others_change_in_a_ruleset_is_repaired_without_a_call() -> None:
    """By the counts of transactions, which come more often than the checks."""
    with agent_host() as host:
        host.start("--check-every", "45")
        live(host)
        table = host.run("nft", "list", "table", "inet", "netloom", namespace=NS)
        chain, *_ = re.findall(r"chain (\S+) \{\s+type filter hook forward", table)
        good = host.run("nft", "list", "chain", "inet", "netloom", chain, namespace=NS)
        host.run("nft", "flush", "chain", "inet", "netloom", chain, namespace=NS)
        wait_until(lambda: host.run("nft", "list", "chain", "inet", "netloom", chain, namespace=NS) == good)
        assert "nftables changed: steps=1" in host.log()


def test_a_call_does_not_look_at_a_network_that_nobody_has_touched() -> None:
    with agent_host() as host:
        host.start(*NO_CHECKS)  # a check looks at everything
        live(host)
        with host.client() as client:
            for fixture, command in DEPLOY:
                done(client.call(fixture, command))
            done(client.call("056", "delete-port-forward", **FORWARD))
            good = snapshot(host)
            # The kernel does not report the change of a sysctl, so only a look finds it.
            host.run("sysctl", "-qw", f"{SYSCTL}=1", namespace=NS)
            done(client.call("053", "add-port-forward", **FORWARD))
            assert steps(host) == 1
            assert "2222" in host.run("nft", "list", "table", "inet", "netloom", namespace=NS)
            done(client.call("056", "delete-port-forward", **FORWARD))
            assert steps(host) == 1
        host.run("sysctl", "-qw", f"{SYSCTL}=0", namespace=NS)
        assert snapshot(host) == good
