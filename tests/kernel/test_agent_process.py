"""The agent process: its socket, repeated calls, state files, start and end, and the relay that starts it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import processes
from kernel.agent_host import LOG, PROGRAM, REGISTRATION, AgentHost, agent_host, make_call, wait_until
from netloom.agent.scopes.scopes import WORKERS
from netloom.wire import Call, FrameReader, Hello, Message, Registration, Reply, encode

STATE = "/var/lib/netloom/scopes"
SOCKET = "/run/netloom/agent.sock"


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        yield it


@pytest.fixture
def bare() -> Iterator[AgentHost]:
    """A host on which no agent runs."""
    with agent_host() as it:
        yield it
        # Agents started by a relay are not children of this process.
        for pid in agent_pids(it):
            processes.kill(pid)
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists())


def agent_pids(host: AgentHost) -> list[int]:
    """The pids of this host's agents: ``serve`` processes in its network namespace."""
    there = os.stat(f"/proc/{host.pid}/ns/net").st_ino
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"serve" in words and os.stat(f"/proc/{pid}/ns/net").st_ino == there:
                found.append(int(pid))
    return found


def the_agent(host: AgentHost) -> int:
    """The pid of the only agent, when others that found its socket taken, and forks of its own, have ended."""
    wait_until(lambda: len(agent_pids(host)) == 1)
    (pid,) = agent_pids(host)
    return pid


def locate(scope_id: str) -> Call:
    return Call(call_id=f"locate-{time.monotonic()}", command="locate", scope_id=scope_id, registration=REGISTRATION)


def ask(host: AgentHost, call: Call) -> Reply:
    with host.client() as client:
        client.send(call)
        reply = client.receive()
        assert isinstance(reply, Reply)
        return reply


# --------------------------------------------------------------------------------------------------------- the socket


def test_only_root_can_use_the_agent_socket(host: AgentHost) -> None:
    # Other users can traverse the directory, because dnsmasq runs as one. They cannot open the socket.
    assert oct(host.path("/run/netloom").stat().st_mode)[-3:] == "711"
    assert oct(host.path(SOCKET).stat().st_mode)[-3:] == "600"
    # The agent checks the peer's uid, even when the path is accessible to all users.
    host.path("/run/netloom").chmod(0o755)
    host.path(SOCKET).chmod(0o666)
    said = host.run("setpriv", "--reuid=65534", "--clear-groups", "busybox", "nc", f"local:{SOCKET}", check=False)
    assert said == ""
    ask(host, locate("net-204"))


@pytest.mark.parametrize(("oldest", "status"), [(1, 0), (9, 3)])
def test_a_newer_caller_is_served_if_it_supports_our_protocol(host: AgentHost, oldest: int, status: int) -> None:
    with host.client() as client:
        client.send(Hello(version="9", build="9", protocol=9, oldest=oldest))
        client.send(locate("net-204"))
        reply = client.receive()
    assert isinstance(reply, Reply)
    assert reply.status == status


def test_a_repeated_call_id_gets_the_remembered_reply(host: AgentHost) -> None:
    call = make_call("020", "implement-network", call_id="once")
    first = ask(host, call)
    assert (first.status, first.revision) == (0, 1)
    host.call("131", "destroy-network")
    assert ask(host, call) == first
    assert not ask(host, locate("net-204")).holds


def test_a_repeat_of_a_running_call_gets_its_reply(host: AgentHost) -> None:
    call = make_call("020", "implement-network", call_id="twice")
    with host.client() as one, host.client() as other:
        one.send(call)
        other.send(call)
        assert one.receive() == other.receive()
    assert host.log().count("call=twice") == 1


def test_a_call_is_completed_after_its_caller_disconnects(host: AgentHost) -> None:
    with host.client() as client:
        client.send(make_call("020", "implement-network", call_id="gone"))
    wait_until(lambda: "call=gone" in host.log())
    assert ask(host, locate("net-204")).holds


def test_locate_reports_the_scopes_of_this_host(host: AgentHost) -> None:
    assert not ask(host, locate("net-204")).holds
    host.call("020", "implement-network")
    reply = ask(host, locate("net-204"))
    assert (reply.holds, reply.revision) == (True, 1)
    assert not ask(host, locate("net-20")).holds
    assert ask(host, locate("net-../x")).status == 1


def test_another_owner_is_refused(host: AgentHost) -> None:
    host.call("020", "implement-network")
    reply = host.call("020", "implement-network", registration=Registration(owner="other"))
    assert reply.status == 3
    assert "belongs to 'test'" in reply.error


def test_an_invalid_nic_name_is_refused(host: AgentHost) -> None:
    reply = host.call("020", "implement-network", registration=Registration(owner="test", guest_nic="../../eth1"))
    assert (reply.status, reply.holds) == (1, False)
    assert "guest.network.device" in reply.error


def test_garbage_closes_only_its_own_connection(host: AgentHost) -> None:
    with host.client() as client:
        client.send_bytes(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            client.receive()
    assert not ask(host, locate("net-204")).holds


def test_a_hung_scope_blocks_only_its_own_callers_who_get_an_error(host: AgentHost) -> None:
    """Creating the namespace hangs, because the test holds the lock of /run/netns."""
    host.call("020", "implement-network")
    with locked_directory(host, "/run/netns"), host.client() as client:
        client.send(make_call("020", "implement-network", network_id="205", vlan="1377", call_id="hangs"))
        client.send(
            make_call("020", "implement-network", network_id="205", vlan="1377", remaining_ms=300, call_id="waits")
        )
        client.send(make_call("020", "implement-network", call_id="other"))
        replies: dict[str, Reply] = {}
        while len(replies) < 2:
            reply = client.receive()
            assert isinstance(reply, Reply)
            replies[reply.call_id] = reply
        assert replies["other"].status == 0
        assert replies["waits"].status == 3
        assert "net-205 is busy with implement-network" in replies["waits"].error
    wait_until(lambda: "call=hangs" in host.log())


@contextlib.contextmanager
def locked_directory(host: AgentHost, directory: str) -> Iterator[None]:
    holder = subprocess.Popen(
        ["nsenter", "-t", str(host.pid), "-m", "flock", directory, "-c", "echo held; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    try:
        yield
    finally:
        holder.communicate(timeout=30)


# ---------------------------------------------------------------------------------------------------------- its files


@pytest.mark.mutation("state-is-readable-by-root-alone", instead="0o644")
@pytest.mark.mutation("agent-creates-private-files", instead="os.umask(0o022)")
def test_defect_18_state_files_are_readable_text_for_root_only(host: AgentHost) -> None:
    host.call("020", "implement-network")
    file = host.path(f"{STATE}/net-204.json")
    assert oct(file.stat().st_mode)[-3:] == "600"
    assert oct(file.parent.stat().st_mode)[-3:] == "700"
    assert '\n      "vlan": "1204",\n' in file.read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"scope_id": "net-204", "own', "cannot be read"),
        ('{"schema": 99, "scope_id": "net-204", "owner": "x"}', "has schema 99"),
    ],
)
def test_an_unreadable_state_file_is_kept_and_other_scopes_work(host: AgentHost, text: str, says: str) -> None:
    host.call("020", "implement-network")
    host.call("020", "implement-network", network_id="205", vlan="1377")
    host.kill(signal.SIGTERM)
    file = host.path(f"{STATE}/net-204.json")
    good = file.read_text()
    file.write_text(text)
    host.start()
    for fixture, command in (("021", "assign-ip"), ("131", "destroy-network")):
        reply = host.call(fixture, command)
        assert (reply.status, reply.holds) == (3, True)
        assert says in reply.error
    assert ask(host, locate("net-204")).holds
    assert file.read_text() == text
    assert {"vnetg204", "vnetg205"} <= host.links().keys()
    assert host.call("131", "destroy-network", network_id="205").status == 0
    file.write_text(good)  # after the repair no restart is needed
    assert host.call("131", "destroy-network").status == 0
    assert "vnetg204" not in host.links()


def test_a_full_disk_is_reported_and_changes_nothing(host: AgentHost) -> None:
    host.kill(signal.SIGTERM)
    host.run("mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "none", "/var/lib")
    host.start()
    host.call("020", "implement-network")
    file = host.path(f"{STATE}/net-204.json")
    before = file.read_bytes()
    links = host.links().keys()
    with host.path("/var/lib/ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    reply = host.call("021", "assign-ip")
    assert reply.status == 3
    assert "No space left on device" in reply.error
    assert file.read_bytes() == before
    assert host.links().keys() == links
    assert os.listdir(file.parent) == ["net-204.json"]
    assert host.call("131", "destroy-network").status == 0  # deleting needs no disk space
    assert os.listdir(file.parent) == []


def test_passwords_of_payloads_are_not_logged(host: AgentHost) -> None:
    host.call("020", "implement-network")
    host.call("090", "save-password")
    assert "save-password" in host.log()
    secret = json.loads(make_call("090", "save-password").payload)["password"]
    assert secret not in host.log()


# ------------------------------------------------------------------------------------------------- start and end


def test_sigterm_stops_the_agent_and_keeps_the_network(host: AgentHost) -> None:
    host.call("020", "implement-network")
    stands = indexes_and_states(host)
    assert host.agent is not None
    host.agent.terminate()
    assert host.agent.wait(60) == 0
    assert indexes_and_states(host) == stands
    assert not host.path(SOCKET).exists()
    assert host.log().splitlines()[-1].endswith("stopped; what runs keeps running")


# Sends itself SIGTERM when its socket is bound: nobody can see the socket earlier.
STOPS_AT_ITS_SOCKET = f"""
import os, signal, socket
bind = socket.socket.bind
def bind_and_stop(self, address):
    bind(self, address)
    if address == {SOCKET!r}:
        os.kill(os.getpid(), signal.SIGTERM)
socket.socket.bind = bind_and_stop
"""


def test_sigterm_is_handled_as_soon_as_the_socket_is_there(bare: AgentHost, tmp_path: Path) -> None:
    with notified_agent(bare, changed_program(STOPS_AT_ITS_SOCKET, tmp_path)) as (agent, _):
        assert b"\nstopped; what runs keeps running\n" in agent.communicate(timeout=60)[1]
        assert agent.returncode == 0
    assert not bare.path(SOCKET).exists()


def indexes_and_states(host: AgentHost) -> dict[str, tuple[int, bool]]:
    """Index of each link, and whether it is set up. The kernel changes other flags a moment later, as NO-CARRIER."""
    return {name: (it["ifindex"], "UP" in it["flags"]) for name, it in host.links().items()}


def test_a_second_agent_refuses_to_start(host: AgentHost) -> None:
    second = subprocess.run(
        ["nsenter", "-t", str(host.pid), "-n", "-m", "--", *PROGRAM, "serve"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (second.returncode, second.stderr) == (3, f"netloom agent: another agent serves {SOCKET}\n")
    assert not ask(host, locate("net-204")).holds


class Relay:
    """``netloom agent connect``, started with three pipes, as sshd does. ``program``: another one than PROGRAM."""

    def __init__(self, host: AgentHost, program: list[str] = PROGRAM) -> None:
        self.process = subprocess.Popen(
            ["nsenter", "-t", str(host.pid), "-n", "-m", "--", *program, "connect"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/tmp",
        )
        self._reader = FrameReader()

    def ask(self, call: Call) -> Message:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(encode(Hello(version="test", build="test")) + encode(call))
        self.process.stdin.flush()
        messages: list[Message] = []
        while len(messages) < 2:
            messages += self._reader.feed(os.read(self.process.stdout.fileno(), 65536))
        assert isinstance(messages[0], Hello)
        return messages[1]

    def end(self) -> tuple[int, bytes]:
        """Close stdin; returns the exit status and stderr, read to end of file."""
        out, complaint = self.process.communicate(timeout=20)
        assert out == b""
        return self.process.returncode, complaint


@pytest.mark.mutation("agent-holds-none-of-the-relays-streams")
def test_defect_52_concurrent_relays_start_one_agent_that_outlives_them(bare: AgentHost) -> None:
    relays = [Relay(bare) for _ in range(3)]
    replies: list[Message] = []
    threads = [threading.Thread(target=lambda it=it: replies.append(it.ask(locate("net-1")))) for it in relays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [type(reply) for reply in replies] == [Reply] * 3
    pid = the_agent(bare)
    # End of file comes at once, because the agent has none of the relay's descriptors.
    assert [relay.end() for relay in relays] == [(0, b"")] * 3
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)] == ["/dev/null", "/dev/null", LOG]
    assert os.getsid(pid) != os.getsid(0)
    assert the_agent(bare) == pid


def test_the_socket_of_a_dead_agent_is_replaced(bare: AgentHost) -> None:
    first = Relay(bare)
    first.ask(locate("net-1"))
    pid = the_agent(bare)
    os.kill(pid, signal.SIGKILL)
    assert first.process.wait(20) == 0
    first.end()
    second = Relay(bare)
    assert isinstance(second.ask(locate("net-1")), Reply)
    assert second.end() == (0, b"")


def changed_program(change: str, directory: Path) -> list[str]:
    """The program after the Python statements of ``change``; it is written to the directory."""
    script = directory / "main.py"
    internal = str(Path(PROGRAM[1]).parents[2] / "internal")
    start = "from netloom.entry import main\nsys.exit(main(sys.argv))\n"
    script.write_text(f"import sys\nsys.path[0] = {internal!r}\n{change}{start}")
    return [PROGRAM[0], str(script), "agent"]


# Shorter limits for an agent that does not answer (1.5 s) and for workers that end nothing (1 s).
IMPATIENT = """
from netloom.agent import connect, hung
hung.SAMPLE_S, connect.QUIET_S = 0.05, 0.3
if "serve" in sys.argv:
    import signal, time
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(300))  # the main thread hangs
    from netloom.agent import heartbeat, serve
    heartbeat.STUCK_S_MAX, serve.PREPARE_S_MAX = 1.0, 0.5
"""


@pytest.fixture
def impatient(tmp_path: Path) -> list[str]:
    return changed_program(IMPATIENT, tmp_path)


@pytest.mark.mutation("an-agent-that-hung-leaves-its-stacks")
def test_a_new_relay_replaces_a_hung_agent_and_its_call_succeeds(bare: AgentHost, impatient: list[str]) -> None:
    first = Relay(bare, impatient)
    reply = first.ask(make_call("020", "implement-network"))
    assert isinstance(reply, Reply)
    assert reply.status == 0
    hung = the_agent(bare)
    first.process.kill()
    first.end()
    os.kill(hung, signal.SIGUSR1)
    relays = [Relay(bare, impatient) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        replies = list(threads.map(lambda relay: relay.ask(locate("net-204")), relays))
    assert [isinstance(it, Reply) and it.holds for it in replies] == [True] * 3
    assert the_agent(bare) != hung  # one, although three relays replaced the hung one
    complaints = b"".join(relay.end()[1] for relay in relays)
    assert f"the agent (process {hung}) hangs".encode() in complaints
    log = bare.log()
    assert f"the agent (process {hung}) hangs" in log
    assert "Fatal Python error: Aborted" in log
    assert "in run_forever" in log, log  # the stack of its event loop, which did not run meanwhile
    Relay(bare, impatient).ask(make_call("131", "destroy-network"))


@pytest.mark.mutation("a-relay-notices-that-the-agent-hangs", instead="False")
def test_a_relay_replaces_an_agent_that_hangs_during_a_call(bare: AgentHost, impatient: list[str]) -> None:
    relay = Relay(bare, impatient)
    relay.ask(locate("net-1"))
    hung = the_agent(bare)
    time.sleep(1)  # longer than QUIET_S: an idle agent answers on another connection and is left alone
    assert the_agent(bare) == hung
    os.kill(hung, signal.SIGSTOP)
    assert relay.process.stdin is not None
    relay.process.stdin.write(encode(locate("net-1")))
    relay.process.stdin.flush()
    # The relay ends, as when an agent dies. Its caller repeats the call over a new one.
    assert relay.process.wait(20) == 0
    assert f"the agent (process {hung}) hangs".encode() in relay.end()[1]
    assert the_agent(bare) != hung
    with bare.client() as client:
        client.send(locate("net-1"))
        assert isinstance(client.receive(), Reply)


def test_the_relay_carries_megabytes_both_ways(bare: AgentHost) -> None:
    relay = Relay(bare)
    call = make_call("020", "implement-network", zone_id="1", filler="x" * (5 << 20))
    reply = relay.ask(call)
    assert isinstance(reply, Reply)
    assert reply.status == 0
    relay.end()
    bare.call("131", "destroy-network")


def test_the_relay_imports_little(bare: AgentHost) -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import netloom.agent.connect; print(*sys.modules)"
    said = subprocess.run(
        [PROGRAM[0], "-I", "-S", "-c", program, str(Path(PROGRAM[1]).parents[2] / "internal")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"msgspec", "asyncio", "logging", "subprocess", "json", "re"} & set(said.stdout.split())


def test_invalid_arguments_print_one_line(bare: AgentHost) -> None:
    for words in (["dance"], ["serve", "--sockt", "x"], []):
        said = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert said.returncode == 1
        assert said.stderr.count("\n") == 1
        assert said.stdout == ""


@contextlib.contextmanager
def notified_agent(host: AgentHost, program: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """An agent as systemd starts it, and the socket on which systemd listens. Its log is on stderr."""
    host.path("/run/notify").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(host.path("/run/notify")))
        listener.settimeout(30)
        agent = subprocess.Popen(
            ["nsenter", "-t", str(host.pid), "-n", "-m", "--", *program, "serve"],
            env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "1000000"},
            stderr=subprocess.PIPE,
        )
        try:
            yield agent, listener
        finally:
            agent.kill()
            agent.communicate(timeout=20)


def test_systemd_is_notified_when_calls_are_answered_and_told_what_is_missing(
    host: AgentHost, impatient: list[str]
) -> None:
    """A restore that takes long delays neither READY nor a call for another network."""
    for network_id, vlan in (("204", "1204"), ("205", "1377")):
        assert host.call("020", "implement-network", network_id=network_id, vlan=vlan).status == 0
    host.kill()
    with locked_directory(host, "/run/netns"), notified_agent(host, impatient) as (agent, systemd):
        assert systemd.recv(100) == b"READY=1\nSTATUS=restoring: 0 of 2 networks done"
        assert host.call("020", "implement-network").status == 0
        with host.client() as client:
            assert (client.hello.unrestored, client.hello.restoring) == (1, ("net-205",))
        while (beat := systemd.recv(100)) != b"WATCHDOG=1\nSTATUS=restoring: 1 of 2 networks done":
            assert beat.startswith(b"WATCHDOG=1\n")
        agent.terminate()
        assert b"stopped; what runs keeps running" in agent.communicate(timeout=20)[1]
    with notified_agent(host, PROGRAM) as (_, systemd):
        assert systemd.recv(100).startswith(b"READY=1\nSTATUS=restoring: ")
        while systemd.recv(100) != b"STATUS=2 networks":  # at once, and again with each beat
            pass
        assert systemd.recv(100) == b"WATCHDOG=1\nSTATUS=2 networks"
        with host.client() as client:
            assert (client.hello.unrestored, client.hello.restoring) == (0, ())


def test_an_agent_whose_workers_all_hang_stops_its_heartbeat_and_aborts(bare: AgentHost, impatient: list[str]) -> None:
    """Creating a namespace hangs, because the test holds the lock of /run/netns."""
    with locked_directory(bare, "/run/netns"), notified_agent(bare, impatient) as (agent, systemd):
        assert systemd.recv(100) == b"READY=1\nSTATUS=0 networks"
        with bare.client() as client:
            for number in range(WORKERS):
                if number == WORKERS - 2:  # some works take long: that is no reason to abort
                    until = time.monotonic() + 2
                    while time.monotonic() < until:
                        assert systemd.recv(100).startswith(b"WATCHDOG=1")
                client.send(make_call("020", "implement-network", network_id=str(300 + number)))
            assert agent.wait(20) == -signal.SIGABRT
        assert agent.stderr is not None
        said = agent.stderr.read().decode()
    assert "the worker threads have ended no work for " in said
    assert said.count(" in converge\n") >= WORKERS  # the stacks of the workers
    with notified_agent(bare, PROGRAM) as (_, systemd):
        assert systemd.recv(100).startswith(b"READY=1\n")


@pytest.mark.mutation("one-call-of-a-scope-at-a-time", instead="asyncio.Semaphore(99)")
@pytest.mark.mutation("state-is-saved-first", instead='__import__("time").sleep(0.05) or self._store.save(scope)')
def test_defect_51_concurrent_commands_of_one_network_lose_nothing(host: AgentHost) -> None:
    """Calls of several management servers for one network overlap."""
    host.call("020", "implement-network")
    host.call("021", "assign-ip")

    def forward(port: int) -> None:
        reply = host.call("053", "add-port-forward", public_ip="203.0.113.20", public_port=str(port))
        assert reply.status == 0, reply.error

    with ThreadPoolExecutor(24) as workers:
        list(workers.map(forward, range(2000, 2024)))
    kept = json.loads(host.path("/var/lib/netloom/scopes/net-204.json").read_text())
    assert len(kept["port_forwards"]) == 24
    assert kept["revision"] == 2 + 24
