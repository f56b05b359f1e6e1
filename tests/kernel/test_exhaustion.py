"""A host that runs out of something, with real calls and packets: one clear line or success, and nothing half done.

Each condition really happens to the running agent (conditions.py). Pings in the network of the call and in another one
go on meanwhile. Afterwards one repeat gives exactly the desired state, and the agent is the same process and has leaked
nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

import jumping_clock
from kernel import conditions
from kernel.agent_host import NO_CHECKS, PROGRAM, AgentHost, act, agent_host, done, make_call, message, wait_until
from kernel.conditions import (
    SCOPES,
    Group,
    Pings,
    descriptors,
    failing,
    limited,
    spare_descriptors,
    stands,
    without_descriptors,
)
from kernel.isolated_network import NS, WEB, WEB_IP, get, lease, live_with_vm, lookup
from netloom.agent.processes.liveness import ANSWER_S, EVERY_S, FAILURES, PAUSE_S
from netloom.wire import FrameReader, Hello, Message, Reply, encode

OTHER_NS, OTHER = "cs-net-205", "other"
OUTSIDE = "203.0.113.1"
ANSWER_S_MAX = 20.0  # of the 60 that the calls have
# By then a resolver that does not answer would have been killed.
PROBED_S = EVERY_S + FAILURES * (2 * ANSWER_S + PAUSE_S)
FILE = f"{SCOPES}/net-204.json"
UPLINKS = ("eth1.1204", "eth1.1377", "eth2.101")  # of both networks


@dataclass
class Networks:
    """Network 204 with the VM ``web``, network 205 with the VM ``other``, and what the kernel has of them.

    ``plain`` is the kernel's state now, ``assigned`` with the second public address, which the tests assign.
    """

    host: AgentHost
    plain: str = ""
    assigned: str = ""

    @property
    def now(self) -> str:
        return stands(self.host, NS, OTHER_NS)

    @property
    def unchanged(self) -> bool:
        """Whether the next test finds what this one found."""
        agent = self.host.agent
        return agent is not None and agent.poll() is None and self.now == self.plain

    def assign(self) -> Reply:
        return self.host.call("050", "assign-ip")

    def release(self) -> None:
        done(self.host.call("060", "release-ip"))
        assert self.now == self.plain

    @contextlib.contextmanager
    def carrying(self) -> Iterator[None]:
        """Packets of both networks pass during the block, and the agent is the same before and after it."""
        agent = self.host.agent
        assert agent is not None
        before = descriptors(self.host)
        with Pings(self.host, WEB, OUTSIDE), Pings(self.host, OTHER, OUTSIDE):
            yield
        assert agent.poll() is None
        wait_until(lambda: descriptors(self.host) <= before)


@contextlib.contextmanager
def living_networks() -> Iterator[Networks]:
    with agent_host("eth1.1204", "eth1.1206", "eth1.1377", "eth2.101") as host:
        host.run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "sw-eth2.101", pid=host.fabric)
        host.start(*NO_CHECKS)
        live_with_vm(host)
        assert lease(host, WEB)["ip"] == WEB_IP
        for fixture, command, more in (
            ("020", "implement-network", {}),
            ("021", "assign-ip", {"public_ip": "203.0.113.55"}),
            ("022", "apply-fw-rules", {}),
        ):
            done(host.call(fixture, command, network_id="205", vlan="1377", **more))
        host.plug(OTHER, "breth1-1377", "02:01:00:cc:01:77", "10.10.1.77/24")
        host.ip("-n", OTHER, "route", "add", "default", "via", "10.10.1.1")
        it = Networks(host)
        done(it.assign())
        it.assigned = it.now
        done(host.call("060", "release-ip"))
        it.plain = it.now
        wait_until(lambda: conditions.packet_sockets(host) == len(UPLINKS))
        yield it


class SharedNetworks:
    """The same networks for one test after the other, and new ones after a test that failed or has changed them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._made: Networks | None = None

    def take(self) -> Networks:
        if self._made is None:
            self._made = self._stack.enter_context(living_networks())
        return self._made

    def discard(self) -> None:
        self._made = None
        self._stack.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[SharedNetworks]:
    it = SharedNetworks()
    yield it
    it.discard()


@pytest.fixture
def new_networks() -> Iterator[Networks]:
    """For tests that leave something behind, or of messages that an agent repeats only after a time."""
    with living_networks() as it:
        yield it


@pytest.fixture
def networks(shared: SharedNetworks, request: pytest.FixtureRequest) -> Iterator[Networks]:
    failed = request.session.testsfailed
    it = shared.take()
    yield it
    if request.session.testsfailed > failed or not it.unchanged:
        shared.discard()


UNCHANGED = rf"state file {FILE} cannot be written, nothing was changed: "
REFUSING: dict[str, tuple[Callable[[AgentHost], contextlib.AbstractContextManager[None]], str, str]] = {
    "a file cannot be flushed": (
        lambda host: failing(host, "fsync:error=EIO"), UNCHANGED + "Input/output error", "see dmesg",
    ),
    "the directory cannot be flushed": (
        lambda host: failing(host, "fsync:error=EIO", paths=[SCOPES]), UNCHANGED + "Input/output error", "see dmesg",
    ),
    "the disk is read-only": (
        conditions.read_only_disk, UNCHANGED + "Read-only file system", "make the host's disk writable",
    ),
    "the disk is full": (conditions.full_disk, UNCHANGED + "No space left on device", "free space on the host's disk"),
}  # fmt: skip


@pytest.mark.mutation("an-unflushed-file-is-put-back")
@pytest.mark.parametrize("condition", REFUSING)
def test_a_change_that_cannot_be_saved_is_refused_and_nothing_is_changed(networks: Networks, condition: str) -> None:
    make, says, remedy = REFUSING[condition]
    host = networks.host
    file = host.path(FILE)
    with networks.carrying():
        before = file.read_bytes()
        with make(host):
            began = time.monotonic()
            for reply in (networks.assign(), networks.assign()):
                assert (reply.status, reply.holds) == (3, True)
                assert re.fullmatch(says, reply.error)
                assert remedy in reply.hint
            assert time.monotonic() - began < ANSWER_S_MAX
            assert (file.read_bytes(), networks.now) == (before, networks.plain)
            done(host.call("022", "apply-fw-rules"))  # it changes nothing
            assert get(host, WEB, "/latest/meta-data/local-hostname") != ""
        assert [it.name for it in file.parent.iterdir() if it.name.startswith(".")] == []
        done(networks.assign())
        assert json.loads(file.read_bytes())["revision"] == json.loads(before)["revision"] + 1
        assert networks.now == networks.assigned
    networks.release()


@pytest.mark.parametrize("condition", ["the directory cannot be flushed", "the disk is read-only"])
def test_a_removal_that_cannot_be_saved_is_refused_and_nothing_is_changed(networks: Networks, condition: str) -> None:
    host = networks.host
    done(host.call("020", "implement-network", network_id="206", vlan="1206", cidr="10.10.6.0/24"))
    before = networks.now
    with networks.carrying():
        with REFUSING[condition][0](host):
            reply = host.call("131", "destroy-network", network_id="206")
            assert (reply.status, reply.holds) == (3, True)
            assert "net-206.json cannot be renamed, nothing was changed: " in reply.error
            assert networks.now == before
            assert host.path(f"{SCOPES}/net-206.json").exists()
        done(host.call("131", "destroy-network", network_id="206"))
        assert networks.now == networks.plain
        assert sorted(it.name for it in host.path(SCOPES).iterdir()) == ["net-204.json", "net-205.json"]


@pytest.mark.mutation("a-state-that-may-not-last-is-read-again", instead="slot.state_read")
def test_a_state_that_a_power_failure_may_undo_is_no_success(networks: Networks) -> None:
    """The disk fails in the middle of a change: the new file cannot be flushed, and the old one cannot be put back."""
    host = networks.host
    paths = [SCOPES, f"{SCOPES}/.net-204.json.old"]
    with networks.carrying():
        with failing(host, "fsync:error=EIO", "rename:error=EROFS", paths=paths):
            for _ in range(2):
                reply = networks.assign()
                assert (reply.status, reply.holds) == (3, True)
                assert reply.error.endswith("was changed, and a power failure may undo that: Input/output error")
            assert networks.now == networks.plain
            done(host.call("020", "implement-network", network_id="205", vlan="1377"))  # the others are used
        done(host.call("022", "apply-fw-rules"))  # it changes nothing, and finds the state of the file
        assert networks.now == networks.assigned
        done(networks.assign())
        assert networks.now == networks.assigned
        networks.release()
        assert [it.name for it in host.path(SCOPES).iterdir() if it.name.startswith(".")] == []


@pytest.mark.parametrize("spare", [1, 2, 4, 8])
def test_a_lack_of_descriptors_is_one_line_with_a_remedy(networks: Networks, spare: int) -> None:
    """Wherever it ends, the call names the limit, and the retry or the repeat completes it."""
    host = networks.host
    with networks.carrying():
        with without_descriptors(host, spare=spare):
            reply = networks.assign()
        assert reply.status == 3
        assert "Too many open files" in reply.error
        assert "LimitNOFILE" in reply.hint
        done(networks.assign())
        assert networks.now == networks.assigned
    networks.release()
    assert "Traceback" not in host.log()


def test_an_agent_that_could_accept_no_connection_writes_few_lines(new_networks: Networks) -> None:
    host = new_networks.host
    before = len(host.log())
    with new_networks.carrying():
        with without_descriptors(host):
            with contextlib.ExitStack() as clients:
                while spare_descriptors(host):
                    clients.enter_context(host.client())
                late = subprocess.Popen(  # one more, which is accepted later
                    ["nsenter", "-t", str(host.pid), "-n", "-m", "--", *PROGRAM, "connect"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                wait_until(lambda: "socket.accept() out of system resource" in host.log()[before:])
        assert late.stdin is not None
        assert late.stdout is not None
        late.stdin.write(encode(Hello(version="test", build="test")) + encode(make_call("050", "assign-ip")))
        late.stdin.flush()
        reader, messages = FrameReader(), list[Message]()
        while len(messages) < 2:
            messages += reader.feed(late.stdout.read1(65536))  # type: ignore[attr-defined]
        late.communicate()
        assert isinstance(messages[1], Reply)
        done(messages[1])
    new_networks.release()
    assert host.log()[before:].count("socket.accept()") == 1


def test_without_processes_only_calls_that_need_one_fail(networks: Networks) -> None:
    """The limit is that of a control group, as systemd's TasksMax. A resolver cannot be started."""
    host = networks.host
    with networks.carrying(), Group(host, "pids") as group:
        # The process that starts services ends some seconds after the last start, and would leave room for another.
        wait_until(lambda: not any(it[-3:-2] == ["serve"] for it in host.processes("serve").values()))
        group.limit("pids.max", "pids.max", group.read("pids.current", "pids.current"))
        done(networks.assign())
        reply = host.call("033", "config-dns-subnet", network_id="205")
        assert (reply.status, reply.error) == (3, "dns-205: Resource temporarily unavailable")
        assert "raise kernel.pid_max" in reply.hint
        assert "failed: dns-205: Resource temporarily unavailable" in message(act(host, "check", network_id="205"))
        group.limit("pids.max", "pids.max", 1000)
        done(host.call("033", "config-dns-subnet", network_id="205"))
        assert message(act(host, "check", network_id="205")) == "nothing to do: all is as it should be"
        done(host.call("309", "remove-dns-subnet", network_id="205"))
    networks.release()


def rules(number: int) -> dict[str, object]:
    """A list of so many egress rules."""
    made = [{"id": at, "type": "egress", "protocol": "tcp", "portStart": at, "portEnd": at} for at in range(1, number)]
    return {"default_egress_allow": True, "rules": made}


def test_without_memory_a_call_fails_and_the_next_one_succeeds(networks: Networks) -> None:
    """Lists of rules that grow until the agent has no memory for one.

    The call is refused, or its connection is closed: it could not even be read, or libnftables ended the process.
    """
    host = networks.host
    with Pings(host, WEB, OUTSIDE), Pings(host, OTHER, OUTSIDE):
        with limited(host, resource.RLIMIT_DATA, memory(host)):
            for number in range(4000, 100_000, 4000):
                try:
                    reply = host.call("070", "apply-fw-rules", fw_rules=rules(number))
                except ConnectionError:
                    break
                if reply.status:
                    assert (reply.status, reply.error) == (3, "apply-fw-rules: Cannot allocate memory")
                    assert "too little memory" in reply.hint
                    break
            else:
                raise AssertionError("the agent had memory for everything")
        done(relayed(host, "022", "apply-fw-rules"))
        assert networks.now == networks.plain
        wait_until(lambda: message(act(host, "check")) == "nothing to do: all is as it should be")


def memory(host: AgentHost) -> int:
    """What the limit RLIMIT_DATA counts of the agent, in bytes."""
    assert host.agent is not None
    status = host.path(f"/proc/{host.agent.pid}/status").read_text()
    return int(re.findall(r"VmData:\s+(\d+) kB", status)[0]) * 1024


def test_an_agent_that_the_kernel_kills_for_its_memory_is_replaced_by_the_next_call(networks: Networks) -> None:
    """The limit is that of a control group, as systemd's MemoryMax."""
    host = networks.host
    agent = host.agent
    assert agent is not None
    before = host.path(FILE).read_bytes()
    with Pings(host, WEB, OUTSIDE), Pings(host, OTHER, OUTSIDE):
        with Group(host, "memory") as group:
            used = group.read("memory.usage_in_bytes", "memory.current")
            group.limit("memory.limit_in_bytes", "memory.max", used + (8 << 20))
            with pytest.raises(ConnectionResetError, match="hung up|reset by peer"):
                host.call("070", "apply-fw-rules", fw_rules=rules(30_000))
            assert agent.wait(60) == -signal.SIGKILL
        assert host.path(FILE).read_bytes() == before
        reply = relayed(host, "050", "assign-ip")
        done(reply)
        assert networks.now == networks.assigned


def relayed(host: AgentHost, fixture: str, command: str) -> Reply:
    """Make a call through ``netloom agent connect``, which starts an agent if none answers."""
    relay = subprocess.Popen(
        ["nsenter", "-t", str(host.pid), "-n", "-m", "--", *PROGRAM, "connect"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert relay.stdin is not None
    assert relay.stdout is not None
    relay.stdin.write(encode(Hello(version="test", build="test")) + encode(make_call(fixture, command)))
    reader, messages = FrameReader(), list[Message]()
    while len(messages) < 2:
        messages += reader.feed(os.read(relay.stdout.fileno(), 65536))
    relay.communicate(timeout=60)
    assert isinstance(messages[1], Reply)
    return messages[1]


@pytest.mark.mutation("a-full-conntrack-table-is-named", instead="True")
def test_with_a_full_conntrack_table_calls_work_and_it_is_named(new_networks: Networks) -> None:
    """Open connections go on, also in the full network; only new ones are dropped. The table stays full."""
    host = new_networks.host
    with new_networks.carrying():
        conditions.fill_conntrack(host, NS)
        assert "0 received" in host.run("ping", "-c", "3", "-i", "0.2", "-W", "1", OUTSIDE, namespace=WEB, check=False)
        for action in ("check", "show"):
            said = message(act(host, action))
            assert re.search(rf"\d+ of \d+ connections of {NS} are in use.*nf_conntrack_max", said)
        done(host.call("032", "add-dhcp-entry"))
        host.run("ping", "-c", "1", "-W", "20", OUTSIDE, namespace=OTHER)


@pytest.mark.long
@pytest.mark.mutation("a-full-conntrack-table-proves-no-hang", instead="False")
def test_a_network_whose_conntrack_table_was_full_works_again(new_networks: Networks) -> None:
    """Each look at all connections takes seconds. The resolver, which no probe reaches, is not taken for hung."""
    host = new_networks.host
    (resolver,) = host.processes("dnsmasq")
    with new_networks.carrying():
        conditions.fill_conntrack(host, NS)
        filled = time.monotonic()
        # Without calls: a process is not killed while a command works on its scope.
        wait_until(lambda: time.monotonic() > filled + PROBED_S, 2 * PROBED_S)
        assert "does not answer" not in host.log()
        done(new_networks.assign())
        assert new_networks.now == new_networks.assigned
        conditions.empty_conntrack(host, NS)
        host.run("ping", "-c", "1", "-W", "20", OUTSIDE, namespace=WEB)
        assert lookup(host, WEB, "web-1") == WEB_IP
        assert message(act(host, "check")) == "nothing to do: all is as it should be"
    assert resolver in host.processes("dnsmasq")
    assert "does not answer" not in host.log()
    new_networks.release()


@pytest.mark.parametrize("jump_s", [86400, -86400])
def test_a_clock_that_jumps_a_day_changes_nothing(jump_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases, tokens, retries and deadlines go by clocks that do not jump."""
    with agent_host("eth1.1204", "eth2.101") as host:
        host.run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "sw-eth2.101", pid=host.fabric)
        clock = host.path("/run/clock")
        jumping_clock.write(clock, 0)
        program = [sys.executable, jumping_clock.__file__, "/run/clock", "agent"]
        monkeypatch.setattr("kernel.agent_host.PROGRAM", program)
        host.start("--check-every", "2")
        live_with_vm(host)
        before = lease(host, WEB)
        failed = host.call("020", "implement-network", network_id="205", vlan="1377")
        assert failed.status == 3  # its VLAN has no link yet
        with Pings(host, WEB, OUTSIDE):
            stood = stands(host, NS)
            tried = host.log().count("scope=net-205 retry ")
            jumping_clock.write(clock, jump_s)
            assert lease(host, WEB) == before
            assert get(host, WEB, "/latest/meta-data/local-hostname") != ""
            wait_until(lambda: host.log().count("scope=net-205 retry ") > tried)
            host.add_vlan("eth1.1377")
            wait_until(lambda: "cs-net-205" in host.run("ip", "netns"))
            wait_until(lambda: message(act(host, "check")) == "nothing to do: all is as it should be")
            done(host.call("137", "implement-network", remaining_ms=int(ANSWER_S_MAX * 1000)))
            assert stands(host, NS).partition("}")[2] == stood.partition("}")[2]  # without the host's links
        assert host.agent is not None
        assert host.agent.poll() is None
