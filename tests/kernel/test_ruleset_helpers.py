"""Protocols that need a conntrack helper, tested with real dialogues of FTP (RFC 959) and TFTP (RFC 1350)."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from kernel.ruleset_lab import CLIENT, PATIENCE_S, STRANGER, Lab, run
from netloom.agent.host import flows
from netloom.agent.host import helpers as probe
from netloom.names import CONNTRACK_HELPERS
from netloom.render import helpers
from netloom.state import Scope
from netns import inside
from unit.scopes import A1, A2, VM1, VM2, admit, egress, forward, static, wish

QUIET_S = 1.5  # longer than the first retransmission of a SYN
DATA = b"the data"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def endpoint(text: str) -> tuple[str, int]:
    """The address and the port of a PORT command or a reply to PASV."""
    numbers = [int(it) for it in re.findall(r"\d+", text[text.index(",") - 3 :])]
    return ".".join(map(str, numbers[:4])), numbers[4] << 8 | numbers[5]


def numbers_of(address: tuple[str, int]) -> str:
    return f"{address[0].replace('.', ',')},{address[1] >> 8},{address[1] & 255}"


class FtpServer:
    """Serves one control connection: it answers PORT and PASV by sending ``DATA``."""

    def __init__(self, lab: Lab, space: str, port: int, address: str = "", patience_s: float = QUIET_S) -> None:
        """``patience_s`` is the time that opening a data connection may take."""
        self._lab, self._space, self._patience_s = lab, space, patience_s
        self._listener = lab.open_socket(space, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((address, port))
        self._listener.listen(8)
        self._control: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> FtpServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._control is not None:
            with contextlib.suppress(OSError):  # the device may have cut it, so that the client's end never comes
                self._control.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)

    def _serve(self) -> None:
        try:
            control, _ = self._listener.accept()
        except OSError:
            return
        self._control = control
        # The device resets the session when its connection is no longer allowed.
        with control, contextlib.suppress(ConnectionResetError), control.makefile("rw", newline="\r\n") as lines:
            print("220 ready", end="\r\n", file=lines, flush=True)
            for line in lines:
                reply = "331 who?"
                if line.startswith("PORT"):
                    reply = "150 here it is" if self._connect(control, endpoint(line)) else "425 cannot connect"
                elif line.startswith("PASV"):
                    self._listen(control, lines)
                    continue
                print(reply, end="\r\n", file=lines, flush=True)

    def _connect(self, control: socket.socket, to: tuple[str, int]) -> bool:
        with self._lab.open_socket(self._space, socket.SOCK_STREAM) as data:
            data.settimeout(self._patience_s)
            data.bind((control.getsockname()[0], 0))
            try:
                data.connect(to)
                data.sendall(DATA)
            except OSError:
                return False
        return True

    def _listen(self, control: socket.socket, lines: object) -> None:
        with self._lab.open_socket(self._space, socket.SOCK_STREAM) as listener:
            listener.bind((control.getsockname()[0], 0))
            listener.listen(1)
            control.sendall(f"227 Entering ({numbers_of(listener.getsockname())})\r\n".encode())
            # Until the client comes, gives another command or ends the session.
            ready = select.poll()
            for it in (listener, control):
                ready.register(it, select.POLLIN)
            if listener.fileno() not in dict(ready.poll(PATIENCE_S * 1000)):
                return
            data, _ = listener.accept()
            with data:
                data.sendall(DATA)
                data.settimeout(QUIET_S)
                with contextlib.suppress(OSError):  # the client closes it, or the device has cut it
                    data.recv(1)


class FtpClient:
    def __init__(self, lab: Lab, space: str, target: str, port: int, source: str = "") -> None:
        self._lab, self._space, self._source, self._target = lab, space, source, target
        self.control = lab.open_socket(space, socket.SOCK_STREAM)
        self.control.settimeout(PATIENCE_S)
        self.control.bind((source, 0))
        self.control.connect((target, port))
        self._lines = self.control.makefile("rw", newline="\r\n")
        assert self._lines.readline().startswith("220")
        # The helper does not read the first line of a connection.
        assert self._said("USER anonymous").startswith("331")

    def __enter__(self) -> FtpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self.control.close()

    def _said(self, command: str) -> str:
        print(command, end="\r\n", file=self._lines, flush=True)
        return self._lines.readline()

    def active(self) -> bytes:
        with self._lab.open_socket(self._space, socket.SOCK_STREAM) as listener:
            listener.bind((self.control.getsockname()[0], 0))
            listener.listen(1)
            reply = self._said(f"PORT {numbers_of(listener.getsockname())}")
            if not reply.startswith("150"):
                return b""
            listener.settimeout(PATIENCE_S)
            data, _ = listener.accept()
            with data:
                data.settimeout(PATIENCE_S)
                return data.recv(100)

    def passive(self, patience_s: float = PATIENCE_S) -> socket.socket | None:
        """The open data connection, or None if it cannot be opened within ``patience_s``."""
        address = endpoint(self._said("PASV"))
        data = self._lab.open_socket(self._space, socket.SOCK_STREAM)
        data.settimeout(patience_s)
        data.bind((self._source, 0))
        try:
            data.connect(address)
        except OSError:
            data.close()
            return None
        data.settimeout(PATIENCE_S)
        return data


def with_helpers(scope: Scope, *helpers: str) -> Scope:
    return replace(scope, helpers=helpers)


OUTWARD = wish(held=(A1, A2))
INWARD = wish(
    admit(A2, "tcp", "21"), admit(A1, "tcp", "2121"), held=(A1, A2), static=[static(A2, VM2)],
    forwards=[forward(A1, "2121", VM1, "21")],
)  # fmt: skip


def active_outward(lab: Lab, port: int = 21, patience_s: float = QUIET_S) -> bytes:
    with FtpServer(lab, "inet", port, STRANGER, patience_s), FtpClient(lab, "vm1", STRANGER, port) as client:
        return client.active()


def passive_inward(lab: Lab, vm: str, target: str, port: int, patience_s: float = PATIENCE_S) -> bytes:
    with FtpServer(lab, vm, 21), FtpClient(lab, "inet", target, port, CLIENT) as client:
        data = client.passive(patience_s)
        if data is None:
            return b""
        with data:
            return data.recv(100)


@pytest.mark.mutation("a-helper-is-assigned-before-dnat")
def test_active_ftp_of_a_guest_works_with_its_helper_only(lab: Lab) -> None:
    for named, got in (((), b""), (("ftp",), DATA), (("tftp",), b"")):
        lab.renew(with_helpers(OUTWARD, *named))
        assert active_outward(lab, patience_s=PATIENCE_S if got else QUIET_S) == got, named
    lab.renew(with_helpers(OUTWARD, "ftp"))
    assert active_outward(lab, 2121) == b"", "only the protocol's own port has the helper"


@pytest.mark.mutation("a-helper-is-assigned-before-dnat")
def test_passive_ftp_to_a_guest_works_with_its_helper_only(lab: Lab) -> None:
    lab.renew(INWARD)
    assert passive_inward(lab, "vm2", A2.address, 21, QUIET_S) == b""
    assert passive_inward(lab, "vm1", A1.address, 2121, QUIET_S) == b""
    lab.renew(with_helpers(INWARD, "ftp"))
    assert passive_inward(lab, "vm2", A2.address, 21) == DATA
    assert passive_inward(lab, "vm1", A1.address, 2121) == DATA


def test_a_helper_opens_no_other_connection(lab: Lab) -> None:
    lab.renew(with_helpers(INWARD, "ftp", "tftp", "sip", "pptp", "irc", "amanda", "sane"))
    with FtpServer(lab, "vm2", 21), FtpClient(lab, "inet", A2.address, 21, CLIENT) as client:
        address = endpoint(client._said("PASV"))
        assert address[0] == A2.address
        with lab.open_socket("inet", socket.SOCK_STREAM) as other:  # another host, and another port
            other.settimeout(QUIET_S)
            other.bind((STRANGER, 0))
            with pytest.raises(TimeoutError):
                other.connect(address)
        with lab.open_socket("inet", socket.SOCK_STREAM) as other:
            other.settimeout(QUIET_S)
            other.bind((CLIENT, 0))
            with pytest.raises(TimeoutError):
                other.connect((address[0], address[1] + 1))


@pytest.mark.mutation("only-icmp-is-related-without-a-helper", instead='"ct state related accept"')
def test_a_control_connection_announces_nothing_when_its_helper_is_removed(lab: Lab) -> None:
    lab.renew(with_helpers(INWARD, "ftp"))
    with FtpServer(lab, "vm2", 21), FtpClient(lab, "inet", A2.address, 21, CLIENT) as client:
        lab.apply(INWARD)
        assert client.passive(QUIET_S) is None
        lab.apply(with_helpers(INWARD, "ftp"))
        data = client.passive()
        assert data is not None
        data.close()


def test_tftp_of_a_guest_works_with_its_helper_only(lab: Lab) -> None:
    for named, got in (((), False), (("tftp",), True), (("ftp",), False)):
        lab.renew(with_helpers(OUTWARD, *named))
        with lab.open_socket("inet", socket.SOCK_DGRAM) as server, lab.open_socket("vm1", socket.SOCK_DGRAM) as client:
            server.bind((STRANGER, 69))
            server.settimeout(PATIENCE_S)
            client.sendto(b"\0\1file\0octet\0", (STRANGER, 69))
            _, peer = server.recvfrom(100)
            with lab.open_socket("inet", socket.SOCK_DGRAM) as transfer:  # RFC 1350 section 4: from a port of its own
                transfer.bind((STRANGER, 0))
                transfer.sendto(b"\0\3\0\1the file", peer)
                client.settimeout(PATIENCE_S if got else QUIET_S)
                try:
                    assert client.recv(100) == b"\0\3\0\1the file"
                    arrived = True
                except TimeoutError:
                    arrived = False
        assert arrived == got, named


def test_helpers_that_the_kernel_does_not_offer_are_found(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_offered", set())
    monkeypatch.setitem(helpers.SERVICES, "made_up", (helpers.Service("made_up", "udp", 9),))
    with inside(lab.ns("nb")):
        assert probe.missing((*CONNTRACK_HELPERS, "made_up")) == ("made_up",)
        assert not run("nft", "list", "tables")


@pytest.mark.mutation("an-announced-flow-is-judged-by-its-control-connection", instead="None")
def test_a_data_connection_lives_and_ends_with_its_control_connection(lab: Lab) -> None:
    """The flows are checked by the agent's own code."""
    before = with_helpers(INWARD, "ftp")
    more = replace(before, port_forwards={})
    revoked = replace(before, static_nats={})
    lab.renew(before)
    for after, stays in ((more, True), (revoked, False), (replace(before, helpers=()), True)):
        lab.renew(before)
        with FtpServer(lab, "vm2", 21), FtpClient(lab, "inet", A2.address, 21, CLIENT) as client:
            data = client.passive()
            assert data is not None
            with data:
                assert data.recv(100) == DATA
                lab.apply(after, settle=False)
                flows.enforce(lab.ns("dev"), before, after)
                kept = [it for it in lab.entries() if it.dst == A2.address and it.dport not in (21,)]
                assert bool(kept) == stays


# The client opens the announced connections, as with passive FTP.
ANNOUNCED = wish(
    egress("udp", "10080"), egress("tcp", "6566"), admit(A2, "udp", "10080"), admit(A2, "tcp", "6566"),
    admit(A1, "udp", "1080"), held=(A1, A2), static=[static(A2, VM2)],
    forwards=[forward(A1, "1080", VM1, "10080", "udp")], allow_egress=False,
)  # fmt: skip


def data_of(
    lab: Lab, client: str, source: str, listener: socket.socket, to: tuple[str, int], patience_s: float
) -> bytes:
    """What the client receives on the announced connection; nothing if it does not open within ``patience_s``."""
    with lab.open_socket(client, socket.SOCK_STREAM) as data:
        data.settimeout(patience_s)
        data.bind((source, 0))
        try:
            data.connect(to)
        except OSError:
            return b""
        listener.settimeout(PATIENCE_S)
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(DATA)
            data.settimeout(PATIENCE_S)
            return data.recv(100)


def amanda(
    lab: Lab, server: str, client: str, target: tuple[str, int], source: str = "", at: str = "",
    patience_s: float = PATIENCE_S,
) -> bytes:  # fmt: skip
    """A backup server asks a machine, whose reply announces ports (Amanda's "network protocol" of sendbackup)."""
    with (
        lab.open_socket(server, socket.SOCK_DGRAM) as agent,
        lab.open_socket(server, socket.SOCK_STREAM) as listener,
        lab.open_socket(client, socket.SOCK_DGRAM) as asking,
    ):
        agent.bind((at, 10080))
        listener.bind((at, 0))
        listener.listen(1)
        asking.bind((source, 0))
        for it in (agent, asking):
            it.settimeout(PATIENCE_S)
        asking.sendto(b"Amanda 2.6 REQ HANDLE 1 SEQ 1\nSERVICE sendbackup\n", target)
        _, peer = agent.recvfrom(200)
        port = listener.getsockname()[1]
        agent.sendto(f"Amanda 2.6 REP HANDLE 1 SEQ 1\nCONNECT DATA {port} MESG 0 INDEX 0\n".encode(), peer)
        told = re.search(rb"DATA (\d+)", asking.recv(200))
        assert told is not None
        return data_of(lab, client, source, listener, (target[0], int(told[1])), patience_s)


def sane(
    lab: Lab, server: str, client: str, target: str, source: str = "", at: str = "", patience_s: float = PATIENCE_S
) -> bytes:
    """A scanner's client starts a scan, and the reply announces the port of the image (SANE network protocol)."""
    with (
        lab.open_socket(server, socket.SOCK_STREAM) as scanner,
        lab.open_socket(server, socket.SOCK_STREAM) as listener,
        lab.open_socket(client, socket.SOCK_STREAM) as asking,
    ):
        scanner.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        scanner.bind((at, 6566))
        scanner.listen(1)
        listener.bind((at, 0))
        listener.listen(1)
        for it in (scanner, asking):
            it.settimeout(PATIENCE_S)
        asking.bind((source, 0))
        asking.connect((target, 6566))
        control, _ = scanner.accept()
        with control:
            asking.sendall(struct.pack("!II", 7, 0))  # SANE_NET_START, and a handle
            assert control.recv(100)
            port = listener.getsockname()[1]
            control.sendall(struct.pack("!IIII", 0, port, 0x1234, 0))  # success, the port, the byte order
            assert struct.unpack("!II", asking.recv(100)[:8])[1] == port
            return data_of(lab, client, source, listener, (target, port), patience_s)


def test_amanda_works_with_its_helper_only(lab: Lab) -> None:
    for named, got in (((), b""), (("amanda",), DATA)):
        lab.renew(with_helpers(ANNOUNCED, *named))
        patience_s = PATIENCE_S if got else QUIET_S
        assert amanda(lab, "inet", "vm3", (STRANGER, 10080), at=STRANGER, patience_s=patience_s) == got, named
        assert amanda(lab, "vm2", "inet", (A2.address, 10080), CLIENT, patience_s=patience_s) == got, named
    assert amanda(lab, "vm1", "inet", (A1.address, 1080), CLIENT) == DATA, "by a forward of another port"


def test_sane_works_with_its_helper_only(lab: Lab) -> None:
    for named, got in (((), b""), (("sane",), DATA)):
        lab.renew(with_helpers(ANNOUNCED, *named))
        patience_s = PATIENCE_S if got else QUIET_S
        assert sane(lab, "inet", "vm3", STRANGER, at=STRANGER, patience_s=patience_s) == got, named
        assert sane(lab, "vm2", "inet", A2.address, CLIENT, patience_s=patience_s) == got, named
