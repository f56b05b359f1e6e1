"""A network works although the host's own firewall drops forwarded packets, and that firewall stays as strict."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from kernel.agent_host import PROGRAM, AgentHost, act, agent_host, done, message, wait_until
from kernel.raw_frames import VM, VM_MAC
from netloom.wire import Reply

NOTHING_TO_DO = "nothing to do: all is as it should be"
BRIDGE, GATEWAY, VM_IP = "breth1-1204", "10.10.1.1", "10.10.1.45"

# As iptables-nft (Docker 20.10) and firewalld 1.3 make them, shortened.
DOCKER = """
table ip filter {
    chain DOCKER {
    }
    chain DOCKER-ISOLATION-STAGE-1 {
        iifname "docker0" oifname != "docker0" counter drop
        counter return
    }
    chain DOCKER-USER {
        counter return
    }
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        counter jump DOCKER-USER
        counter jump DOCKER-ISOLATION-STAGE-1
        oifname "docker0" ct state established,related counter accept
        oifname "docker0" counter jump DOCKER
        iifname "docker0" oifname != "docker0" counter accept
    }
}
table ip nat {
    chain POSTROUTING {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 10.10.1.0/24 oifname != "docker0" counter masquerade
    }
}
"""
FIREWALLD = """
table inet firewalld {
    chain filter_PREROUTING {
        type filter hook prerouting priority filter + 10; policy accept;
        icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
        meta nfproto ipv6 fib saddr . mark . iif oif missing drop
    }
    chain filter_FWD_public {
        jump filter_FWD_public_allow
    }
    chain filter_FWD_public_allow {
    }
    chain filter_FORWARD_POLICIES {
        iifname "eth0" oifname "eth0" jump filter_FWD_public
        iifname "eth0" oifname "eth0" reject with icmpx admin-prohibited
        jump filter_FWD_public
        reject with icmpx admin-prohibited
    }
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        jump filter_FORWARD_POLICIES
    }
}
"""
UFW = """
table ip filter {
    chain ufw-before-forward {
        ct state established,related counter accept
        icmp type destination-unreachable counter accept
    }
    chain ufw-reject-forward {
        counter reject
    }
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        counter jump ufw-before-forward
        counter jump ufw-reject-forward
    }
}
"""
NATIVE = """
table inet mine {
    set mine { type ifname; elements = { "eth0", "wg0" }; }
    chain forward {
        type filter hook forward priority -10; policy drop;
        iifname != @mine oifname @mine accept
        iifname "wg0" accept
    }
}
"""
BY_PROTOCOL = """
table inet mine {
    chain forward {
        type filter hook forward priority filter; policy accept;
        ct state vmap { established : accept, related : accept, invalid : drop }
        iifname { "eth0", "wg0" } accept
        meta l4proto tcp reject with tcp reset
        ip protocol icmp drop
        reject
    }
}
"""
TWICE = DOCKER + NATIVE
FIREWALLS = {
    "docker": DOCKER,
    "firewalld": FIREWALLD,
    "ufw": UFW,
    "native": NATIVE,
    "protocol": BY_PROTOCOL,
    "two": TWICE,
}


@pytest.fixture
def bare() -> Iterator[AgentHost]:
    """A host whose agent does not run."""
    with agent_host() as it:
        yield it


@pytest.fixture
def host(bare: AgentHost) -> AgentHost:
    bare.start()
    return bare


def load(host: AgentHost, rules: str) -> None:
    path = host.path("/run/rules.nft")
    path.write_text(rules)
    host.run("nft", "-f", "/run/rules.nft")


def answers(host: AgentHost) -> bool:
    """Whether the network's gateway answers the VM: a ping; ARP does not pass the firewall of IP."""
    return "1 received" in host.run("ping", "-c1", "-W1", GATEWAY, namespace=VM, check=False)


def rules(host: AgentHost) -> str:
    return host.run("nft", "-s", "list", "ruleset")


def build(host: AgentHost) -> Reply:
    """Network 204 with a VM; returns the reply to its command."""
    reply = done(host.call("020", "implement-network", vlan="1204"))
    host.plug(VM, BRIDGE, VM_MAC, f"{VM_IP}/24")
    return reply


def check(host: AgentHost) -> str:
    return message(act(host, "check", network_id="204"))


def routes(host: AgentHost) -> bool:
    """Whether the host forwards a packet between two machines that it routes for."""
    return "1 received" in host.run("ping", "-c1", "-W1", "192.0.2.130", namespace="left", check=False)


def add_routed_machines(host: AgentHost) -> None:
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    for name, first in (("left", 0), ("right", 128)):
        host.ip("netns", "add", name)
        host.ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        host.ip("addr", "add", f"192.0.2.{first + 1}/25", "dev", f"to-{name}")
        host.ip("link", "set", f"to-{name}", "up")
        host.ip("-n", name, "link", "set", "eth0", "up")
        host.ip("-n", name, "addr", "add", f"192.0.2.{first + 2}/25", "dev", "eth0")
        host.ip("-n", name, "route", "add", "default", "via", f"192.0.2.{first + 1}")


def test_the_firewall_of_the_host_drops_what_it_routes_as_before(host: AgentHost) -> None:
    add_routed_machines(host)
    wait_until(lambda: routes(host))
    load(host, DOCKER)
    build(host)
    wait_until(lambda: answers(host))
    assert not routes(host)


@pytest.mark.mutation("frames-pass-the-firewall-of-the-host")
@pytest.mark.parametrize("firewall", FIREWALLS)
def test_a_network_works_behind_a_firewall_that_drops_what_is_forwarded(host: AgentHost, firewall: str) -> None:
    load(host, FIREWALLS[firewall])
    before = rules(host)
    build(host)
    wait_until(lambda: answers(host))
    assert check(host) == NOTHING_TO_DO
    done(host.call("131", "destroy-network"))
    host.ip("link", "del", f"tap-{VM}")
    wait_until(lambda: rules(host) == before)


SELFTEST = f"""
import sys
sys.path[:] = {sys.path!r}
from netloom.agent.setup import bridge_test
print(*bridge_test.run(), sep="|")
"""


def selftest(host: AgentHost) -> list[str]:
    """The protocols that do not pass a bridge of the host, what is said of it, and the remedy."""
    return host.run(sys.executable, "-c", SELFTEST).strip().split("|")


def test_the_selftest_sends_packets_through_a_bridge_of_the_host(bare: AgentHost) -> None:
    """Without an agent, which would accept the frames of the test's bridge itself if it saw the new rules first."""
    load(bare, TWICE)
    before = rules(bare), sorted(bare.links())
    dropped, says, remedy = selftest(bare)
    assert (dropped, remedy) == ("()", "")
    assert says == (
        "dropped by table ip filter, chain FORWARD, policy drop; table inet mine, chain forward, policy drop; "
        "netloom accepts the frames of its own bridges there"
    )
    wait_until(lambda: (rules(bare), sorted(bare.links())) == before)
    bare.run("nft", "add", "rule", "inet", "mine", "forward", "udp", "dport", "9", "drop")
    dropped, says, _ = selftest(bare)
    assert dropped == "('IPv4', 'IPv6')"
    assert says.startswith("IPv4 and IPv6 on bridges is dropped: ")


def test_a_killed_selftest_leaves_nothing_behind(host: AgentHost) -> None:
    load(host, DOCKER)
    before = rules(host), sorted(host.links())
    with host.inside_host():
        tested = subprocess.Popen([sys.executable, "-c", SELFTEST], stdout=subprocess.DEVNULL)
    wait_until(lambda: any(it.startswith("nltest") for it in host.links()))
    tested.kill()
    tested.wait()
    wait_until(lambda: (rules(host), sorted(host.links())) == before)


def test_uninstall_leaves_the_firewall_as_it_was_although_a_vm_is_plugged_in(host: AgentHost) -> None:
    load(host, TWICE)
    before = [host.run("nft", "-s", "list", "table", *it) for it in (("ip", "filter"), ("inet", "mine"))]
    build(host)
    wait_until(lambda: answers(host))
    host.run(*PROGRAM, "uninstall", "--networks", "remove")
    assert [host.run("nft", "-s", "list", "table", *it) for it in (("ip", "filter"), ("inet", "mine"))] == before
    assert "netloom_untracked" not in rules(host)


@pytest.mark.mutation("the-host-does-not-translate-frames")
def test_nat_rules_of_the_host_do_not_change_frames(host: AgentHost) -> None:
    """The host would translate the VM to an address of its own; the bridge has none, so the packet would be lost."""
    load(host, DOCKER)
    build(host)
    wait_until(lambda: answers(host))


def test_a_bridge_that_the_firewall_names_is_left_to_its_owner(host: AgentHost) -> None:
    load(
        host,
        f"""
        table ip filter {{
            chain FORWARD {{
                type filter hook forward priority filter; policy accept;
                iifname "{BRIDGE}" counter drop
            }}
        }}
        """,
    )
    before = host.run("nft", "-s", "list", "table", "ip", "filter")
    note = build(host).note
    assert host.run("nft", "-s", "list", "table", "ip", "filter") == before
    assert not answers(host)
    reason = (
        f"the host's firewall drops IPv4 frames on {BRIDGE}: table ip filter, chain FORWARD: the rules there name the "
        f"bridge; iptables -I FORWARD -i {BRIDGE} -o {BRIDGE} -j ACCEPT"
    )
    assert note == reason
    assert done(host.call("020", "implement-network", vlan="1204")).note == ""
    assert check(host) == reason
    assert reason in message(act(host, "show", network_id="204"))
    assert host.log().count(f"scope=net-204 warning: {reason}") == 1


def make_bridge(host: AgentHost, name: str) -> None:
    host.ip("link", "add", name, "type", "bridge")
    host.ip("link", "set", "eth1.1204", "master", name, "up")
    host.ip("link", "set", name, "up")


# The rules in the firewall are those of the test with our own bridge, which tries each kind of firewall.
@pytest.mark.mutation("bridges-of-the-kvm-agent-are-let-through")
@pytest.mark.parametrize(
    "firewall", [it if it in ("docker", "firewalld") else pytest.param(it, marks=pytest.mark.long) for it in FIREWALLS]
)
def test_a_bridge_that_the_kvm_agent_made_is_let_through_like_ours(host: AgentHost, firewall: str) -> None:
    """The VM was there before the network, for example after a reboot."""
    load(host, FIREWALLS[firewall])
    before = rules(host)
    make_bridge(host, BRIDGE)
    assert build(host).note == ""
    wait_until(lambda: answers(host))
    wait_until(lambda: check(host) == NOTHING_TO_DO)  # the guard follows the VM's tap
    done(host.call("131", "destroy-network"))
    host.ip("link", "del", f"tap-{VM}")
    wait_until(lambda: rules(host) == before)


@pytest.mark.mutation("bridges-of-others-are-not-let-through")
def test_a_bridge_with_an_address_of_the_host_is_left_to_its_owner_until_he_consents(host: AgentHost) -> None:
    load(host, NATIVE)
    make_bridge(host, BRIDGE)
    host.ip("addr", "add", "10.10.1.200/24", "dev", BRIDGE)
    is_left_to_its_owner_until_he_consents(host, BRIDGE)


@pytest.mark.mutation("a-bridge-with-another-name-belongs-to-others")
def test_a_bridge_whose_name_is_not_that_of_one_network_is_left_to_its_owner_until_he_consents(host: AgentHost) -> None:
    load(host, NATIVE)
    make_bridge(host, "br-lan")
    is_left_to_its_owner_until_he_consents(host, "br-lan")


def is_left_to_its_owner_until_he_consents(host: AgentHost, bridge: str) -> None:
    """Behind ``NATIVE`` the frames of the network's bridge are dropped until the bridge has the alias."""
    before = host.run("nft", "-s", "list", "table", "inet", "mine")
    reason = (
        f"the host's firewall drops IPv4 and IPv6 frames on {bridge}: table inet mine, chain forward, policy drop: the "
        f"bridge belongs to somebody else; ip link set {bridge} alias netloom-accept lets netloom accept them"
    )
    reply = done(host.call("020", "implement-network", vlan="1204"))
    host.plug(VM, bridge, VM_MAC, f"{VM_IP}/24")
    assert reply.note == reason
    assert host.run("nft", "-s", "list", "table", "inet", "mine") == before
    wait_until(lambda: check(host) == reason)
    host.ip("link", "set", bridge, "alias", "netloom-accept")
    host.run("nft", "add", "table", "inet", "unrelated")  # the firewall is looked at now, or within 30 s
    wait_until(lambda: answers(host))
    assert check(host) == NOTHING_TO_DO
    assert "netloom_untracked" not in rules(host)
    host.ip("link", "set", bridge, "alias", "")
    host.run("nft", "delete", "table", "inet", "unrelated")
    wait_until(lambda: host.run("nft", "-s", "list", "table", "inet", "mine") == before)


def test_a_firewall_that_is_loaded_later_or_anew_is_followed(host: AgentHost) -> None:
    build(host)
    wait_until(lambda: answers(host))
    for firewall in (FIREWALLD, "flush ruleset\n" + TWICE):
        load(host, firewall)
        wait_until(lambda: "jump netloom" in rules(host), 10)  # the periodic check comes after 30 s
        wait_until(lambda: answers(host))


def test_a_table_that_only_its_owner_may_change_is_named(host: AgentHost) -> None:
    with host.inside_host(), subprocess.Popen(["nft", "-i"], stdin=subprocess.PIPE, text=True) as owner:
        assert owner.stdin is not None
        owner.stdin.write(
            "add table inet mine { flags owner; }; "
            "add chain inet mine forward { type filter hook forward priority 0; policy drop; }\n"
        )
        owner.stdin.flush()
        wait_until(lambda: "policy drop" in rules(host))
        load(host, DOCKER)
        build(host)
        assert "jump netloom" in host.run("nft", "list", "table", "ip", "filter")
        assert check(host) == (
            f"the host's firewall drops IPv4 and IPv6 frames on {BRIDGE}: table inet mine, chain forward, policy drop: "
            f"only its owner may change this table; accept it there: iifname {BRIDGE} oifname {BRIDGE} accept"
        )
        owner.stdin.close()


def test_without_bridge_netfilter_the_firewall_is_not_touched(host: AgentHost) -> None:
    for family in ("iptables", "ip6tables"):
        host.run("sysctl", "-qw", f"net.bridge.bridge-nf-call-{family}=0")
    load(host, TWICE)
    before = host.run("nft", "-s", "list", "table", "ip", "filter")
    build(host)
    wait_until(lambda: answers(host))
    assert host.run("nft", "-s", "list", "table", "ip", "filter") == before
    # One bridge of ours asks for it.
    host.ip("link", "set", BRIDGE, "type", "bridge", "nf_call_iptables", "1")
    host.run("nft", "add", "table", "ip", "another")  # an event, so that the agent looks at once
    wait_until(lambda: "jump netloom" in host.run("nft", "list", "table", "ip", "filter"))
