"""The agent's side of the guest process, with the real process and sockets in a namespace."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from msgspec.structs import replace

import processes
from netloom.agent.budget import Budget
from netloom.agent.kernel.namespaces import inside
from netloom.agent.log import Log
from netloom.agent.processes import files, guest_process, guest_sockets, liveness, process, supervisor
from netloom.agent.processes.guest_client import GuestClient
from netloom.agent.processes.guest_process import GuestProcess
from netloom.agent.processes.guests import Guests
from netloom.errors import HostRefused
from netloom.guestwire import GuestNetwork, PasswordTaken
from netloom.render.guest import tables
from netloom.secret import Secret
from netloom.state import Network, Nic, Scope

T = TypeVar("T")

NAMESPACE = "atest-guests"
VM = "atest-guests-vm"
MAC = "02:01:00:cc:00:03"
PROGRAM = Path(__file__).parents[2] / "cmd/netloom/main.py"
COMMAND = (sys.executable, "-B", str(PROGRAM), "guest")
NIC = Nic(
    mac=MAC,
    nic_uuid="u1",
    ip="10.10.1.45",
    hostname="web-1",
    leased=True,
    metadata={"instance-id": "i-1"},
    user_data=Secret("#!/bin/sh\n"),
    password=Secret("first"),
    password_serial=1,
)
NETWORK = Network(
    network_id="9205",
    implemented=True,
    vlan="9205",
    cidr="10.10.1.0/24",
    gateway="10.10.1.1",
    dhcp=True,
    nics={"u1": NIC},
)
SCOPE = Scope(scope_id="net-9205", owner="test", networks={"9205": NETWORK})


def _with(nic: Nic) -> Scope:
    return replace(SCOPE, networks={"9205": replace(NETWORK, nics={"u1": nic})})


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """The scope's namespace and a VM on its guest link."""
    _make_namespaces()
    yield
    for name in (NAMESPACE, VM):
        subprocess.run(["ip", "netns", "del", name], check=True)


def _make_namespaces() -> None:
    for name in (NAMESPACE, VM):
        subprocess.run(["ip", "netns", "add", name], check=True)
    for words in (
        f"-n {NAMESPACE} link add gst-9205 type veth peer name eth0 address {MAC} netns {VM}",
        f"-n {NAMESPACE} addr add 10.10.1.1/24 dev gst-9205",
        f"-n {NAMESPACE} link set gst-9205 up",
        f"-n {VM} addr add 10.10.1.45/24 dev eth0",
        f"-n {VM} link set eth0 up",
        f"-n {NAMESPACE} neigh add 10.10.1.45 lladdr {MAC} nud permanent dev gst-9205",
    ):
        subprocess.run(["ip", *words.split()], check=True)


class Agent:
    """An agent's event loop with a GuestProcess on it; ``in_worker`` runs work in a worker thread."""

    def __init__(self, directory: Path, build: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.taken: list[PasswordTaken] = []
        log = Log(str(directory / "agent.log"))
        self.process = GuestProcess(self.loop, log, COMMAND, build, self.taken.append, directory)
        self.guests = Guests(self.loop, self.process)
        self.loop.run_until_complete(self.process.adopt())

    def in_worker(self, work: Callable[[], T]) -> T:
        return self.loop.run_until_complete(self.loop.run_in_executor(None, work))

    def converge(self, scope: Scope) -> list[str]:
        return self.in_worker(lambda: self.guests.converge(scope.scope_id, NAMESPACE, tables(scope)))

    def wait_until(self, so: Callable[[], bool], patience_s: float = 20.0) -> None:
        async def wait() -> None:
            end = time.monotonic() + patience_s
            while not await self.loop.run_in_executor(None, so):
                assert time.monotonic() < end, "the condition did not become true in time"
                await asyncio.sleep(0.02)

        self.loop.run_until_complete(wait())

    def close(self) -> None:
        self.process.stop()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


@contextmanager
def _agents(directory: Path) -> Iterator[Callable[[str], Agent]]:
    """Make agents one after the other for the same guest processes. The processes end with the test."""
    made: list[Agent] = []
    pids: set[int] = set()

    def make(build: str = "b1") -> Agent:
        if made:
            pids.add(made[-1].process.pid)
            made[-1].close()
        made.append(Agent(directory, build))
        return made[-1]

    try:
        yield make
    finally:
        pids.add(made[-1].process.pid)
        made[-1].close()
        for pid in pids - {0}:
            processes.kill(pid)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _get(path: str, port: int = 80, header: str = "") -> str:
    with inside(VM):
        sock = socket.create_connection(("10.10.1.1", port), timeout=20)
    with sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n{header}\r\n".encode())
        answer = b""
        while data := sock.recv(4096):
            answer += data
    return answer.partition(b"\r\n\r\n")[2].decode()


def test_the_guest_process_answers_from_the_tables_it_was_sent(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        it = agent("b1")
        assert it.converge(SCOPE) == ["guest: serve 9205"]
        assert it.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"
        assert it.converge(SCOPE) == []
        assert it.converge(_with(replace(NIC, metadata={"instance-id": "i-2"}))) == ["guest: update 9205"]
        assert it.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-2"
        assert it.in_worker(lambda: it.guests.drop("net-9205")) == ["guest: drop 9205"]
        with pytest.raises(OSError):
            it.in_worker(lambda: _get("/latest/user-data"))


def test_an_acknowledged_password_is_reported(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        it = agent("b1")
        it.converge(SCOPE)
        assert it.in_worker(lambda: _get("/", 8080, "DomU_Request: send_my_password\r\n")).strip() == "first"
        assert it.taken == []
        it.in_worker(lambda: _get("/", 8080, "DomU_Request: saved_password\r\n"))
        it.wait_until(lambda: bool(it.taken))
        assert (it.taken[0].nic, it.taken[0].password_id) == ("u1", "1")


def test_a_killed_guest_process_restarts_with_the_same_sockets(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        it = agent("b1")
        it.converge(SCOPE)
        before = it.process.pid
        os.kill(before, signal.SIGKILL)
        # A request that comes immediately waits in the agent's copy of the socket until the next process serves it.
        assert it.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"
        it.wait_until(lambda: it.process.pid != before)
        assert it.converge(SCOPE) == []


def test_a_rejected_table_does_not_affect_other_networks(tmp_path: Path) -> None:
    refused = replace(tables(SCOPE)[0], scope_id="net-1", server_ip="10.10.1.2", lease_s=1)
    with _agents(tmp_path) as agent:
        it = agent("b1")
        with pytest.raises(HostRefused, match="lease_s"):
            it.in_worker(lambda: it.guests.converge("net-1", NAMESPACE, (refused,)))
        it.converge(SCOPE)
        os.kill(it.process.pid, signal.SIGKILL)
        assert it.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"
        with pytest.raises(HostRefused, match="lease_s"):
            it.in_worker(lambda: it.guests.converge("net-1", NAMESPACE, (refused,)))


def test_repeated_guest_process_crashes_back_off_exponentially(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        it = agent("b1")
        it.converge(SCOPE)
        for wait in ("0.0", "0.2", "0.5"):
            before = it.process.pid
            os.kill(before, signal.SIGKILL)
            # A process that is killed before it has got its networks counts twice.
            it.wait_until(partial(_has_welcomed_another, it, before, tmp_path / "agent.log"))
            assert f"guest process {before} has ended" in (tmp_path / "agent.log").read_text()
            assert f"another one starts in {wait} s" in (tmp_path / "agent.log").read_text()
        assert it.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"


def test_a_hung_guest_process_is_killed_without_losing_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "ANSWER_S", 0.5)
    monkeypatch.setattr(liveness, "PAUSE_S", 0.1)
    monkeypatch.setattr(files, "SERVICES_DIR", str(tmp_path / "services"))
    with _agents(tmp_path) as agent:
        it = agent("b1")
        it.converge(SCOPE)
        hung = it.process.pid
        log = Log(str(tmp_path / "agent.log"))
        no_services = supervisor.Supervisor(it.loop, print)
        probes = liveness.LivenessProbes(it.loop, log, no_services, it.process, lambda it: False)
        os.kill(hung, signal.SIGSTOP)
        probing = it.loop.create_task(probes.run(Budget().checks(0.2, liveness.PROBE_CPU_S)))
        it.wait_until(lambda: it.process.pid != hung)
        probing.cancel()
        assert not _is_running(hung)
        said = f"guest process (pid {hung}) does not answer: killed"
        it.wait_until(lambda: said in (tmp_path / "agent.log").read_text())
        assert it.in_worker(lambda: _get("/", 8080, "DomU_Request: send_my_password\r\n")).strip() == "first"


@pytest.mark.mutation("closed-sockets-are-not-handed-over")
def test_a_network_that_ends_while_another_process_gets_the_networks_does_not_disturb_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = replace(tables(SCOPE)[0], scope_id="net-1", network_id="1")
    with _agents(tmp_path) as agent:
        it = agent("b1")
        it.converge(SCOPE)
        process = it.process
        key = (ends.scope_id, ends.network_id)
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in guest_sockets.LISTENERS]
        process.networks[key] = guest_process.ServedNetwork(ends, ends.revision, sockets)
        serve, served = GuestClient.serve, []

        async def serve_and_end(client: GuestClient, table: GuestNetwork, sockets: list[socket.socket]) -> None:
            served.append(table.scope_id)
            await serve(client, table, sockets)
            if key in process.networks:
                process.networks.pop(key).close()

        monkeypatch.setattr(GuestClient, "serve", serve_and_end)
        os.kill(process.pid, signal.SIGKILL)
        assert it.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"
        it.wait_until(lambda: "guest process" in (tmp_path / "agent.log").read_text().splitlines()[-1])
        assert served == [SCOPE.scope_id]
        assert process.crashes == 1


@pytest.mark.mutation("a-process-that-was-given-up-ends")
def test_a_guest_process_whose_connection_is_lost_is_ended(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        it = agent("b1")
        it.converge(SCOPE)
        before = it.process.pid
        try:
            # The process gives up the connection of its agent for a later one.
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(str(tmp_path / "guest.sock"))
                it.wait_until(lambda: it.process.pid != before)
            it.wait_until(lambda: not _is_running(before), 5)
        finally:
            with suppress(ProcessLookupError):
                os.kill(before, signal.SIGKILL)
        assert it.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"


def test_a_guest_process_that_its_agent_could_not_record_is_recorded_by_the_next_one(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        pid = agent("b1").process.pid
        (tmp_path / "guest.json").unlink()
        second = agent("b1")
        assert second.process.pid == pid
        assert second.process.kill_hung(pid)
        second.wait_until(lambda: second.process.pid != pid)


_LIAR = f"""
import socket, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2] / "internal")!r})
from netloom.guestwire import GUEST_PROTOCOL, GuestHello
from netloom.guestwire.channel import Channel
control = socket.socket(fileno=int(sys.argv[sys.argv.index("--control") + 1]))
channel = Channel(control.accept()[0])
channel.queue(GuestHello(version="", build="b1", pid=int(sys.argv[1]), layers=(), served=()))
channel.flush()
time.sleep(60)
"""


@pytest.mark.mutation("only-a-guest-process-is-recorded", instead="True")
def test_a_guest_process_cannot_have_another_process_recorded_as_itself(tmp_path: Path) -> None:
    innocent = subprocess.Popen(["sleep", "60"])
    command = [sys.executable, "-c", _LIAR, str(innocent.pid)]
    loop = asyncio.new_event_loop()
    liar = GuestProcess(loop, Log(str(tmp_path / "agent.log")), command, "b1", print, tmp_path)
    try:
        loop.run_until_complete(liar.adopt())
        assert not liar.kill_hung(liar.pid)
        assert innocent.poll() is None
    finally:
        record = process.read_record(tmp_path / "guest.json")
        liar.stop()
        loop.close()
        innocent.kill()
        innocent.wait()
        assert record is not None
        process.kill(record)


def test_a_pid_claimed_by_the_guest_process_is_not_killed_unverified(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        it = agent("b1")
        innocent = subprocess.Popen(["sleep", "60"])
        assert not it.process.kill_hung(innocent.pid)
        assert innocent.poll() is None
        innocent.kill()
        innocent.wait()
        assert _is_running(it.process.pid)


def test_a_guest_process_that_hangs_at_agent_start_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _agents(tmp_path) as agent:
        first = agent("b1")
        first.converge(SCOPE)
        hung = first.process.pid
        os.kill(hung, signal.SIGSTOP)
        monkeypatch.setattr(guest_process, "HELLO_S_MAX", 2.0)

        def kill_and_be_patient(record: process.Record) -> bool:
            """Only the hung process gets little time to answer, not the one that starts after it."""
            monkeypatch.setattr(guest_process, "HELLO_S_MAX", 30.0)
            return process.kill(record)

        monkeypatch.setattr(guest_process, "kill", kill_and_be_patient)
        for network in first.process.networks.values():
            network.close()  # as the exit of an agent closes its copies
        second = agent("b1")
        assert second.process.pid != hung
        assert not _is_running(hung)
        assert second.converge(SCOPE) == ["guest: serve 9205"]
        assert second.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"


def test_a_restarted_agent_adopts_the_guest_process(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        first = agent("b1")
        first.converge(SCOPE)
        pid = first.process.pid
        second = agent("b1")
        assert second.converge(SCOPE) == []
        assert second.process.pid == pid
        os.kill(pid, signal.SIGKILL)
        assert second.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"


def test_a_new_build_takes_over_without_losing_requests(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        first = agent("b1")
        first.converge(SCOPE)
        old = first.process.pid
        second = agent("b2")
        assert second.process.pid != old
        assert second.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"
        # The old process still serves this request. The password that it delivers is reported as well.
        second.in_worker(lambda: _get("/", 8080, "DomU_Request: send_my_password\r\n"))
        second.in_worker(lambda: _get("/", 8080, "DomU_Request: saved_password\r\n"))
        second.wait_until(lambda: [it.password_id for it in second.taken] == ["1"])
        assert second.converge(SCOPE) == ["guest: update 9205"]
        second.wait_until(lambda: not _is_running(old))
        assert second.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"


@pytest.mark.mutation("a-replaced-process-is-not-forgotten", instead="None")
def test_an_agent_that_is_stopped_during_a_replacement_leaves_no_process_behind(tmp_path: Path) -> None:
    """As when a rollback follows an upgrade at once: the replaced process still serves a network."""
    with _agents(tmp_path) as agent:
        first = agent("b1")
        first.converge(SCOPE)
        old = first.process.pid
        second = agent("b2")
        assert _is_running(old)
        for network in [*first.process.networks.values(), *second.process.networks.values()]:
            network.close()  # as the exit of an agent closes its copies
        third = agent("b3")
        third.converge(SCOPE)
        third.wait_until(lambda: not _is_running(old) and not _is_running(second.process.pid))
        assert third.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"


def _queues() -> list[int]:
    """The length of the queue of each listening TCP socket: the column Send-Q of ss(8)."""
    listed = subprocess.run(
        ["ip", "netns", "exec", NAMESPACE, "ss", "-Hltn"], capture_output=True, text=True, check=True
    )
    return [int(line.split()[2]) for line in listed.stdout.splitlines()]


@pytest.mark.mutation("queues-of-an-earlier-version-are-lengthened")
def test_sockets_of_an_earlier_version_get_a_long_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _agents(tmp_path) as agent:
        with monkeypatch.context() as earlier:
            earlier.setattr(guest_sockets, "_BACKLOG", 128)
            agent("b1").converge(SCOPE)
        assert _queues() == [128, 128]
        agent("b2").converge(SCOPE)
        assert _queues() == [4096, 4096]


def test_a_recreated_namespace_gets_new_sockets(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        it = agent("b1")
        it.converge(SCOPE)
        for name in (NAMESPACE, VM):
            subprocess.run(["ip", "netns", "del", name], check=True)
        _make_namespaces()
        assert unserved(it) == ["9205"]
        assert it.converge(SCOPE) == ["guest: serve 9205"]
        assert it.in_worker(lambda: _get("/latest/meta-data/instance-id")) == "i-1"
        assert unserved(it) == []


def unserved(agent: Agent, scope: Scope = SCOPE) -> list[str]:
    return agent.in_worker(lambda: agent.guests.unserved(NAMESPACE, tables(scope)))


def test_unserved_and_outdated_networks_are_reported(tmp_path: Path) -> None:
    with _agents(tmp_path) as agent:
        it = agent("b1")
        assert unserved(it) == ["9205"]
        it.converge(SCOPE)
        assert unserved(it) == []
        assert unserved(it, _with(replace(NIC, metadata={"instance-id": "i-2"}))) == ["9205"]
        it.process.stop()  # now no process is connected
        assert unserved(it) == ["9205"]


def _has_welcomed_another(agent: Agent, pid: int, log: Path) -> bool:
    """Whether the agent has another guest process, which has got all networks."""
    return agent.process.pid != pid and f"guest process {agent.process.pid}: " in log.read_text()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
