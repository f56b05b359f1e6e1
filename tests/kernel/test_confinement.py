"""What confines dnsmasq and haproxy: users, capabilities, system calls, root directories, limits and logs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from kernel.agent_host import wait_until
from kernel.supervised import BALANCED, NAMESPACE, NETWORK, RULE, SCOPE, namespace, running_supervisor  # noqa: F401
from netloom import confine
from netloom.agent.kernel.namespaces import inside
from netloom.agent.processes import balancer as asked_balancer
from netloom.agent.processes import files, launcher, process, services
from netloom.agent.processes.supervisor import Supervisor
from netloom.render import dnsmasq, haproxy
from netloom.render.service import Service, directory_of
from netloom.state import Balancing

pytestmark = pytest.mark.usefixtures("namespace")

OTHER = "net-9305"
NET_BIND, NET_ADMIN, NET_RAW = 1 << 10, 1 << 12, 1 << 13
_LIMITS = {"Max file size": 1 << 20, "Max core file size": 0}


def balancer() -> Service:
    wanted = haproxy.service(BALANCED)
    assert wanted is not None
    return wanted


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def limits(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:25].strip(): int(line[25:].split()[1]) for line in lines if "unlimited" not in line}


def stop_all(it: Supervisor) -> None:
    for scope_id in it.scopes():
        it.stop(scope_id)


@contextlib.contextmanager
def two_scopes() -> Iterator[tuple[Supervisor, dict[str, int], dict[str, int]]]:
    """A resolver and a balancer of one scope and a resolver of another: the pids by name, the users by scope."""
    with running_supervisor() as (it, _, _wait_until):
        it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, NETWORK), balancer()))
        other = replace(dnsmasq.service(OTHER, replace(NETWORK, dns=False)), listens=())
        it.converge(OTHER, NAMESPACE, (other,))
        try:
            pids = {**it.states()[SCOPE], "other": it.states()[OTHER]["dns-9204"]}
            users = {scope_id: os.stat(Path(other.directory).parents[1] / scope_id).st_gid for scope_id in it.scopes()}
            # Before the program is executed, the process gives up its privileges one after the other.
            wait_until(lambda: all(status(pid)["Name"] in ("dnsmasq", "haproxy") for pid in pids.values()))
            yield it, pids, users
        finally:
            stop_all(it)


@pytest.mark.mutation("a-service-has-the-user-of-its-scope", instead="os.setresuid(*[uid + 1] * 3)")
def test_services_have_their_own_user() -> None:
    with two_scopes() as (_, pids, users):
        assert len(set(users.values())) == 2
        for scope_id, leader in ((SCOPE, pids["dns-9204"]), (SCOPE, pids["lb"]), (OTHER, pids["other"])):
            for pid in process.group(leader):  # haproxy: the master and its worker
                seen = status(pid)
                assert seen["Uid"].split() == seen["Gid"].split() == [str(users[scope_id])] * 4
                assert seen["Groups"].split() == []


@pytest.mark.mutation("a-service-gets-no-new-privileges")
@pytest.mark.mutation("a-service-has-a-filter")
def test_services_have_few_privileges() -> None:
    with two_scopes() as (_, pids, _users):
        for leader in pids.values():
            for pid in process.group(leader):
                seen = status(pid)
                for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                    assert int(seen[kind], 16) == NET_BIND, kind
                assert (seen["NoNewPrivs"], seen["Seccomp"]) == ("1", "2")
                assert limits(pid).items() >= _LIMITS.items()
                assert limits(pid)["Max processes"] <= 4096
                # The agent's limit may be lower.
                assert limits(pid)["Max open files"] == min(1 << 16, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        assert limits(pids["dns-9204"])["Max data size"] == 128 << 20
        assert limits(pids["lb"])["Max data size"] == (512 + 8000 // 16) << 20


@pytest.mark.mutation("a-resolver-is-no-network-administrator", instead="demanded")
def test_a_resolver_that_advertises_an_ipv6_prefix_cannot_change_links() -> None:
    """dnsmasq does not start without CAP_NET_ADMIN. It is told that it has it."""
    known = replace(NETWORK, implemented=True, vlan="9", cidr="10.10.1.0/24")
    network = replace(known, ip6_cidr="fd00:9204::/64", ip6_gateway="fd00:9204::1")
    add = ["addr", "add", "fd00:9204::1/64", "dev", "gst-9204", "nodad"]
    subprocess.run(["ip", "-n", NAMESPACE, *add], check=True)
    with inside(NAMESPACE):
        host = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    with running_supervisor() as (it, _, _wait_until), host:
        host.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"other")
        host.settimeout(0.3)
        it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, network),))
        pid = it.states()[SCOPE]["dns-9204"]
        seen = status(pid)
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(seen[kind], 16) == NET_BIND | NET_RAW, kind
        assert (seen["NoNewPrivs"], seen["Seccomp"]) == ("1", "2")
        wait_until(lambda: process.group(pid) == [pid])  # the process that answered capget(2) has ended
        wait_until(lambda: advertises(host))
        assert it.privileged(SCOPE) == []


# A host on which the question for capabilities cannot be answered: seccomp(2) fails with an error, or, with error 0,
# root has no CAP_SYS_PTRACE.
HOST_WITHOUT_ANSWERS = """#!{python}
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
number, error = {number}, {error}
if error:
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7fff0000)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *it) for it in code))
    program = ctypes.create_string_buffer(struct.pack("=H6xQ", len(code), ctypes.addressof(text)))
    assert libc.prctl(22, 2, program) == 0
else:
    assert libc.prctl(24, 19, 0, 0, 0) == 0
os.execv("{python}", ["{python}", "{main}", *sys.argv[1:]])
"""


@pytest.mark.mutation("answers-are-possible-before-they-are-needed")
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EPERM, 0])
def test_a_resolver_with_ipv6_starts_where_answers_are_impossible_and_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: int
) -> None:
    program = tmp_path / "netloom"
    number = confine.CALLS[os.uname().machine]["seccomp"]
    main = Path(__file__).parents[2] / "cmd/netloom/main.py"
    program.write_text(HOST_WITHOUT_ANSWERS.format(python=sys.executable, number=number, error=error, main=main))
    program.chmod(0o755)
    monkeypatch.setattr(launcher, "path", lambda: str(program))
    monkeypatch.setattr(process, "launcher", starting := launcher.Launcher())
    known = replace(NETWORK, implemented=True, vlan="9", cidr="10.10.1.0/24")
    resolver = dnsmasq.service(SCOPE, replace(known, ip6_cidr="fd00:9204::/64", ip6_gateway="fd00:9204::1"))
    subprocess.run(["ip", "-n", NAMESPACE, "addr", "add", "fd00:9204::1/64", "dev", "gst-9204", "nodad"], check=True)
    with running_supervisor() as (it, _, _wait_until):
        it.converge(SCOPE, NAMESPACE, (resolver,))
        seen = status(it.states()[SCOPE]["dns-9204"])
        assert int(seen["CapEff"], 16) == NET_BIND | NET_RAW | NET_ADMIN
        assert (seen["NoNewPrivs"], seen["Seccomp"]) == ("1", "2")
        assert it.privileged(SCOPE) == ["dns-9204"]
        assert "does not let netloom answer system calls" in files.log_path(resolver).read_text()
    starting.close()


def advertises(host: socket.socket) -> bool:
    """Whether a router solicitation is answered with an advertisement (RFC 4861 sections 4.1 and 4.2)."""
    try:
        host.sendto(b"\x85" + bytes(7), ("ff02::2", 0, 0, 0))
        while host.recv(2000)[0] != 134:
            pass
    except OSError:  # no address yet, or no answer yet
        return False
    return True


@pytest.mark.mutation("threads-fit-into-the-limit")
def test_a_balancer_of_a_large_host_starts_within_the_smallest_limit_of_memory() -> None:
    """With 64 processors haproxy has 64 threads, and each needs a stack."""
    small = haproxy.service(replace(BALANCED, balancing=Balancing(connections_max=100)))
    assert small is not None
    text = small.config["haproxy.cfg"].replace("global\n", "global\n    nbthread 64\n")
    with running_supervisor() as (it, _, wait_until):
        it.converge(SCOPE, NAMESPACE, (replace(small, config={"haproxy.cfg": text}),))
        lb = it.states()[SCOPE]["lb"]
        wait_until(lambda: "64" in {status(pid)["Threads"] for pid in process.group(lb)})


@pytest.mark.mutation("files-of-a-resolver-are-where-its-profile-allows-them")
def test_the_root_directory_of_a_service_has_programs_and_its_own_files() -> None:
    with two_scopes() as (_, pids, users):
        for name, top_more, etc_more in (("dns-9204", {"var"}, {"dnsmasq.conf", "dnsmasq.d"}), ("lb", set(), set())):
            root = Path(f"/proc/{pids[name]}/root")
            assert {it.name for it in root.iterdir()} <= {
                *("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "dev", "etc", "proc", "run", "sockets"),
            } | top_more
            assert {it.name for it in (root / "etc").iterdir()} <= {"passwd", "group", "ld.so.cache"} | etc_more
            top = Path(directory_of(SCOPE, name)).parents[1]
            assert os.listdir(f"{root}{top}") == [SCOPE]
            assert os.listdir(f"{root}{top}/{SCOPE}") == [name]
            assert os.listdir(root / "proc") == ["sys"]
            assert writable(root, users[SCOPE]) == ["/dev/null", "/dev/urandom", "/sockets"]
        # The paths that the distributions' profile of AppArmor allows to dnsmasq: what its own names lead to.
        resolver = Path(f"/proc/{pids['dns-9204']}/root")
        own = resolver / directory_of(SCOPE, "dns-9204").lstrip("/")
        assert {it.name: os.readlink(it) for it in own.iterdir()} == {
            "dnsmasq.conf": "/etc/dnsmasq.conf",
            "hosts": "/etc/dnsmasq.d",
            "log": "/var/log/dnsmasq.log",
        }
        log = Path(directory_of(SCOPE, "dns-9204"), "log")
        assert os.path.samestat(os.stat(resolver / "var/log/dnsmasq.log"), os.stat(log))
        assert "started" in log.read_text()
        sockets = os.listdir(f"/proc/{pids['lb']}/root/sockets")
        assert {"master.sock", "admin.sock"} <= set(sockets)


def writable(root: Path, user: int) -> list[str]:
    """The files and directories, without programs and libraries, that the user can write to."""
    program = """
import json, os, sys
os.chroot(sys.argv[1]); os.chdir("/")
os.setgroups([]); os.setresgid(*[int(sys.argv[2])] * 3); os.setresuid(*[int(sys.argv[2])] * 3)
found = []
for folder, names, files in os.walk("/"):
    if folder == "/":
        names[:] = [it for it in names if it not in ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")]
    files[:] = files if folder != "/sockets" else []
    found += [it for it in (folder, *(os.path.join(folder, file) for file in files)) if os.access(it, os.W_OK)]
print(json.dumps(sorted(found)))
"""
    argv = [sys.executable, "-c", program, str(root), str(user)]
    return [str(it) for it in json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)]


# Tries everything that the arguments name as the user of another scope, and prints the numbers of the errors.
INTRUDER = """
import json, os, signal, sys
user, pid, *paths = sys.argv[1:]
os.setgroups([]); os.setresgid(*[int(user)] * 3); os.setresuid(*[int(user)] * 3)
def outcome(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return 0
reads = [outcome(os.listdir if path.endswith("/") else lambda it: open(it).read(), path) for path in paths]
print(json.dumps([outcome(os.kill, int(pid), signal.SIGTERM), *reads]))
"""


@pytest.mark.mutation("users-differ", instead="next(iter(candidates))")
def test_a_process_of_one_scope_cannot_signal_those_of_another_nor_read_their_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With two numbers, the searches of these scopes begin at the same one.
    monkeypatch.setattr(files, "USERS", files.USERS[:2])
    starts = [hashlib.sha256(scope_id.encode()).digest()[3] % 2 for scope_id in (SCOPE, OTHER)]
    assert starts[0] == starts[1]
    with two_scopes() as (_, pids, users):
        directory = dnsmasq.service(SCOPE, NETWORK).directory
        paths = [
            f"{directory}/dnsmasq.conf",
            f"{directory}/hosts/",
            f"{directory}/hosts/nic-u1",
            f"{directory}/log",
            f"{directory}/running.json",
            f"/proc/{pids['dns-9204']}/root/",
            f"/proc/{pids['dns-9204']}/environ",
            f"/proc/{pids['dns-9204']}/mem",
            f"/proc/{pids['dns-9204']}/maps",
            f"/proc/{pids['dns-9204']}/cwd/",
            f"/proc/{pids['dns-9204']}/fd/",
        ]
        attempt = [sys.executable, "-c", INTRUDER]
        done = subprocess.run(
            [*attempt, str(users[OTHER]), str(pids["dns-9204"]), *paths], check=True, capture_output=True, text=True
        )
        assert set(json.loads(done.stdout)) == {errno.EPERM, errno.EACCES}, done.stdout
        assert process.start_time(pids["dns-9204"]) is not None
        # The user of the scope itself can.
        done = subprocess.run(
            [*attempt, str(users[SCOPE]), str(pids["dns-9204"]), *paths[:3]],
            check=True,
            capture_output=True,
            text=True,
        )
        assert json.loads(done.stdout) == [0] * 4


# A haproxy that an attacker controls: its socket leads to one of the host, or it answers without end.
HOSTILE = """
import os, signal, socket, sys
if len(sys.argv) > 1:
    os.symlink(sys.argv[1], "/sockets/master.sock")
    signal.pause()
listener = socket.socket(socket.AF_UNIX)
listener.bind("/sockets/master.sock")
listener.listen()
while True:
    client = listener.accept()[0]
    try:
        while True: client.sendall(b"x" * (1 << 16))
    except OSError:
        client.close()
"""


@contextlib.contextmanager
def hostile(*arguments: str) -> Iterator[int]:
    """The pid of such a process, when it has its socket."""
    wanted = replace(balancer(), argv=("python3", "-c", HOSTILE, *arguments), listens=(), check=())
    with running_supervisor() as (it, _, _wait_until):
        it.converge(SCOPE, NAMESPACE, (wanted,))
        pid = it.states()[SCOPE]["lb"]
        wait_until(lambda: os.path.lexists(f"/proc/{pid}/root{haproxy.MASTER}"))
        yield pid


@pytest.mark.mutation("sockets-of-services-are-no-links", instead='os.open(f"/proc/{pid}/root{path}", os.O_PATH)')
def test_a_service_cannot_lead_the_agent_to_a_socket_of_the_host(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as of_host:
        of_host.bind(str(tmp_path / "socket"))
        of_host.listen()
        of_host.setblocking(False)
        with hostile(str(tmp_path / "socket")) as pid:
            assert asked_balancer.limited(BALANCED, frozenset(), pid) == []
            with pytest.raises(BlockingIOError):
                of_host.accept()


def test_an_answer_without_end_is_cut_off() -> None:
    with hostile() as pid:
        began = time.monotonic()
        assert asked_balancer.limited(BALANCED, frozenset(), pid) == []
        assert time.monotonic() < began + 20


# Writes to its log as fast as it can.
FLOOD = "import os\nwhile True:\n try: os.write(2, b'x' * 99 + b'\\n')\n except OSError: pass"


@pytest.mark.mutation("a-log-has-a-largest-size")
@pytest.mark.mutation("a-long-log-is-shortened")
@pytest.mark.mutation("a-shortened-log-has-no-hole", instead="os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW")
def test_a_log_stays_below_its_bound_under_a_flood() -> None:
    flood = replace(dnsmasq.service(SCOPE, NETWORK), argv=("python3", "-c", FLOOD), listens=(), probe=None)
    log = files.log_path(flood)
    with running_supervisor() as (it, _, _wait_until):
        it.converge(SCOPE, NAMESPACE, (flood,))
        pid = it.states()[SCOPE][flood.name]
        # The kernel refuses what exceeds the limit, also while no agent runs. The process goes on.
        wait_until(lambda: log.stat().st_size > (1 << 20) - 100)
        spent = cpu_ticks(pid)
        wait_until(lambda: cpu_ticks(pid) > spent + 20)
        assert log.stat().st_size <= 1 << 20
        for _ in range(3):
            stop(pid)
            it.bound_logs()
            assert log.stat().st_size <= files.LOG_BYTES_MAX
            size = log.stat().st_size
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda: log.stat().st_size > size)  # noqa: B023
        stop(pid)
        assert b"\0" not in log.read_bytes()
        assert log.read_bytes().startswith(b"(older lines were removed)\nxxx")
        os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    """Send SIGSTOP and wait until the process has stopped: it may be in a system call."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: status(pid)["State"].startswith("T"))


def cpu_ticks(pid: int) -> int:
    """The processor time of the process (proc(5), /proc/<pid>/stat: utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_messages_of_resolver_and_balancer_are_in_their_logs() -> None:
    with running_supervisor() as (it, _, _wait_until):
        wanted = (dnsmasq.service(SCOPE, NETWORK), balancer())
        it.converge(SCOPE, NAMESPACE, wanted)
        resolver, balance = (files.log_path(service) for service in wanted)
        wait_until(lambda: "started, version" in resolver.read_text())
        wait_until(lambda: "rule-1/10.10.1.1:9000 is DOWN" in balance.read_text())


@pytest.mark.mutation("own-ports-are-not-taken")
def test_ports_of_the_scopes_own_balancer_do_not_count_as_taken() -> None:
    with running_supervisor() as (it, _, _wait_until):
        it.converge(SCOPE, NAMESPACE, (balancer(),))
        assert services.taken_ports(BALANCED, NAMESPACE, it.user(SCOPE, haproxy.NAME)) == {}
        with inside(NAMESPACE):
            thief = socket.create_server(("10.10.1.1", 8001), reuse_port=True)
        more = replace(BALANCED, lb_rules={"1": RULE, "2": replace(RULE, rule_id=2, public_port=8001)})
        with thief:
            taken = services.taken_ports(more, NAMESPACE, it.user(SCOPE, haproxy.NAME))
            assert taken == {2: "10.10.1.1:8001"}


@pytest.mark.mutation("connections-outlive-the-upgrade")
def test_processes_of_an_earlier_version_are_replaced_and_their_connections_kept() -> None:
    """Earlier versions started haproxy and dnsmasq as root; they changed to the user nobody themselves."""
    with inside(NAMESPACE):
        backend = socket.create_server(("10.10.1.1", 9000))
    wanted = balancer()
    directory = Path(wanted.directory)
    directory.mkdir(parents=True)
    text = wanted.config["haproxy.cfg"].replace("global\n", "global\n    uid 65534\n    gid 65534\n")
    (directory / "haproxy.cfg").write_text(text.replace("/sockets/", f"{directory}/"))
    argv = ["haproxy", "-W", "-db", "-S", f"{directory}/master.sock,mode,600", "-f", f"{directory}/haproxy.cfg"]
    with inside(NAMESPACE), (directory / "log").open("wb") as log:
        old = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    wait_until(lambda: ("tcp", 8000) in process.listening(old.pid))
    process.write_record(files.record_path(directory), process.record_of(old.pid, "digest"))
    with backend, running_supervisor() as (it, _, _wait_until):
        client, served = connected(backend)
        it.converge(SCOPE, NAMESPACE, (wanted,))
        new = it.states()[SCOPE]["lb"]
        assert new != old.pid
        assert process.user_of(new) in files.USERS
        assert list(directory.glob("*.sock")) == []
        client.sendall(b"still here")
        assert served.recv(100) == b"still here"
        newer, newly_served = connected(backend)
        assert it.converge(SCOPE, NAMESPACE, (wanted,)) == []
        assert process.start_time(old.pid) is not None
        assert it.stop(SCOPE) == ["stop lb"]
        assert process.group(old.pid) == process.group(new) == []
        for sock in (client, served, newer, newly_served):
            sock.close()
    old.wait()


def connected(backend: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A connection through the balancer: the client's end and the backend's. Health checks send nothing, or a reset."""
    backend.settimeout(20)
    with inside(NAMESPACE):
        client = socket.create_connection(("10.10.1.1", 8000), timeout=20)
    client.sendall(b"hello")
    while True:
        served, _ = backend.accept()
        served.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            if served.recv(100) == b"hello":
                return client, served
        served.close()
