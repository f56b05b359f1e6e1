"""Measure the CPU time of an agent while nothing happens. Needs root; nothing is asserted.

PYTHONPATH=internal:tests python tests/bench/idle.py [networks] [seconds]

Each network has a resolver (dnsmasq), ten VMs with leases and metadata, a public address, and its own VLAN. No frame
arrives on the host by itself, so the agent asks for signs of life in every other second: the most that it ever does.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kernel.agent_host import AgentHost, make_call
from load.accounts import guest_pid, service_pids
from load.cloud import FIRST_PUBLIC_VLAN, FIRST_VLAN, CloudNetwork
from load.hosts import Host

LIVES_S = 4 * 3600
SETTLED_S = 20.0  # after the last call: announcements, tidies, and the first neighbour entries
CALLERS = 3
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
        host.start()
        _build(
            host, [CloudNetwork(at, public_vlans, resolves=True, balances=False, where="h1") for at in range(networks)]
        )
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


def _build(host: AgentHost, networks: list[CloudNetwork]) -> None:
    """Create the networks over some connections. Raises AssertionError if a call fails."""
    waiting: queue.SimpleQueue[CloudNetwork] = queue.SimpleQueue()
    failed: list[str] = []
    for it in networks:
        waiting.put(it)

    def build_some() -> None:
        with host.client() as client, contextlib.suppress(queue.Empty):
            while not failed:
                network = waiting.get_nowait()
                network.renew()
                for fixture, command, changes in network.build():
                    client.send(make_call(fixture, command, **{**network.fields(), **changes}))
                    reply = client.receive()
                    if reply.status:  # type: ignore[union-attr]
                        failed.append(f"{network.scope_id} {command}: {reply.error}")  # type: ignore[union-attr]

    threads = [threading.Thread(target=build_some) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert waiting.empty(), "a caller ended"


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
