"""Metadata and passwords: VMs fetch their own, and neighbours on the segment cannot fetch those of others."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Iterator

import msgspec
import pytest

from guestbed import LINK, SERVER, Agent, GuestProcess, Segment, guest_process, network, nic, run, segment
from kernel.agent_host import wait_until
from netloom.guest import http, limits
from netloom.guestwire import GuestNic, Listener
from netloom.secret import Secret
from netns import inside

USER_DATA = '#cloud-config\nwrite_files:\n - {path: /x, content: "it\'s café & 100%"}\n\n\n'
WEB = nic(
    45,
    user_data=Secret(USER_DATA),
    metadata={
        "service-offering": "Medium Instance",
        "local-hostname": "web-1",
        "public-hostname": "",
        "instance-id": "9f000000-0000-4000-8000-000000000031",
        "public-keys": "ssh-ed25519 AAAA one\nssh-rsa BBBB two\n",
        "../etc/passwd": "named by a tenant",
        "user-data": "named by a tenant",
    },
    password=Secret("FAKE-pass-4711"),
    password_id="7",
)
BARE = nic(46)
EMPTY = nic(48, user_data=Secret(""))
SECRET = b"FAKE-pass-4711"


@pytest.fixture
def process() -> Iterator[GuestProcess]:
    with guest_process() as it:
        yield it


@pytest.fixture
def on() -> Iterator[Segment]:
    with segment() as it:
        yield it


@pytest.fixture
def agent(process: GuestProcess, on: Segment) -> Agent:
    made = process.connect()
    sockets = on.sockets()
    assert made.serve(network(WEB, BARE, EMPTY), sockets).error == ""
    for sock in sockets:
        sock.close()
    return made


def web(on: Segment) -> str:
    return on.vm(WEB, ip=WEB.ip)


def curl(vm: str, path: str, *more: str, port: int = 80) -> subprocess.CompletedProcess[bytes]:
    command = ["curl", "-s", "--path-as-is", "--max-time", "20", *more, f"http://{SERVER}:{port}{path}"]
    return subprocess.run(["ip", "netns", "exec", vm, *command], capture_output=True, check=False, timeout=60)


def got(vm: str, path: str, *more: str, port: int = 80) -> bytes:
    done = curl(vm, path, "--fail", *more, port=port)
    assert done.returncode == 0, (path, done)
    return done.stdout


def status(vm: str, path: str, *more: str, port: int = 80) -> str:
    return curl(vm, path, "-o", "/dev/null", "-w", "%{http_code}", *more, port=port).stdout.decode()


def hung_up(done: subprocess.CompletedProcess[bytes]) -> bool:
    """Whether the connection was closed without a byte. curl(1): 52 is an empty reply, 56 a reset while reading."""
    return done.returncode in (52, 56) and done.stdout == b""


@pytest.mark.usefixtures("agent")
def test_metadata_has_the_paths_of_the_virtual_router(on: Segment) -> None:
    vm = web(on)
    listing = b"service-offering\nlocal-hostname\ninstance-id\npublic-keys\n../etc/passwd\nuser-data\n"
    assert got(vm, "/latest/user-data") == USER_DATA.encode()
    assert got(vm, "/latest/meta-data/") == got(vm, "/latest/meta-data") == listing
    assert got(vm, "/latest/meta-data/instance-id") == b"9f000000-0000-4000-8000-000000000031"
    assert got(vm, "/latest/instance-id") == got(vm, "/latest/instance-id?x=1") == got(vm, "/latest/%69nstance-id")
    assert got(vm, "/latest/meta-data/public-keys") == b"ssh-ed25519 AAAA one\nssh-rsa BBBB two\n"
    assert got(vm, "/latest/") == b"user-data\nmeta-data/\n"
    assert got(vm, "/") == b"latest/\n"
    head = curl(vm, "/latest/user-data", "--head").stdout.decode()
    assert f"Content-Length: {len(USER_DATA.encode())}" in head
    assert "it's" not in head
    for program in (["wget"], ["busybox", "wget"]):
        command = [*program, "-q", "-O", "-", f"http://{SERVER}/latest/meta-data/local-hostname"]
        assert run("ip", "netns", "exec", vm, *command).stdout == "web-1"


@pytest.mark.usefixtures("agent")
def test_paths_are_read_as_apache_reads_them(on: Segment) -> None:
    vm = web(on)
    instance = b"9f000000-0000-4000-8000-000000000031"
    for path in (
        "//latest/meta-data/instance-id",  # cloud-init before 0.7.5
        "/latest//meta-data///instance-id",
        "/latest/./meta-data/x/../instance-id",
        "/x/../latest/meta-data/instance-id",
        "/latest/%2e%2e/latest/meta-data/instance-id",
        "/LATEST/Meta-Data/instance-id?x=1",
        "/Latest//instance-id",
        "//latest/meta-data/./instance-id",
    ):
        assert got(vm, path) == instance, path
    for path in ("//latest/user-data", "/latest/User-Data", "/latest/user-data/", "/latest/x/../user-data/."):
        assert got(vm, path) == USER_DATA.encode(), path
    for path in ("//latest/meta-data//", "/LATEST/META-DATA", "/latest/meta-data/.", "/latest/meta-data/x/.."):
        assert got(vm, path) == got(vm, "/latest/meta-data/"), path
    assert got(vm, "/latest/..") == got(vm, "//") == b"latest/\n"


@pytest.mark.usefixtures("agent")
def test_requests_of_old_and_odd_clients_are_answered(on: Segment) -> None:
    vm, user_data = web(on), USER_DATA.encode()
    for head in (
        b" HTTP/1.0\r\n\r\n",
        b" HTTP/1.0\nHost: x\n\n",
        b" HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n",
        b" HTTP/1.1\r\nHost: another.example:81\r\nConnection: close\r\n\r\n",
        b" HTTP/1.1\r\nHost: a b/../c\r\nConnection: close\r\n\r\n",
    ):
        for target in (
            b"/latest/user-data",
            b"http://169.254.169.254//latest/user-data",
            b"HTTP://x/latest/./user-data",
        ):
            for before in (b"", b"\r\n"):
                answer = said(vm, before + b"GET " + target + head)
                assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n" + user_data), (head, target)
    get = b"GET //latest/meta-data/local-hostname HTTP/1.1\r\nHost: x\r\n"
    pipelined = said(vm, get + b"\r\n" + b"HEAD" + get[3:] + b"\r\n" + get + b"Connection: close\r\n\r\n")
    bodies = [it.partition(b"\r\n\r\n")[2] for it in pipelined.split(b"HTTP/1.1 200")[1:]]
    assert bodies == [b"web-1", b"", b"web-1"]


def said(vm: str, request: bytes) -> bytes:
    """The whole answer to these bytes, until the server closes the connection."""
    with inside(vm):
        sock = socket.create_connection((SERVER, 80), timeout=20)
    with sock:
        sock.sendall(request)
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer


@pytest.mark.usefixtures("agent")
def test_missing_items_and_refused_requests_get_an_error_status(on: Segment) -> None:
    vm = web(on)
    absent = ["/latest/meta-data/public-hostname", "/latest/nothing", "/password/vm_password", "/latest/vm_password"]
    odd = ["/latest/meta-data/vm_password", "/%ff", "/2009-04-04/meta-data/", "/../latest/user-data"]
    odd += ["/latest%2Fuser-data", "/latest/meta-data/../etc/passwd", "/latest/meta-data/Instance-ID", "/latest/..."]
    odd += ["/latest/meta-data/instance-id/"]
    for path in absent + odd:
        done = curl(vm, path, "-w", "%{http_code}")
        assert done.stdout == b"404", path  # no body, which a script could take for a key
    assert status(vm, "/latest/user-data", "-X", "POST", "-d", "x") == "413"
    assert status(vm, "/latest/user-data", "-X", "DELETE") == "405"
    assert status(vm, "/" + "x" * 40000) == "431"
    bare, empty = on.vm(BARE, ip=BARE.ip), on.vm(EMPTY, ip=EMPTY.ip)
    assert status(bare, "/latest/user-data") == status(bare, "/latest/meta-data/") == "404"
    assert (status(empty, "/latest/user-data"), got(empty, "/latest/user-data")) == ("200", b"")


def test_a_changed_table_applies_to_the_next_request(agent: Agent, on: Segment) -> None:
    vm = web(on)
    assert got(vm, "/latest/local-hostname") == b"web-1"
    heir = nic(47, ip=WEB.ip, metadata={"local-hostname": "heir"})
    assert agent.update(network(heir, revision=2)).error == ""
    assert hung_up(curl(vm, "/latest/local-hostname"))  # the address belongs to another MAC now
    assert got(on.vm(heir, ip=heir.ip), "/latest/local-hostname") == b"heir"


# ---- neighbours on the segment


@pytest.mark.usefixtures("agent")
def test_an_address_without_a_nic_gets_no_answer(on: Segment) -> None:
    stranger = nic(99)
    assert hung_up(curl(on.vm(stranger, ip=stranger.ip), "/latest/"))


@pytest.mark.usefixtures("agent")
def test_a_neighbour_with_the_address_and_another_mac_gets_no_answer(on: Segment) -> None:
    # Without the permanent neighbour entry the connection is established. Its first packet shows the wrong MAC.
    thief = on.vm(WEB, mac="02:00:00:00:00:66", ip=WEB.ip, neighbour=False)
    for port in (80, 8080):
        done = curl(thief, "/latest/user-data", "-H", "DomU_Request: send_my_password", port=port)
        assert hung_up(done)
    # With the entry there is no connection, because the answer to the first packet goes to the owner.
    on.know(WEB)
    assert curl(thief, "/latest/user-data", "--connect-timeout", "2").returncode == 28


@pytest.mark.parametrize(("mac", "served"), [("02:00:00:00:00:66", False), (WEB.mac, True)])
@pytest.mark.usefixtures("agent")
def test_a_neighbour_that_receives_flooded_frames_gets_no_answer(on: Segment, mac: str, served: bool) -> None:
    """The VM is off, so the bridge floods the frames to it. The second row shows that the forged connection works."""
    on.know(WEB)
    thief = on.vm(WEB, mac="02:00:00:00:00:66", neighbour=False)
    with inside(thief):
        read = forge(WEB, mac, b"GET /latest/user-data HTTP/1.0\r\n\r\n")
    assert read.connected
    assert (USER_DATA.encode() in read.data) is served
    assert served or read.data == b""


@pytest.mark.usefixtures("agent")
def test_forged_arp_replies_do_not_redirect_an_answer(on: Segment) -> None:
    vm = web(on)
    thief = on.vm(WEB, mac="02:00:00:00:00:66", neighbour=False)
    lie = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + octets("02:00:00:00:00:66") + socket.inet_aton(WEB.ip)
    lie += octets("0a:00:00:00:00:01") + socket.inet_aton(SERVER)
    with inside(thief):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    with raw:
        raw.bind(("eth0", 0))
        raw.setblocking(False)
        for _ in range(5):
            raw.send(octets("0a:00:00:00:00:01") + octets("02:00:00:00:00:66") + b"\x08\x06" + lie)
        neighbours = run("ip", "-n", on.scope, "neigh", "show", "dev", LINK).stdout
        assert f"{WEB.ip} lladdr {WEB.mac} PERMANENT" in neighbours
        assert got(vm, "/latest/user-data") == USER_DATA.encode()
        seen = bytearray()
        while True:
            try:
                seen += raw.recv(4096)
            except BlockingIOError:
                break
    assert b"cloud-config" not in seen


def test_nftables_rules_can_check_the_macs_instead_of_the_process(process: GuestProcess, on: Segment) -> None:
    rules = f"""
        table inet guests {{
            set owners {{ type ether_addr . ipv4_addr; elements = {{ {WEB.mac} . {WEB.ip} }}; }}
            chain input {{
                type filter hook input priority filter;
                iifname {LINK} tcp dport {{ 80, 8080 }} ether saddr . ip saddr != @owners drop
            }}
        }}"""
    listeners = (Listener("metadata", macs_checked=True), Listener("password", macs_checked=True))
    assert process.connect().serve(network(WEB), on.sockets(["metadata", "password"]), *listeners).error == ""
    thief = on.vm(WEB, mac="02:00:00:00:00:66", ip=WEB.ip, neighbour=False)
    assert got(thief, "/latest/user-data") == USER_DATA.encode()  # no check in the process, because of macs_checked
    subprocess.run(["ip", "netns", "exec", on.scope, "nft", "-f", "-"], input=rules.encode(), check=True)
    assert curl(thief, "/latest/user-data", "--connect-timeout", "2").returncode == 28
    run("ip", "-n", thief, "link", "set", "eth0", "down")
    assert got(web(on), "/latest/user-data") == USER_DATA.encode()


class Read:
    """The result of ``forge``. ``connected``: the handshake was completed."""

    connected = False
    data = b""


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def forge(owner: GuestNic, mac: str, request: bytes) -> Read:
    """Open a TCP connection with raw frames from ``mac`` and the owner's address; return the received data."""
    read, port, sequence = Read(), 40000, 1000
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as raw:
        raw.bind(("eth0", 0))
        membership = struct.pack("iHH8s", socket.if_nametoindex("eth0"), 1, 0, b"")  # promiscuous
        raw.setsockopt(263, 1, membership)

        def send(flags: int, ack: int, data: bytes = b"") -> None:
            addresses = socket.inet_aton(owner.ip) + socket.inet_aton(SERVER)
            tcp = struct.pack("!HHIIBBHHH", port, 80, sequence, ack, 5 << 4, flags, 8192, 0, 0)
            checksum = internet_sum(addresses + struct.pack("!BBH", 0, 6, len(tcp) + len(data)) + tcp + data)
            tcp = tcp[:16] + struct.pack("!H", checksum) + tcp[18:]
            ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp) + len(data), 1, 0, 64, 6, 0) + addresses
            ip = ip[:10] + struct.pack("!H", internet_sum(ip)) + ip[12:]
            raw.send(octets("0a:00:00:00:00:01") + octets(mac) + b"\x08\x00" + ip + tcp + data)

        send(0x02, 0)
        sequence += 1
        deadline = time.monotonic() + 20
        asked = False
        raw.settimeout(1)
        while time.monotonic() < deadline:
            try:
                frame = raw.recv(4096)
            except TimeoutError:
                if not asked:  # the bridge may not have forwarded the first one: its port was just set up
                    sequence -= 1
                    send(0x02, 0)
                    sequence += 1
                continue
            if frame[23] != 6 or frame[26:30] != socket.inet_aton(SERVER):
                continue
            theirs, flags = struct.unpack("!I", frame[38:42])[0], frame[47]
            payload = frame[34 + (frame[46] >> 4) * 4 : 14 + struct.unpack("!H", frame[16:18])[0]]
            if flags & 0x12 == 0x12 and not asked:
                asked = True
                send(0x10, theirs + 1)
                time.sleep(0.2)  # time for the server to accept and close the connection before the request
                send(0x18, theirs + 1, request)
                sequence += len(request)
            elif flags & 0x04:
                break
            else:
                read.connected = True
                read.data += payload
                if flags & 0x01:
                    break
                send(0x10, theirs + len(payload))
    return read


def internet_sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


# ---- passwords


def ask(vm: str, word: str) -> bytes:
    return got(vm, "/", "-H", f"DomU_Request: {word}", port=8080)


def test_a_password_is_sent_until_it_is_acknowledged(agent: Agent, on: Segment) -> None:
    vm = web(on)
    wget = ["wget", "-q", "-t", "3", "-T", "20", "-O", "-", "--header", "DomU_Request: send_my_password"]
    assert run("ip", "netns", "exec", vm, *wget, f"{SERVER}:8080").stdout == "FAKE-pass-4711"
    assert ask(vm, "send_my_password") == SECRET
    assert ask(vm, "saved_password") == b"saved_password"
    assert ask(vm, "send_my_password") == b"saved_password"
    taken = agent.taken()
    assert (taken.scope_id, taken.network_id, taken.nic, taken.password_id) == ("net-204", "204", "nic-45", "7")
    # A table that still has the password does not bring it back; the agent gets the message again.
    agent.update(network(WEB, BARE, revision=2))
    assert ask(vm, "send_my_password") == b"saved_password"
    assert agent.taken().password_id == "7"
    # A new password has a new id, and is sent.
    agent.update(network(msgspec.structs.replace(WEB, password=Secret("new"), password_id="8"), BARE, revision=3))
    assert ask(vm, "send_my_password") == b"new"


def test_an_acknowledgement_applies_to_the_password_that_was_sent(agent: Agent, on: Segment) -> None:
    vm = web(on)
    assert ask(vm, "send_my_password") == SECRET
    agent.update(network(msgspec.structs.replace(WEB, password=Secret("new"), password_id="8"), BARE, revision=2))
    assert ask(vm, "saved_password") == b"saved_password"
    assert ask(vm, "send_my_password") == b"new"
    assert agent.listen(0.2) == []


@pytest.mark.usefixtures("agent")
def test_a_password_is_sent_only_to_its_vm_and_only_for_the_right_request(on: Segment) -> None:
    vm, other = web(on), on.vm(BARE, ip=BARE.ip)
    assert ask(other, "send_my_password") == b"saved_password"
    assert ask(other, "saved_password") == b"saved_password"
    for more in ([], ["-H", "DomU_Request: give"], ["-H", "DomU_Request: send_my_password", "-H", "DomU_Request: x"]):
        done = curl(vm, "/", "-w", "%{http_code}", *more, port=8080)
        assert done.stdout == b"bad_request400"
    for path in ("/latest/", "/latest/meta-data/", "/latest/user-data", "/latest/vm_password", "/password"):
        assert SECRET not in curl(vm, path, "-i").stdout
    assert ask(vm, "send_my_password") == SECRET


# ---- floods


@pytest.mark.usefixtures("agent")
def test_a_vm_that_holds_connections_open_does_not_block_other_vms(on: Segment) -> None:
    vm, other = web(on), on.vm(BARE, ip=BARE.ip)

    def hold() -> list[socket.socket]:
        held = [socket.create_connection((SERVER, 80), timeout=10) for _ in range(limits.VM_CONNECTIONS_MAX + 10)]
        for sock in held:
            sock.send(b"GET /latest/user-data HTTP/1.1\r\n")
        return held

    begun = time.monotonic()
    with inside(vm):
        held = hold()
    wait_until(lambda: sum(map(closed, held)) >= 10)
    open_still = [sock for sock in held if not closed(sock)]
    refused, served = status(vm, "/latest/"), status(other, "/latest/")
    assert served == "200"
    # The connections are closed when no request is complete after REQUEST_S, which is long only on an idle machine.
    if time.monotonic() - begun < http.REQUEST_S:
        assert len(open_still) == limits.VM_CONNECTIONS_MAX
        assert refused == "000"
    wait_until(lambda: all(map(closed, open_still)), http.REQUEST_S + 20)
    assert status(vm, "/latest/") == "200"
    for sock in held:
        sock.close()


def test_many_vms_that_hold_connections_open_do_not_block_another_vm(process: GuestProcess, on: Segment) -> None:
    """On a shared network: enough VMs to reach the limit of the network, each with its maximum of connections."""
    many = limits.NETWORK_CONNECTIONS_MAX // limits.VM_CONNECTIONS_MAX
    floods = [nic(number) for number in range(100, 100 + many)]
    listeners = (Listener("metadata", macs_checked=True),)  # one machine has the addresses of all
    assert process.connect().serve(network(WEB, *floods, BARE), on.sockets(["metadata"]), *listeners).error == ""
    flooder, quiet = on.vm(floods[0], ip=floods[0].ip, neighbour=False), web(on)
    for it in floods[1:]:
        run("ip", "-n", flooder, "addr", "add", f"{it.ip}/24", "dev", "eth0")

    def hold() -> list[socket.socket]:
        sources = [(it.ip, 0) for it in floods for _ in range(limits.VM_CONNECTIONS_MAX)]
        held = [socket.create_connection((SERVER, 80), timeout=10, source_address=it) for it in sources]
        for sock in held:
            sock.send(b"GET / HTTP/1.1\r\n")
        return held

    with inside(flooder):
        held = hold()
    assert status(quiet, "/latest/") == "200"
    for sock in held:
        sock.close()


def closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.usefixtures("agent")
def test_a_vm_that_exceeds_its_request_rate_gets_status_429(on: Segment) -> None:
    vm, other = web(on), on.vm(BARE, ip=BARE.ip)

    def flood() -> bytes:
        answers = b""
        while b"HTTP/1.1 429" not in answers and time.monotonic() - begun < 60:
            with socket.create_connection((SERVER, 80), timeout=20) as sock:
                sock.sendall(b"GET /latest/ HTTP/1.1\r\nHost: x\r\n\r\n" * (http.REQUESTS_MAX + 5))
                try:
                    while data := sock.recv(65536):
                        answers += data
                except ConnectionResetError:
                    pass
        return answers

    begun = time.monotonic()
    with inside(vm):
        answers = flood()
    assert b"HTTP/1.1 429" in answers
    refilled = limits.VM_REQUESTS_PER_S * (time.monotonic() - begun)
    assert limits.VM_REQUESTS_BURST <= answers.count(b"HTTP/1.1 200") <= limits.VM_REQUESTS_BURST + refilled
    assert status(other, "/latest/") == "200"


def test_a_megabyte_of_user_data_arrives_unchanged(agent: Agent, on: Segment) -> None:
    big = "0123456789abcdef" * 65536 + "\n\n"
    agent.update(network(nic(45, user_data=Secret(big)), revision=2))
    assert got(web(on), "/latest/user-data", "--limit-rate", "2M") == big.encode()
