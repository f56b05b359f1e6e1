"""The guest process when the agent restarts, and the next guest process: no request that waits in a socket is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from guestbed import SERVER, GuestProcess, guest_process, network, nic, run, segment
from kernel.agent_host import wait_until
from netloom.guestwire import GUEST_PROTOCOL, Listener, Served
from netloom.secret import Secret

WEB = nic(45, metadata={"local-hostname": "web-1"}, password=Secret("FAKE"), password_id="7")
ALL = (Listener("dhcp"), Listener("metadata"), Listener("password"))


def host_name(vm: str) -> str:
    return run(
        "ip", "netns", "exec", vm, "curl", "-sf", "--max-time", "20", f"http://{SERVER}/latest/local-hostname"
    ).stdout


def descriptors(process: GuestProcess) -> int:
    """The number of open file descriptors of the guest process."""
    return len(os.listdir(f"/proc/{process.process.pid}/fd"))


def ask_password_service(vm: str, word: str) -> str:
    return run("ip", "netns", "exec", vm, "curl", "-s", "-H", f"DomU_Request: {word}", f"http://{SERVER}:8080").stdout


def test_networks_are_served_without_an_agent_and_with_a_new_agent() -> None:
    with guest_process() as process, segment() as on:
        first = process.connect()
        assert (first.hello.served, first.hello.build, first.hello.protocol) == ((), "b1", GUEST_PROTOCOL)
        sockets = on.sockets()
        assert first.serve(network(WEB, revision=12), sockets).error == ""
        for sock in sockets:
            sock.close()
        vm = on.vm(WEB, ip=WEB.ip)
        assert host_name(vm) == "web-1"
        first.close()
        assert host_name(vm) == "web-1"
        assert [ask_password_service(vm, "send_my_password"), ask_password_service(vm, "saved_password")] == [
            "FAKE",
            "saved_password",
        ]
        second = process.connect()
        assert second.hello.served == (Served("net-204", "204", 12, ALL),)
        assert second.taken().password_id == "7"  # acknowledged while no agent was connected
        assert second.update(network(nic(45, metadata={"local-hostname": "web-2"}), revision=13)).error == ""
        assert host_name(vm) == "web-2"
        # A third connection while the second is open: the latest connection is the agent's.
        third = process.connect()
        assert third.hello.served[0].revision == 13
        assert third.drop().error == ""
        assert third.drop().error == ""
        assert process.connect().hello.served == ()


def test_an_invalid_table_or_socket_changes_nothing() -> None:
    with guest_process() as process, segment() as on:
        agent = process.connect()
        assert "is not served" in agent.update(network(WEB)).error
        sockets = on.sockets()
        assert agent.serve(network(WEB), sockets).error == ""
        before = descriptors(process)
        vm = on.vm(WEB, ip=WEB.ip)
        assert "two NICs with address" in agent.update(network(WEB, nic(46, ip=WEB.ip), revision=2)).error
        assert "lease_s" in agent.update(network(WEB, revision=2, lease_s=0xFFFFFFFF)).error
        assert "not AF_INET SOCK_DGRAM" in agent.serve(network(WEB, revision=2), sockets[1:], *ALL[:2]).error
        with socket.socket() as plain:
            assert "does not listen" in agent.serve(network(WEB, revision=2), [plain], ALL[1]).error
        assert host_name(vm) == "web-1"
        for _ in range(5):
            assert agent.serve(network(WEB, revision=3), sockets).error == ""
            assert agent.serve(network(WEB, revision=3), sockets[1:], *ALL[:2]).error != ""
        assert host_name(vm) == "web-1"
        wait_until(lambda: descriptors(process) == before)  # a connection may still be closing


def test_a_request_sent_while_no_process_runs_is_answered_by_the_next_process() -> None:
    with segment() as on:
        vm = on.vm(WEB, ip=WEB.ip)
        with guest_process() as process:
            sockets = on.sockets()
            process.connect().serve(network(WEB), sockets)
            for sock in sockets:
                sock.close()
            # A later agent, which has none of the sockets, borrows them.
            lent, copies = process.connect().lend()
            assert lent.listeners == ALL
            assert host_name(vm) == "web-1"
            process.stop(signal.SIGKILL)
        url = f"http://{SERVER}/latest/local-hostname"
        early = subprocess.Popen(
            ["ip", "netns", "exec", vm, "curl", "-sf", "--max-time", "20", url], stdout=subprocess.PIPE
        )
        with guest_process() as process:
            assert process.connect().serve(network(WEB), copies).error == ""
            assert early.communicate(timeout=30)[0] == b"web-1"
        for sock in copies:
            sock.close()


def test_an_answer_in_progress_is_completed_before_the_process_ends(tmp_path: Path) -> None:
    big, file = "x" * 4_000_000, tmp_path / "user-data"
    with guest_process() as process, segment() as on:
        agent = process.connect()
        agent.serve(network(nic(45, user_data=Secret(big))), on.sockets())
        vm = on.vm(WEB, ip=WEB.ip)
        curl = ["curl", "-sf", "--limit-rate", "4M", "-o", str(file), f"http://{SERVER}/latest/user-data"]
        slow = subprocess.Popen(["ip", "netns", "exec", vm, *curl])
        wait_until(lambda: file.exists() and file.stat().st_size)
        assert process.stop() == 0
        assert slow.wait(20) == 0
        assert file.stat().st_size == len(big)


def test_a_dropped_network_leaves_no_open_descriptors() -> None:
    with guest_process() as process, segment() as on:
        agent = process.connect()
        sockets = on.sockets()
        empty = descriptors(process)
        agent.serve(network(WEB), sockets)
        for sock in sockets:
            sock.close()
        vm = on.vm(WEB, ip=WEB.ip)
        assert host_name(vm) == "web-1"
        agent.drop()
        refused = run("ip", "netns", "exec", vm, "curl", "-s", f"http://{SERVER}/", check=False)
        assert refused.returncode == 7
        wait_until(lambda: descriptors(process) == empty)  # a connection may still be closing
