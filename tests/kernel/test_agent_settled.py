"""A call does not look at what nobody has touched, and repairs what somebody has changed since the last one."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from kernel.agent_host import NO_CHECKS, AgentHost, Client, agent_host, done, make_call, steps
from kernel.isolated_network import DEPLOY, NS, WEB_IP, live, snapshot
from netloom.wire import Call, Reply

FORWARD = {"public_port": "2222", "private_port": "22"}
SYSCTL = "net.ipv4.conf.pub-101.rp_filter"


@pytest.fixture(scope="module")
def module_host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start(*NO_CHECKS)  # a check looks at everything
        live(it)
        with it.client() as client:
            for fixture, command in DEPLOY:
                done(client.call(fixture, command))
        yield it


def forwarded() -> Call:
    return make_call("053", "add-port-forward", **FORWARD)


def not_forwarded() -> Call:
    return make_call("056", "delete-port-forward", **FORWARD)


def send(client: Client, call: Call) -> None:
    client.send(call)
    reply = client.receive()
    assert isinstance(reply, Reply)
    done(reply)


def test_a_call_does_not_look_at_a_network_that_nobody_has_touched(module_host: AgentHost) -> None:
    host = module_host
    with host.client() as client:
        send(client, not_forwarded())
        good = snapshot(host)
        # The kernel does not report the change of a sysctl, so only a look finds it.
        host.run("sysctl", "-qw", f"{SYSCTL}=1", namespace=NS)
        send(client, forwarded())
        assert steps(host) == 1
        assert "2222" in host.run("nft", "list", "table", "inet", "netloom", namespace=NS)
        send(client, not_forwarded())
        assert steps(host) == 1
    host.run("sysctl", "-qw", f"{SYSCTL}=0", namespace=NS)
    assert snapshot(host) == good


@pytest.mark.parametrize(
    "harm",
    [
        ["ip", "link", "set", "vnetg204", "nomaster"],
        ["ip", "link", "set", "vnetg204", "down"],
        ["ip", "link", "del", "breth1-1204"],
        ["ip", "netns", "del", NS],
        ["ip", "-n", NS, "link", "del", "pub-101"],
        ["ip", "-n", NS, "addr", "del", "203.0.113.21/32", "dev", "pub-101"],
        ["ip", "-n", NS, "addr", "add", "203.0.113.99/32", "dev", "pub-101"],
        ["ip", "-n", NS, "route", "flush", "table", "20001"],
        ["ip", "-n", NS, "rule", "del", "priority", "20001"],
        ["ip", "-n", NS, "neigh", "del", WEB_IP, "dev", "gst-204"],
        ["ip", "netns", "exec", NS, "nft", "flush ruleset"],
        ["ip", "netns", "exec", NS, "nft", "insert rule inet netloom through accept"],
        ["ip", "netns", "exec", NS, "nft", "flush map inet netloom held"],
    ],
    ids=" ".join,
)
def test_a_call_repairs_what_somebody_changed_a_moment_ago(module_host: AgentHost, harm: list[str]) -> None:
    """The call comes at the same moment as the events, so it may be first."""
    host = module_host
    assert host.agent is not None
    with host.client() as client:
        send(client, forwarded())
        send(client, not_forwarded())
        good = snapshot(host)
        send(client, forwarded())
        host.agent.send_signal(signal.SIGSTOP)
        client.send(not_forwarded())
        host.run(*harm)
        host.agent.send_signal(signal.SIGCONT)
        reply = client.receive()
        assert isinstance(reply, Reply)
        done(reply)
        assert snapshot(host) == good
