"""The row of a power cut: an agent builds all networks of an empty host, beside a bare loop of the same changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.rows import Measured, Pair, Run, timed_ms
from kernel.agent_host import LOG, AgentHost, Client, done, wait_until

HERE = Path(__file__).resolve().parent
STATES = "/var/lib/netloom"
PORTS_OF_A_BRIDGE = 250  # the kernel allows 1,024
VLANS = 4
ROUNDS = 2
BUILD_S_MAX = 1800.0
REFUSED_MAX = 0.01  # errors per change: it would not be the same work


def rebuild(run: Run) -> Iterator[Measured]:
    """Networks with a public address, and without guest services: those are processes, which no replay starts."""
    count = min(run.networks, PORTS_OF_A_BRIDGE * VLANS)
    with tempfile.TemporaryDirectory() as folder:
        states, recorded = Path(folder, "states"), Path(folder, "record")
        run.say(f"{count} networks")
        with host() as built:
            built.start()
            with built.client() as client:
                make(client, count)
            built.kill()
            shutil.copytree(built.path(STATES), states)
        run.say("recording")
        with host() as recording:
            start(recording, states, recorded)
        pairs: list[Pair] = []
        for _ in range(ROUNDS):
            run.say(f"{count} networks after a power cut")
            with host() as ours:
                took_s = start(ours, states) / 1000
            with host() as theirs:
                file = theirs.path("/run/record")
                shutil.copy(recorded, file)
                said = theirs.run(sys.executable, str(HERE / "replay.py"), "/run/record", timeout_s=BUILD_S_MAX).split()
                have = theirs.run("ip", "netns", "list").count("\n")
            if have != count:
                raise AssertionError(f"the replay made {have} namespaces instead of {count}")
            if float(said[1]) > REFUSED_MAX * float(said[2]):
                raise AssertionError(f"{said[1]} errors in {said[2]} changes of the replay")
            pairs.append((took_s, float(said[0])))
        yield "rebuild", pairs


@contextmanager
def host() -> Iterator[AgentHost]:
    """Another host each time: the kernel counts the indexes of links from the same number on."""
    vlans = [f"eth1.{1377 + at}" for at in range(VLANS)] + [f"eth2.{101 + at}" for at in range(VLANS)]
    made = AgentHost(vlans, lives_s=7200)
    try:
        yield made
    finally:
        made.close()


def make(client: Client, count: int) -> None:
    """Build the networks."""
    for at in range(count):
        vlan = at % VLANS
        fields = {
            "network_id": str(3000 + at),
            "vlan": str(1377 + vlan),
            "cidr": "10.20.1.0/24",
            "gateway": "10.20.1.1",
        }
        public = {
            "public_vlan": str(101 + vlan),
            "public_cidr": f"198.{51 + vlan}.0.0/16",
            "public_gateway": f"198.{51 + vlan}.255.254",
        }
        address = f"198.{51 + vlan}.{at // 250}.{at % 250 + 1}"
        done(client.call("020", "implement-network", **fields, extension_ip="10.20.1.1"))
        done(client.call("021", "assign-ip", **fields, **public, public_ip=address))


def start(it: AgentHost, states: Path, record: Path | None = None) -> float:
    """Start an agent on a host that has these states; the time until it has built all networks, in ms."""
    shutil.copytree(states, it.path(STATES), dirs_exist_ok=True)
    if record is None:
        return timed_ms(it.start)
    where = it.path("/run/record")
    program = [sys.executable, str(HERE / "recorded_agent.py"), "agent", "serve", "--log", LOG]
    it.agent = subprocess.Popen(
        ["nsenter", "-t", str(it.pid), "-n", "-m", "--", *program],
        stdin=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": os.environ["PATH"], "RECORD": "/run/record"},
    )
    took = timed_ms(lambda: wait_until(lambda: " restored" in it.log(), BUILD_S_MAX))
    it.kill()
    shutil.copy(where, record)
    return took
