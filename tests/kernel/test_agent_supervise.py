"""Real dnsmasq and haproxy processes in a namespace, kept running by the agent's supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from netloom.agent import supervise
from netloom.agent.kernel.namespaces import inside
from netloom.errors import HostRefused
from netloom.render import dnsmasq, haproxy, service
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


@pytest.fixture(autouse=True)
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A namespace with the guest link's stand-in, and directories of the test's own."""
    tmp_path.chmod(0o755)
    top = Path("/run/netloom-atest-services")
    monkeypatch.setattr(service, "SERVICES_DIR", str(top))
    monkeypatch.setattr(supervise, "SERVICES_DIR", str(top))
    # A run that was killed may have left it.
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
    subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)
    subprocess.run(["rm", "-rf", str(top)], check=True)


@contextmanager
def _supervisor() -> Iterator[tuple[supervise.Supervisor, list[str], Callable[[Callable[[], bool]], None]]]:
    """A supervisor on a loop of its own; ``until`` runs the loop until something is so."""
    loop = asyncio.new_event_loop()
    died: list[str] = []

    def until(so: Callable[[], bool]) -> None:
        async def wait() -> None:
            for _ in range(500):
                if so():
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("it did not come to pass within 5 s")

        loop.run_until_complete(wait())

    it = supervise.Supervisor(loop, lambda scope_id, why: died.append(why))
    until(lambda: True)
    try:
        yield it, died, until
    finally:
        it.end(SCOPE)
        until(lambda: True)
        loop.close()


def _lookup(name: str) -> str:
    with inside(NAMESPACE):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(3)
        question = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
        sock.sendto(
            b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + question + b"\0\x00\x01\x00\x01", ("10.10.1.1", 53)
        )
        answer = sock.recv(512)
    return ".".join(map(str, answer[-4:])) if answer[7] else f"rcode {answer[3] & 15}"


def test_names_come_and_go_without_a_restart() -> None:
    with _supervisor() as (it, _, until):
        it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, NETWORK),))
        pid = it.states()[SCOPE]["dns-9204"]
        assert _lookup("web-1.cloud.internal") == "10.10.1.45"
        more = replace(
            NETWORK, nics={"u2": Nic(mac="02:01:00:cc:00:04", ip="10.10.1.46", hostname="web-2", named=True)}
        )
        did = it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, more),))
        assert did == ["write dns-9204/nic-u2", "remove dns-9204/nic-u1"]
        until(lambda: _lookup("web-2.cloud.internal") == "10.10.1.46")
        until(lambda: _lookup("web-1.cloud.internal") == "rcode 3")
        assert it.states()[SCOPE]["dns-9204"] == pid
        assert it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, more),)) == []


def test_a_killed_process_is_reported_and_started_again() -> None:
    with _supervisor() as (it, died, until):
        wanted = (dnsmasq.service(SCOPE, NETWORK),)
        it.converge(SCOPE, NAMESPACE, wanted)
        until(lambda: True)
        os.kill(it.states()[SCOPE]["dns-9204"], signal.SIGKILL)
        until(lambda: died == ["dns-9204 died"])
        assert it.converge(SCOPE, NAMESPACE, wanted) == ["start dns-9204"]
        assert _lookup("data-server.cloud.internal") == "10.10.1.1"


def test_another_supervisor_adopts_what_runs() -> None:
    with _supervisor() as (first, _, _until):
        wanted = (dnsmasq.service(SCOPE, NETWORK),)
        first.converge(SCOPE, NAMESPACE, wanted)
        with _supervisor() as (second, died, until):
            assert second.converge(SCOPE, NAMESPACE, wanted) == []
            assert second.states() == first.states()
            until(lambda: True)
            os.kill(second.states()[SCOPE]["dns-9204"], signal.SIGKILL)
            until(lambda: died == ["dns-9204 died"])


def test_defect_62_a_recycled_pid_is_not_taken_for_ours() -> None:
    with _supervisor() as (it, _, _until):
        wanted = dnsmasq.service(SCOPE, NETWORK)
        Path(wanted.directory).mkdir(parents=True)
        innocent = subprocess.Popen(["sleep", "60"], start_new_session=True)
        record = f'{{"pid":{innocent.pid},"started":1,"digest":""}}'
        (Path(wanted.directory) / "running.json").write_text(record)
        assert "start dns-9204" in it.converge(SCOPE, NAMESPACE, (wanted,))
        assert innocent.poll() is None
        innocent.kill()
        innocent.wait()


def test_a_reload_of_haproxy_keeps_established_connections() -> None:
    with inside(NAMESPACE):
        backend = socket.create_server(("10.10.1.1", 9000))
    backend.settimeout(5)
    with backend, _supervisor() as (it, died, until):
        wanted = haproxy.service(BALANCED)
        assert wanted is not None
        it.converge(SCOPE, NAMESPACE, (wanted,))
        with inside(NAMESPACE):
            client = socket.create_connection(("10.10.1.1", 8000), timeout=5)
        served = _accept_talking(backend, client)
        more = replace(RULE, rule_id=2, public_port=8001)
        changed = haproxy.service(replace(BALANCED, lb_rules={"1": RULE, "2": more}))
        assert changed is not None
        assert it.converge(SCOPE, NAMESPACE, (changed,)) == ["reload lb"]
        until(lambda: _connects(8001))
        client.sendall(b"still here")
        assert served.recv(100) == b"still here"
        client.close()
        assert died == []
        assert it.converge(SCOPE, NAMESPACE, ()) == ["end lb"]
        assert not _connects(8000)
        assert not Path(wanted.directory).exists()


def test_a_refused_configuration_leaves_the_old_process_serving() -> None:
    with _supervisor() as (it, _, _until):
        wanted = haproxy.service(BALANCED)
        assert wanted is not None
        it.converge(SCOPE, NAMESPACE, (wanted,))
        bad = replace(wanted, config={"haproxy.cfg": wanted.config["haproxy.cfg"] + "\n    bind nonsense\n"})
        with pytest.raises(HostRefused, match="the configuration was refused"):
            it.converge(SCOPE, NAMESPACE, (bad,))
        assert _connects(8000)
        assert it.converge(SCOPE, NAMESPACE, (wanted,)) == []


def test_nothing_is_left_of_an_ended_scope() -> None:
    with _supervisor() as (it, _, _until):
        wanted = dnsmasq.service(SCOPE, NETWORK)
        it.converge(SCOPE, NAMESPACE, (wanted,))
        pid = it.states()[SCOPE]["dns-9204"]
        assert it.end(SCOPE) == ["end dns-9204"]
        assert not Path(wanted.directory).parent.exists()
        until = time.monotonic() + 2
        while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
            os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        assert not Path(f"/proc/{pid}").exists()


def _connects(port: int) -> bool:
    with inside(NAMESPACE):
        try:
            socket.create_connection(("10.10.1.1", port), timeout=1).close()
        except OSError:
            return False
    return True


def _accept_talking(backend: socket.socket, client: socket.socket) -> socket.socket:
    """The backend's end of the client's connection: health checks connect too, and say nothing."""
    client.sendall(b"hello")
    while True:
        served, _ = backend.accept()
        served.settimeout(5)
        if served.recv(100) == b"hello":
            return served
        served.close()
