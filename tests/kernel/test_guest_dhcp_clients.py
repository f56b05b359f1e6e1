"""DHCP with three real clients (udhcpc, dhclient, dhcpcd): lease, renewal, a reassigned address, UDP checksums."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestbed import SERVER, Agent, Segment, guest_process, network, nic, run, segment
from netloom.guestwire import option_bytes
from netns import inside

WEB = nic(45, hostname="web-1", options={42: option_bytes(42, "192.0.2.123")})
SECOND = nic(46, hostname="web-1", default_nic=False)
TABLE = network(WEB, SECOND, mtu=1450)

# Longer than the random delays of the clients. No test asserts on speed.
PATIENCE_S = 40.0


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Agent, Segment]]:
    with guest_process() as process, segment() as on:
        agent = process.connect()
        sockets = on.sockets(["dhcp"])
        assert agent.serve(TABLE, sockets).error == ""
        for sock in sockets:
            sock.close()
        yield agent, on


def read(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


def udhcpc(vm: str, directory: Path, *more: str) -> dict[str, str]:
    """Run busybox's client until it has a lease; return the variables that its script got with the last event."""
    script = directory / "script"
    script.write_text(f'#!/bin/sh\n[ "$1" = deconfig ] || {{ env; echo "event=$1"; }} > {directory}/got\n')
    script.chmod(0o755)
    options = ["-O", "mtu", "-O", "search", "-O", "ntpsrv", "-t", "15", "-T", "1", "-s", str(script), *more]
    run("ip", "netns", "exec", vm, "busybox", "udhcpc", "-i", "eth0", "-q", "-n", "-f", *options, timeout_s=PATIENCE_S)
    return read(directory / "got")


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_udhcpc_gets_a_lease_with_all_options(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    _, on = served
    got = udhcpc(on.vm(WEB), tmp_path)
    assert got["event"] == "bound"
    assert (got["ip"], got["mask"], got["router"]) == ("10.1.1.45", "24", SERVER)
    assert (got["dns"], got["domain"], got["search"]) == (f"{SERVER} 192.0.2.53", "cs1.example", "cs1.example example")
    assert (got["hostname"], got["mtu"], got["ntpsrv"]) == ("web-1", "1450", "192.0.2.123")
    assert (got["lease"], got["serverid"], got["broadcast"]) == ("43200", SERVER, "10.1.1.255")


def test_udhcpc_renews_its_lease(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    _, on = served
    vm, log, script = on.vm(WEB), tmp_path / "events", tmp_path / "script"
    script.write_text(f'#!/bin/sh\nip addr replace "$ip/$mask" dev eth0 2>&-\necho "$1 $ip $lease" >> {log}\n')
    script.chmod(0o755)
    words = ["busybox", "udhcpc", "-i", "eth0", "-f", "-t", "5", "-T", "1", "-s", str(script)]
    client = subprocess.Popen(["ip", "netns", "exec", vm, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: log.exists() and f"bound {WEB.ip} 43200" in log.read_text(), "udhcpc was not bound")
        client.send_signal(signal.SIGUSR1)  # busybox: renew
        until(lambda: f"renew {WEB.ip} 43200" in log.read_text(), "udhcpc did not renew")
    finally:
        client.terminate()
        client.wait()


@pytest.mark.mutation("only-the-default-nic-gets-a-router", instead="True")
def test_defect_36_a_nic_that_is_not_the_default_gets_no_router(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    _, on = served
    got = udhcpc(on.vm(SECOND), tmp_path)
    assert (got["ip"], got["mask"], got["hostname"]) == ("10.1.1.46", "24", "web-1")
    assert not {"router", "dns", "domain", "search"} & set(got)


def test_a_mac_address_without_a_nic_gets_no_lease(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    _, on = served
    with pytest.raises(subprocess.CalledProcessError):
        udhcpc(on.vm(WEB, mac="02:00:00:00:00:99", neighbour=False), tmp_path, "-t", "2")


def test_dhclient_gets_and_renews_a_lease(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    _, on = served
    vm, log = on.vm(WEB), tmp_path / "events"
    script = tmp_path / "script"
    script.write_text(
        "#!/bin/sh\n"
        f'[ "$reason" = BOUND ] && ip addr replace $new_ip_address/$new_subnet_mask dev eth0\n'
        f'echo "$reason $new_ip_address $new_routers $new_dhcp_lease_time" >> {log}\n'
    )
    script.chmod(0o755)
    # The configuration makes the client renew after seconds instead of hours.
    config = tmp_path / "dhclient.conf"
    config.write_text(
        'send dhcp-client-identifier "an id of its own";\n'
        "supersede dhcp-renewal-time 2;\nrequest subnet-mask, routers;\n"
    )
    files = ["-lf", str(tmp_path / "leases"), "-pf", str(tmp_path / "pid"), "-cf", str(config)]
    client = subprocess.Popen(
        ["ip", "netns", "exec", vm, "dhclient", "-d", "-4", *files, "-sf", str(script), "eth0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: log.exists() and "RENEW" in log.read_text(), "dhclient did not renew")
    finally:
        client.terminate()
        said = client.communicate()[1]
    events = log.read_text().splitlines()
    assert f"BOUND 10.1.1.45 {SERVER} 43200" in events
    assert f"RENEW 10.1.1.45 {SERVER} 43200" in events
    assert f"DHCPREQUEST for 10.1.1.45 on eth0 to {SERVER}" in said  # the renewal was unicast
    assert "bad" not in said, said  # no complaint about checksums


def test_dhclient_rebinds_when_its_server_is_silent(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    _, on = served
    vm, said = on.vm(WEB), tmp_path / "said"
    script = tmp_path / "script"
    script.write_text(
        '#!/bin/sh\n[ "$reason" = BOUND ] || exit 0\n'
        f"ip addr replace $new_ip_address/24 dev eth0\nip route add blackhole {SERVER}\n"
    )
    script.chmod(0o755)
    # Unicast renewals fail, because of the route; then the client broadcasts.
    config = tmp_path / "dhclient.conf"
    config.write_text(
        "supersede dhcp-renewal-time 1;\nsupersede dhcp-rebinding-time 3;\nrequest subnet-mask, routers;\n"
    )
    files = ["-lf", str(tmp_path / "leases"), "-pf", str(tmp_path / "pid"), "-cf", str(config)]
    words = ["dhclient", "-d", "-4", *files, "-sf", str(script), "eth0"]
    with said.open("w") as log:
        client = subprocess.Popen(["ip", "netns", "exec", vm, *words], stdout=subprocess.DEVNULL, stderr=log)
    try:
        until(lambda: said.read_text().count("\nbound to ") >= 2, "dhclient did not rebind")
    finally:
        client.terminate()
        client.wait()
    again = said.read_text().split("\nbound to ")[1]
    assert f"DHCPREQUEST for {WEB.ip} on eth0 to 255.255.255.255" in again
    assert f"DHCPACK of {WEB.ip} from {SERVER}" in again


def test_dhcpcd_gets_and_renews_a_lease(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    _, on = served
    vm, log = on.vm(WEB), tmp_path / "events"
    script = tmp_path / "script"
    script.write_text(
        f'#!/bin/sh\necho "$reason $new_ip_address $new_routers $new_interface_mtu $new_domain_name_servers" >> {log}\n'
    )
    script.chmod(0o755)
    config = tmp_path / "conf"
    config.write_text("option routers, domain_name_servers, interface_mtu\noption subnet_mask\nnoarp\nnoipv6rs\n")
    # The client gets its own /run and /var/lib, so that it does not change the files of the machine.
    inside = (
        "mount -t tmpfs none /var/lib && mount -t tmpfs none /run && mkdir -p /var/lib/dhcpcd /run/dhcpcd && "
        f"exec dhcpcd -B -4 -f {config} -c {script} --noipv4ll eth0"
    )
    command = ["ip", "netns", "exec", vm, "unshare", "-m", "sh", "-c", inside]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        bound = f"BOUND 10.1.1.45 {SERVER} 1450 {SERVER} 192.0.2.53"
        until(lambda: log.exists() and bound in log.read_text(), "dhcpcd was not bound")
        client.send_signal(signal.SIGUSR1)  # dhcpcd(8): rebind
        until(lambda: "REBIND" in log.read_text() or "RENEW" in log.read_text(), "dhcpcd did not ask again")
    finally:
        client.terminate()
        client.communicate()


def test_a_reassigned_address_is_leased_to_the_new_vm_at_once(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    agent, on = served
    heir = nic(47, ip=WEB.ip, hostname="heir")
    assert udhcpc(on.vm(WEB), tmp_path)["ip"] == WEB.ip
    try:
        agent.update(network(heir, revision=3))
        got = udhcpc(on.vm(heir), tmp_path)
        assert (got["ip"], got["hostname"]) == (WEB.ip, "heir")
        with pytest.raises(subprocess.CalledProcessError):
            udhcpc(on.vm(WEB, neighbour=False), tmp_path, "-t", "2")
    finally:
        agent.update(TABLE)
        on.know(WEB)


def test_the_udp_checksum_on_the_wire_is_valid_or_absent(served: tuple[Agent, Segment], tmp_path: Path) -> None:
    _, on = served
    vm = on.vm(WEB)
    with inside(vm):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    with raw:
        raw.settimeout(20)
        udhcpc(vm, tmp_path)
        seen = 0
        while seen < 2:
            frame = raw.recv(2048)
            if frame[23] != 17 or frame[34:36] != struct.pack("!H", 67):
                continue
            seen += 1
            assert frame[26:30] == socket.inet_aton(SERVER)
            length, checksum = struct.unpack("!HH", frame[38:42])
            pseudo = frame[26:34] + struct.pack("!BBH", 0, 17, length)
            total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
            datagram = frame[34 : 34 + length]
            total += sum(struct.unpack(f"!{(length + 1) // 2}H", datagram + b"\0" * (length % 2)))
            while total >> 16:
                total = (total & 0xFFFF) + (total >> 16)
            assert checksum == 0 or total == 0xFFFF
