"""A supervisor with service directories of its own and a namespace with a guest link, for tests of real services."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import processes
from netloom.agent.processes import files, supervisor
from netloom.render import service
from netloom.state import Backend, LbRule, Network, Nic, PublicIp, Scope

NAMESPACE = "atest-supervise"
SCOPE = "net-9204"
NETWORK = Network(
    network_id="9204",
    gateway="10.10.1.1",
    domain="cloud.internal",
    dns=True,
    nics={"u1": Nic(mac="02:01:00:cc:00:03", nic_uuid="u1", ip="10.10.1.45", hostname="web-1", named=True)},
)
RULE = LbRule(
    rule_id=1,
    public_ip="10.10.1.1",
    public_port=8000,
    protocol="tcp",
    algorithm="roundrobin",
    backends=(Backend(ip="10.10.1.1", port=9000),),
)
BALANCED = Scope(
    scope_id=SCOPE,
    owner="test",
    public_ips={"10.10.1.1": PublicIp(address="10.10.1.1", vlan="1", gateway="", cidr="10.10.1.0/24", exit=1)},
    lb_rules={"1": RULE},
)


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A namespace with a veth pair as guest link, and service directories for this test."""
    tmp_path.chmod(0o755)
    top = Path("/run/netloom-atest-services")
    monkeypatch.setattr(service, "SERVICES_DIR", str(top))
    monkeypatch.setattr(files, "SERVICES_DIR", str(top))
    # A killed run may have left it.
    subprocess.run(["ip", "netns", "del", NAMESPACE], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    for words in (
        "link add gst-9204 type veth peer name other",
        "addr add 10.10.1.1/24 dev gst-9204",
        "link set gst-9204 up",
        "link set other up",
        "link set lo up",
    ):
        subprocess.run(["ip", "-n", NAMESPACE, *words.split()], check=True)
    yield
    # A failed test or a mutant may leave processes running.
    left = subprocess.run(["ip", "netns", "pids", NAMESPACE], check=True, capture_output=True, text=True)
    for pid in map(int, left.stdout.split()):
        processes.kill(pid)
    subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)
    subprocess.run(["rm", "-rf", str(top)], check=True)


@contextmanager
def running_supervisor() -> Iterator[tuple[supervisor.Supervisor, list[str], Callable[[Callable[[], bool]], None]]]:
    """A supervisor on its own event loop; ``wait_until`` runs the loop until a condition is true."""
    loop = asyncio.new_event_loop()
    died: list[str] = []

    def wait_until(so: Callable[[], bool]) -> None:
        async def wait() -> None:
            for _ in range(2000):
                if so():
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("the condition did not become true within 20 s")

        loop.run_until_complete(wait())

    it = supervisor.Supervisor(loop, lambda scope_id, why: died.append(why))
    wait_until(lambda: True)
    try:
        yield it, died, wait_until
    finally:
        it.stop(SCOPE)
        wait_until(lambda: True)
        loop.close()
