"""The agent's supervisor with real dnsmasq and haproxy processes in a namespace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from kernel.supervised import BALANCED, NAMESPACE, NETWORK, RULE, SCOPE, namespace, running_supervisor  # noqa: F401
from netloom.agent.backoff import Backoff
from netloom.agent.budget import Budget
from netloom.agent.kernel.namespaces import inside
from netloom.agent.log import Log
from netloom.agent.processes import liveness, process, supervisor
from netloom.agent.processes.failures import ServicesFailed
from netloom.agent.processes.guest_process import GuestProcess
from netloom.errors import HostRefused
from netloom.render import dnsmasq, haproxy, service
from netloom.state import Backend, Nic
from netloom.state.served import Served

pytestmark = pytest.mark.usefixtures("namespace")


def _lookup(name: str) -> str:
    with inside(NAMESPACE):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(20)
        question = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
        sock.sendto(
            b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + question + b"\0\x00\x01\x00\x01", ("10.10.1.1", 53)
        )
        answer = sock.recv(512)
    return ".".join(map(str, answer[-4:])) if answer[7] else f"rcode {answer[3] & 15}"


def test_names_are_added_and_removed_without_a_restart() -> None:
    with running_supervisor() as (it, _, wait_until):
        it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, NETWORK),))
        pid = it.states()[SCOPE]["dns-9204"]
        assert _lookup("web-1.cloud.internal") == "10.10.1.45"
        more = replace(
            NETWORK, nics={"u2": Nic(mac="02:01:00:cc:00:04", ip="10.10.1.46", hostname="web-2", named=True)}
        )
        did = it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, more),))
        assert did == ["write dns-9204/nic-u2", "remove dns-9204/nic-u1"]
        wait_until(lambda: _lookup("web-2.cloud.internal") == "10.10.1.46")
        wait_until(lambda: _lookup("web-1.cloud.internal") == "rcode 3")
        renamed = replace(NETWORK, nics={"u2": replace(more.nics["u2"], hostname="web-3")})
        assert it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, renamed),)) == ["write dns-9204/nic-u2"]
        wait_until(lambda: _lookup("web-3.cloud.internal") == "10.10.1.46")
        assert _lookup("web-2.cloud.internal") == "rcode 3"
        assert it.states()[SCOPE]["dns-9204"] == pid
        assert it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, renamed),)) == []


def test_a_deleted_service_directory_is_recreated_and_watched() -> None:
    with running_supervisor() as (it, _, _wait_until):
        wanted = dnsmasq.service(SCOPE, NETWORK)
        it.converge(SCOPE, NAMESPACE, (wanted,))
        assert _lookup("web-1.cloud.internal") == "10.10.1.45"
        shutil.rmtree(Path(wanted.directory).parent)
        assert f"start {wanted.name}" in it.converge(SCOPE, NAMESPACE, (wanted,))
        assert _lookup("web-1.cloud.internal") == "10.10.1.45"
        assert it.converge(SCOPE, NAMESPACE, (wanted,)) == []


def test_a_killed_process_is_reported_and_restarted() -> None:
    with running_supervisor() as (it, died, wait_until):
        wanted = (dnsmasq.service(SCOPE, NETWORK),)
        it.converge(SCOPE, NAMESPACE, wanted)
        wait_until(lambda: True)
        os.kill(it.states()[SCOPE]["dns-9204"], signal.SIGKILL)
        wait_until(lambda: died == ["dns-9204 died"])
        assert it.converge(SCOPE, NAMESPACE, wanted) == ["start dns-9204"]
        assert _lookup("data-server.cloud.internal") == "10.10.1.1"


def test_repeated_crashes_back_off_exponentially(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF", Backoff((0.0, 0.3, 0.6), settled_s=60.0))
    with running_supervisor() as (it, died, wait_until):
        wanted = (dnsmasq.service(SCOPE, NETWORK),)
        waited = []
        for turn in range(1, 5):
            it.converge(SCOPE, NAMESPACE, wanted)
            wait_until(lambda: True)
            os.kill(it.states()[SCOPE]["dns-9204"], signal.SIGKILL)
            since = time.monotonic()
            wait_until(lambda count=turn: len(died) == count)  # type: ignore[misc]
            waited.append(time.monotonic() - since)
        assert waited[1] >= 0.3
        assert min(waited[2:]) >= 0.6
        assert it.crashes(SCOPE) == {"dns-9204": 4}
        it.converge(SCOPE, NAMESPACE, wanted)
        wait_until(lambda: True)
        os.kill(it.states()[SCOPE]["dns-9204"], signal.SIGKILL)
        # It has run long enough: the earlier failures are forgotten.
        monkeypatch.setattr(supervisor, "BACKOFF", Backoff((0.0, 60.0), settled_s=0.0))
        wait_until(lambda: len(died) == 5)


def test_a_new_supervisor_adopts_running_processes() -> None:
    with running_supervisor() as (first, _, _wait_until):
        wanted = (dnsmasq.service(SCOPE, NETWORK),)
        first.converge(SCOPE, NAMESPACE, wanted)
        with running_supervisor() as (second, died, wait_until):
            assert second.converge(SCOPE, NAMESPACE, wanted) == []
            assert second.states() == first.states()
            wait_until(lambda: True)
            os.kill(second.states()[SCOPE]["dns-9204"], signal.SIGKILL)
            wait_until(lambda: died == ["dns-9204 died"])


@pytest.mark.mutation("a-recycled-pid-is-another-process", instead="start_time(record.pid) > 0")
def test_defect_62_a_reused_pid_is_not_mistaken_for_our_process() -> None:
    with running_supervisor() as (it, _, _wait_until):
        wanted = dnsmasq.service(SCOPE, NETWORK)
        Path(wanted.directory).mkdir(parents=True)
        innocent = subprocess.Popen(["sleep", "60"], start_new_session=True)
        record = f'{{"pid":{innocent.pid},"started":1,"digest":""}}'
        (Path(wanted.directory) / "running.json").write_text(record)
        assert "start dns-9204" in it.converge(SCOPE, NAMESPACE, (wanted,))
        assert innocent.poll() is None
        innocent.kill()
        innocent.wait()


@pytest.mark.mutation("a-call-does-not-wait-for-other-services")
def test_a_service_that_failed_is_tried_again_for_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def counted(wanted: service.Service, *others: Any) -> int:
        started.append(wanted.name)
        return process.start(wanted, *others)

    monkeypatch.setattr(supervisor, "start", counted)
    names: frozenset[Served] = frozenset({"dns"})
    resolver = dnsmasq.service(SCOPE, NETWORK)
    broken = replace(resolver, argv=("false", *resolver.argv[1:]))
    with running_supervisor() as (it, _, _wait_until):
        for asked in (frozenset(), frozenset(), names, None):
            with pytest.raises(ServicesFailed) as failed:
                it.converge(SCOPE, NAMESPACE, (broken,), asked)
            assert [(one.name, one.serves, one.stale) for one in failed.value.failures] == [("dns-9204", names, False)]
        assert len(started) == 3  # not for the second one, which does not ask for names
        assert it.converge(SCOPE, NAMESPACE, (resolver,), names) == ["start dns-9204"]
        assert it.converge(SCOPE, NAMESPACE, (resolver,), frozenset()) == []


@pytest.mark.parametrize("name", ["dns-9204", "lb"])
def test_an_unrecorded_process_is_ended_before_a_new_one_starts(name: str) -> None:
    """The agent was killed after the start. A second dnsmasq could not bind; a second haproxy would share the port."""
    balancer = haproxy.service(BALANCED)
    assert balancer is not None
    wanted = {"dns-9204": dnsmasq.service(SCOPE, NETWORK), "lb": balancer}[name]
    with running_supervisor() as (first, _, _wait_until):
        first.converge(SCOPE, NAMESPACE, (wanted,))
        stray = first.states()[SCOPE][name]
        (Path(wanted.directory) / "running.json").unlink()
        with running_supervisor() as (second, _, _wait_until):
            assert second.converge(SCOPE, NAMESPACE, (wanted,)) == [f"start {name}"]
            assert second.states()[SCOPE][name] != stray
            assert process.start_time(stray) is None


def test_a_reload_of_haproxy_keeps_established_connections() -> None:
    with inside(NAMESPACE):
        backend = socket.create_server(("10.10.1.1", 9000))
    backend.settimeout(20)
    with backend, running_supervisor() as (it, died, wait_until):
        wanted = haproxy.service(BALANCED)
        assert wanted is not None
        it.converge(SCOPE, NAMESPACE, (wanted,))
        with inside(NAMESPACE):
            client = socket.create_connection(("10.10.1.1", 8000), timeout=20)
        served = _accept_talking(backend, client)
        more = replace(RULE, rule_id=2, public_port=8001)
        changed = haproxy.service(replace(BALANCED, lb_rules={"1": RULE, "2": more}))
        assert changed is not None
        assert it.converge(SCOPE, NAMESPACE, (changed,)) == ["reload lb"]
        wait_until(lambda: _connects(8001))
        client.sendall(b"still here")
        assert served.recv(100) == b"still here"
        client.close()
        assert died == []
        assert it.converge(SCOPE, NAMESPACE, ()) == ["stop lb"]
        assert not _connects(8000)
        assert not Path(wanted.directory).exists()


# A master that handles a signal only with the next event, like haproxy when it arrives just before its wait.
SLEEPY_MASTER = """
import os, signal, socket, sys
asked = []
signal.signal(signal.SIGUSR2, lambda *_: asked.append(1))

def work():
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        listener = socket.create_server(("10.10.1.1", 8000), reuse_port=True)
        os.write(told, b"x")
        while True:
            signal.pause()
    os.read(ready, 1)
    return pid

events = socket.socket(socket.AF_UNIX)
events.bind(sys.argv[1])
events.listen()
worker = work()
while True:
    events.accept()[0].close()
    if asked:
        asked.clear()
        old, worker = worker, work()
        os.kill(old, signal.SIGKILL)
        os.waitpid(old, 0)
"""


@pytest.mark.mutation("a-sleeping-master-is-woken")
def test_a_haproxy_master_that_missed_its_signal_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RELOAD_S_MAX", 10.0)
    directory = f"{service.SERVICES_DIR}/{SCOPE}/lb"
    sleepy = service.Service(
        name="lb",
        directory=directory,
        argv=("python3", "-c", SLEEPY_MASTER, "/sockets/master.sock"),
        config={"lb.cfg": "1"},
        on_change="reload",
        listens=(("tcp", 8000),),
        probe=service.Probe("haproxy", "/sockets/master.sock"),
    )
    with running_supervisor() as (it, _, _wait_until):
        it.converge(SCOPE, NAMESPACE, (sleepy,))
        assert it.converge(SCOPE, NAMESPACE, (replace(sleepy, config={"lb.cfg": "2"}),)) == ["reload lb"]


@pytest.mark.mutation("a-reload-waits-for-the-new-worker", instead="os.kill(running.record.pid, signal.SIGUSR2)")
def test_after_a_reload_new_clients_use_the_new_configuration() -> None:
    """``converge`` returns when the old worker has stopped listening; until then it gets every second connection."""
    with inside(NAMESPACE):
        backends = [socket.create_server(("10.10.1.1", port)) for port in (9000, 9001)]
    names = {backend.getsockname()[1]: name for backend, name in zip(backends, (b"old", b"new"), strict=True)}
    for backend in backends:
        threading.Thread(target=_greet, args=(backend, names[backend.getsockname()[1]]), daemon=True).start()
    with running_supervisor() as (it, _, _wait_until):
        for turn in range(4):
            port = (9000, 9001)[turn % 2]
            rule = replace(RULE, backends=(Backend(ip="10.10.1.1", port=port),))
            wanted = haproxy.service(replace(BALANCED, lb_rules={"1": rule}))
            assert wanted is not None
            it.converge(SCOPE, NAMESPACE, (wanted,))
            assert {_first_word(8000) for _ in range(30)} == {names[port]}
    for backend in backends:
        backend.shutdown(socket.SHUT_RDWR)
        backend.close()


def test_a_failed_reload_is_an_error_and_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RELOAD_S_MAX", 1.0)
    with running_supervisor() as (it, _, _wait_until):
        wanted = haproxy.service(BALANCED)
        more = haproxy.service(replace(BALANCED, lb_rules={"1": RULE, "2": replace(RULE, rule_id=2, public_port=8001)}))
        assert wanted is not None and more is not None
        it.converge(SCOPE, NAMESPACE, (wanted,))
        with inside(NAMESPACE):
            thief = socket.create_server(("10.10.1.1", 8001))
        with thief, pytest.raises(ServicesFailed, match="lb keeps its old configuration") as failed:
            it.converge(SCOPE, NAMESPACE, (more,))
        assert failed.value.failures[0].stale
        monkeypatch.setattr(supervisor, "RELOAD_S_MAX", 20.0)
        assert it.converge(SCOPE, NAMESPACE, (more,)) == ["reload lb"]
        assert _connects(8000) and _connects(8001)


@pytest.mark.parametrize("name", ["dns-9204", "lb"])
def test_a_hung_process_is_killed_and_a_slow_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(liveness, "ANSWER_S", 0.4)
    monkeypatch.setattr(liveness, "PAUSE_S", 0.1)
    balancer = haproxy.service(BALANCED)
    assert balancer is not None
    wanted = {"dns-9204": dnsmasq.service(SCOPE, NETWORK), "lb": balancer}[name]
    log = tmp_path / "log"
    loop = asyncio.new_event_loop()
    died: list[str] = []
    it = supervisor.Supervisor(loop, lambda scope_id, why: died.append(why))
    guest_process = GuestProcess(loop, Log(str(log)), ["false"], "b", lambda taken: None, tmp_path)

    often = Budget(share=1.0).checks(0.1, liveness.PROBE_CPU_S)
    busy = False
    # The results of the probes that the process answered or not, and of those that decide about it.
    answers: list[bool] = []
    verdicts: list[bool] = []
    real_answers, real_hung = liveness.LivenessProbes._answers, liveness.hung

    async def answers_recorded(self: liveness.LivenessProbes, target: supervisor.ProbeTarget) -> bool:
        answers.append(await real_answers(self, target))
        return answers[-1]

    async def hung_recorded(answers: Callable[[], Awaitable[bool]], questions: int = 0) -> bool:
        if not questions:  # of the guest process, which does not run here
            return await real_hung(answers)
        verdicts.append(await real_hung(answers, questions))
        return verdicts[-1]

    async def recorded(results: list[bool], *wanted: bool) -> None:
        """Wait until these results have been appended to ``results``, in this order but not in a row."""
        new = len(results)
        async with asyncio.timeout(30):
            for result in wanted:
                while result not in results[new:]:  # noqa: ASYNC110, appended by the patched functions
                    await asyncio.sleep(0.01)
                new = results.index(result, new) + 1

    monkeypatch.setattr(liveness.LivenessProbes, "_answers", answers_recorded)
    monkeypatch.setattr(liveness, "hung", hung_recorded)

    async def scenario() -> None:
        nonlocal busy
        probing = asyncio.ensure_future(
            liveness.LivenessProbes(loop, Log(str(log)), it, guest_process, lambda scope_id: busy).run(often)
        )
        await loop.run_in_executor(None, it.converge, SCOPE, NAMESPACE, (wanted,))
        pid = it.states()[SCOPE][name]
        await recorded(verdicts, *[False] * 5)
        os.killpg(pid, signal.SIGSTOP)
        await recorded(answers, False)
        os.killpg(pid, signal.SIGCONT)
        await recorded(verdicts, *[False] * 5)
        assert died == [] and process.alive(process.record_of(pid))
        busy = True  # while the scope is busy, unanswered probes do not count
        os.killpg(pid, signal.SIGSTOP)
        await recorded(verdicts, True, True)  # by the second verdict, a wrong kill after the first is in ``died``
        assert died == [] and process.alive(process.record_of(pid))
        busy = False
        async with asyncio.timeout(30):
            while not died:  # noqa: ASYNC110, set by another thread
                await asyncio.sleep(0.02)
        probing.cancel()
        assert died == [f"{name} hung"]
        assert it.crashes(SCOPE) == {name: 1}
        assert await loop.run_in_executor(None, it.converge, SCOPE, NAMESPACE, (wanted,)) == [f"start {name}"]
        await loop.run_in_executor(None, it.stop, SCOPE)
        await asyncio.sleep(0.05)

    loop.run_until_complete(scenario())
    loop.close()
    assert f"scope={SCOPE} {name} (pid " in log.read_text()


@pytest.mark.mutation("resolver-is-also-asked-over-tcp")
def test_a_resolver_flooded_over_udp_does_not_count_as_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "ANSWER_S", 0.5)
    monkeypatch.setattr(liveness, "PAUSE_S", 0.0)
    loop = asyncio.new_event_loop()
    it = supervisor.Supervisor(loop, print)
    it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, NETWORK),))
    target = it.next_probe_target()
    assert target is not None
    # Drop UDP datagrams to port 53, as a full socket buffer does.
    drop = "add table t; add chain t c { type filter hook input priority 0; }; add rule t c udp dport 53 drop"
    subprocess.run(["ip", "netns", "exec", NAMESPACE, "nft", drop], check=True)
    probes = liveness.LivenessProbes(
        loop, Log("/dev/null"), it, GuestProcess(loop, Log("/dev/null"), [], "b", print), lambda it: False
    )
    loop.run_until_complete(probes._probe_service(target))
    loop.run_until_complete(asyncio.sleep(0.3))  # time for a killed process to die
    assert process.alive(target.record)
    assert it.crashes(SCOPE) == {}
    it.stop(SCOPE)
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()


@pytest.mark.mutation("each-process-is-probed-in-turn", instead="None")
def test_each_process_has_its_turn_to_be_probed_and_a_new_one_is_the_last() -> None:
    balancer, resolver = haproxy.service(BALANCED), dnsmasq.service(SCOPE, NETWORK)
    assert balancer is not None
    with running_supervisor() as (it, _, _wait_until):
        assert (it.next_probe_target(), it.number) == (None, 0)
        for services, turns in (
            ((balancer,), ["lb", "lb"]),
            ((balancer, resolver), ["lb", "dns-9204", "lb", "dns-9204"]),
        ):
            it.converge(SCOPE, NAMESPACE, services)
            targets = [it.next_probe_target() for _ in turns]
            assert [target and target.name for target in targets] == turns
            assert it.number == len(services)


@pytest.mark.mutation("a-late-prober-proves-nothing")
def test_unanswered_probes_on_an_overloaded_machine_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PAUSE_S", 0.0)
    clock = iter(range(0, 1000, 10))  # every reading is ten seconds later
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    async def nothing() -> bool:
        return False

    assert not asyncio.run(liveness.hung(nothing))


@pytest.mark.mutation("a-refused-file-stays-a-candidate")
def test_defect_40_a_refused_configuration_leaves_the_old_process_serving() -> None:
    with running_supervisor() as (it, _, _wait_until):
        wanted = haproxy.service(BALANCED)
        assert wanted is not None
        it.converge(SCOPE, NAMESPACE, (wanted,))
        bad = replace(wanted, config={"haproxy.cfg": wanted.config["haproxy.cfg"] + "\n    bind nonsense\n"})
        with pytest.raises(HostRefused, match="the configuration was refused"):
            it.converge(SCOPE, NAMESPACE, (bad,))
        assert _connects(8000)
        assert it.converge(SCOPE, NAMESPACE, (wanted,)) == []


@pytest.mark.mutation("a-killed-replacement-leaves-no-file")
def test_files_that_a_killed_agent_was_about_to_replace_are_removed() -> None:
    with running_supervisor() as (it, _, _wait_until):
        wanted = dnsmasq.service(SCOPE, NETWORK)
        it.converge(SCOPE, NAMESPACE, (wanted,))
        directory = Path(wanted.directory)
        names = sorted(str(path) for path in directory.rglob("*"))
        for left in (
            ".dnsmasq.conf.candidate.new",
            "dnsmasq.conf.candidate",
            f"{wanted.watched_directory}/.device.new",
        ):
            (directory / left).write_text("")
        loop = asyncio.new_event_loop()
        supervisor.Supervisor(loop, print)
        loop.close()
        assert sorted(str(path) for path in directory.rglob("*")) == names


@pytest.mark.mutation(
    "the-end-is-of-one-scope", instead="[step for key in list(self._running) for step in self._stop(*key)]"
)
def test_defect_28_ending_a_scope_does_not_affect_one_with_the_same_prefix() -> None:
    for words in ("link add gst-920 type veth peer name third", "addr add 10.10.2.1/24 dev gst-920"):
        subprocess.run(["ip", "-n", NAMESPACE, *words.split()], check=True)
    with running_supervisor() as (it, _, _wait_until):
        short = replace(NETWORK, network_id="920", gateway="10.10.2.1")
        it.converge(SCOPE, NAMESPACE, (dnsmasq.service(SCOPE, NETWORK),))
        it.converge("net-920", NAMESPACE, (dnsmasq.service("net-920", short),))
        assert it.stop("net-920") == ["stop dns-920"]
        assert _lookup("web-1.cloud.internal") == "10.10.1.45"
        assert list(it.states()) == [SCOPE]


@pytest.mark.mutation("the-end-is-of-one-scope", instead='[f"stop {name}" for name in self._known(scope_id)]')
def test_defect_41_ending_a_scope_leaves_no_process_or_file() -> None:
    with running_supervisor() as (it, _, _wait_until):
        wanted = dnsmasq.service(SCOPE, NETWORK)
        it.converge(SCOPE, NAMESPACE, (wanted,))
        pid = it.states()[SCOPE]["dns-9204"]
        assert it.stop(SCOPE) == ["stop dns-9204"]
        assert not Path(wanted.directory).parent.exists()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        assert not Path(f"/proc/{pid}").exists()


def _connects(port: int) -> bool:
    with inside(NAMESPACE):
        try:
            socket.create_connection(("10.10.1.1", port), timeout=20).close()
        except OSError:
            return False
    return True


def _greet(backend: socket.socket, word: bytes) -> None:
    """Send the word to each client, until the socket is shut down."""
    while True:
        try:
            served, _ = backend.accept()
        except OSError:
            return
        with served, contextlib.suppress(OSError):  # a health check disconnects first
            served.sendall(word)


def _first_word(port: int) -> bytes:
    with inside(NAMESPACE):
        client = socket.create_connection(("10.10.1.1", port), timeout=20)
    with client:
        return client.recv(16)


def _accept_talking(backend: socket.socket, client: socket.socket) -> socket.socket:
    """Accept the client's connection. Connections of health checks, which send nothing, are skipped."""
    client.sendall(b"hello")
    while True:
        served, _ = backend.accept()
        served.settimeout(20)
        if served.recv(100) == b"hello":
            return served
        served.close()
