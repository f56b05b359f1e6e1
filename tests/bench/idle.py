"""Measure the CPU time of an agent while nothing happens. Needs root; nothing is asserted.

PYTHONPATH=internal:tests python tests/bench/idle.py [networks] [seconds]

Each network has a resolver (dnsmasq), ten VMs with leases and metadata, a public address, and its own VLAN. No frame
arrives on the host by itself, so the agent asks for signs of life in every other second: the most that it ever does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kernel.agent_host import REGISTRATION, AgentHost, make_call, wait_until
from load.accounts import STATES, guest_pid, service_pids
from load.cloud import FIRST_PUBLIC_VLAN, FIRST_VLAN, CloudNetwork
from load.hosts import Host
from netloom.agent.scopes.store import Store
from netloom.commands import table
from netloom.commands.transition import Context

LIVES_S = 4 * 3600
SETTLED_S = 20.0  # after the build: announcements, tidies, and the first neighbour entries
PER_PUBLIC_VLAN = 250


class Idle(msgspec.Struct, frozen=True):
    """The CPU time while nothing happened, as shares of one core. ``dnsmasq``: of all of them together."""

    networks: int
    seconds: float
    agent: float
    event_loop: float  # the main thread's part of the agent
    guest: float
    dnsmasq: float

    def row(self) -> str:
        """The figures in one line."""
        shares = {"agent": self.agent, "guest process": self.guest, "all dnsmasq": self.dnsmasq}
        listed = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        return f"{self.networks} networks, {self.seconds:.0f} s: {listed}; event loop {self.event_loop:.2%}"


@contextlib.contextmanager
def host_with(networks: int) -> Iterator[Host]:
    """A host whose agent has this many networks, and has settled."""
    public_vlans = -(-networks // PER_PUBLIC_VLAN)
    host = Host("h1", LIVES_S)
    try:
        _add_vlans(host, [f"eth1.{FIRST_VLAN + at}" for at in range(networks)])
        _add_vlans(host, [f"eth2.{FIRST_PUBLIC_VLAN + at}" for at in range(public_vlans)])
        _store(
            host, [CloudNetwork(at, public_vlans, resolves=True, balances=False, where="h1") for at in range(networks)]
        )
        host.begin()
        wait_until(lambda: " restored" in host.log(), 10 + 5 * networks)
        time.sleep(SETTLED_S)
        yield host
    finally:
        host.close()


def measure(host: Host, seconds: float = 60.0) -> Idle:
    """What the processes of the host use in so many seconds."""
    assert host.agent is not None
    agent, guest, resolvers = host.agent.pid, guest_pid(host), list(service_pids(host).values())
    before = _used_s(agent), _main_s(agent), _used_s(guest), sum(map(_main_s, resolvers))
    began = time.monotonic()
    time.sleep(seconds)
    after = _used_s(agent), _main_s(agent), _used_s(guest), sum(map(_main_s, resolvers))
    lasted = time.monotonic() - began
    shares = [(now - then) / lasted for then, now in zip(before, after, strict=True)]
    return Idle(len(resolvers), lasted, *shares)


def _add_vlans(host: AgentHost, names: list[str]) -> None:
    """Add links as ``AgentHost.add_vlan`` does, all at once."""
    host.run("sysctl", "-qw", "net/ipv6/conf/default/disable_ipv6=1")
    lines = [f"link add {it} type veth peer name sw-{it} netns {host.fabric}" for it in names]
    for pid, batch in ((host.pid, lines), (host.fabric, [f"link set sw-{it} up" for it in names])):
        with tempfile.NamedTemporaryFile("w", dir=host.path("/run")) as file:
            file.write("\n".join(batch) + "\n")
            file.flush()
            host.run("nsenter", "-t", str(pid), "-n", "ip", "-batch", f"/run/{Path(file.name).name}", timeout_s=600)
    host.run("sysctl", "-qw", "net/ipv6/conf/default/disable_ipv6=0")


def _store(host: AgentHost, networks: list[CloudNetwork]) -> None:
    """Write the states of the networks as calls would leave them: an agent builds them faster at its start."""
    store = Store(str(host.path(STATES)))
    for network in networks:
        network.renew()
        context, scope = Context(scope_id=network.scope_id, registration=REGISTRATION), None
        for fixture, command, changes in network.build():
            call = make_call(fixture, command, **{**network.fields(), **changes})
            scope = table.apply(command, scope, table.decode(command, call.payload), context).scope
        assert scope is not None
        store.save(scope)


def _used_s(pid: int) -> float:
    """The CPU time of a process, with its threads that have ended."""
    if not pid:
        return 0.0
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def _main_s(pid: int) -> float:
    """The CPU time of the first thread of a process, in nanoseconds' precision."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def main(networks: int, seconds: float) -> None:
    """Print the figures."""
    with host_with(networks) as host:
        sys.stdout.write(measure(host, seconds).row() + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, float(sys.argv[2]) if len(sys.argv) > 2 else 60.0)
