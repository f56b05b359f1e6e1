"""The networks that the guest process serves: their tables, sockets and connections.

Everything runs on one event loop in one thread. Each callback does a bounded amount of work and returns. So a network
that floods its sockets delays the other networks a little, but they lose no answers.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from functools import partial

import h11

from netloom.guest import dhcp, limits, metadata, password, peer
from netloom.guest.http import TOO_MANY_REQUESTS, TOO_MUCH_UNREAD, HttpAnswer, HttpConnection
from netloom.guest.loop import Loop
from netloom.guest.table import GuestTable, TableRow
from netloom.guestwire import (
    Ack,
    GuestMessage,
    GuestNetwork,
    GuestNic,
    LentSockets,
    Listener,
    Notice,
    PasswordTaken,
    Served,
    ServeNetwork,
)
from netloom.secret import Secret

# Packets and connections that one callback takes from a socket.
_PACKETS_AT_ONCE = 16
_ACCEPTS_AT_ONCE = 8
_PACKET_BYTES_MAX = 2048
# How long a listening socket is not polled after accept() ran out of file descriptors.
_OUT_OF_DESCRIPTORS_S = 0.2

# asm-generic/socket.h
_SO_NO_CHECK = 11

Key = tuple[str, str]  # scope_id, network_id


class _NetworkRuntime:
    def __init__(self, table: GuestTable, unread: limits.Unread) -> None:
        self.table = table
        self.sockets: list[tuple[Listener, socket.socket]] = []
        self.connections: dict[HttpConnection, limits.Load] = {}  # with the load of its VM; the oldest first
        self.load = limits.network_load(unread)
        self.vm_loads: dict[bytes, limits.Load] = {}  # by MAC
        self.notices = limits.Bucket(limits.NOTICES_PER_S, limits.NOTICES_BURST)


class Networks:
    """The networks, changed by requests of the agent.

    ``send`` sends a message to the agent. Without a connected agent the message is lost; for passwords see
    ``unconfirmed``.
    """

    def __init__(self, loop: Loop, send: Callable[[GuestMessage], None]) -> None:
        self._loop = loop
        self._send = send
        self._networks: dict[Key, _NetworkRuntime] = {}
        self._unread = limits.Unread()
        # Passwords that the VM has acknowledged and that are still in the agent's table: (network, NIC) -> password_id.
        self._taken: dict[tuple[Key, str], str] = {}
        # The password sent last to each NIC. An acknowledgement is for this one, not for one that was set later.
        self._sent_passwords: dict[tuple[Key, str], str] = {}

    # ---- requests of the agent

    @property
    def served(self) -> tuple[Served, ...]:
        """The networks that are served, with their revisions."""
        return tuple(
            Served(*key, it.table.network.revision, tuple(listener for listener, _ in it.sockets))
            for key, it in sorted(self._networks.items())
        )

    @property
    def unconfirmed(self) -> list[PasswordTaken]:
        """The passwords that were acknowledged and are still in the agent's table. Each new agent gets them."""
        return [_password_taken(*at, password_id) for at, password_id in self._taken.items()]

    def serve(self, request: ServeNetwork, descriptors: list[int]) -> Ack:
        """Use this table and these sockets. On an error nothing changes, and the received descriptors are closed."""
        sockets: list[tuple[Listener, socket.socket]] = []
        try:
            table = GuestTable(request.network)
            for listener, descriptor in zip(request.listeners, descriptors, strict=True):
                sock = socket.socket(fileno=descriptor)
                sockets.append((listener, sock))
                _prepare(listener, sock)
        except (ValueError, OSError) as error:
            for _, sock in sockets:
                sock.detach()
            for descriptor in descriptors:
                os.close(descriptor)
            return Ack(seq=request.seq, error=f"network {request.network.network_id}: {error}")
        key = (request.network.scope_id, request.network.network_id)
        network = self._networks.setdefault(
            key,
            _NetworkRuntime(table, self._unread),  # guard: a-network-has-its-own-leases
        )
        self._close_sockets(network)
        network.sockets = sockets
        self._replace_table(key, network, table)
        for listener, sock in sockets:
            self._watch(key, network, listener, sock)
        return Ack(seq=request.seq)

    def update(self, seq: int, desired: GuestNetwork) -> Ack:
        """Use this table. On an error the old table stays in use."""
        key = (desired.scope_id, desired.network_id)
        network = self._networks.get(key)
        if network is None:
            return Ack(seq=seq, error=f"network {desired.network_id} is not served")
        try:
            self._replace_table(key, network, GuestTable(desired))
        except ValueError as error:
            return Ack(seq=seq, error=f"network {desired.network_id}: {error}")
        return Ack(seq=seq)

    def drop(self, seq: int, key: Key) -> Ack:
        """Close the sockets and connections of the network, and forget its passwords."""
        network = self._networks.pop(key, None)
        if network is not None:
            self._close_sockets(network)
            for connection in list(network.connections):
                connection.close()
        for kept in (self._taken, self._sent_passwords):
            for at in [at for at in kept if at[0] == key]:
                del kept[at]
        return Ack(seq=seq)

    def lend(self, seq: int, key: Key) -> tuple[LentSockets, list[int]]:
        """The listeners of the network and their descriptors, which stay open here."""
        network = self._networks.get(key)
        sockets = network.sockets if network is not None else []
        return LentSockets(seq=seq, listeners=tuple(it for it, _ in sockets)), [sock.fileno() for _, sock in sockets]

    def stop(self) -> None:
        """Close the listening sockets. Open connections are still answered."""
        for network in self._networks.values():
            self._close_sockets(network)

    @property
    def idle(self) -> bool:
        """Whether no connection is open."""
        return not any(network.connections for network in self._networks.values())

    def _replace_table(self, key: Key, network: _NetworkRuntime, table: GuestTable) -> None:
        """Use this table, and forget what is known of VMs and passwords that are not in it."""
        network.table = table
        network.vm_loads = {mac: load for mac, load in network.vm_loads.items() if mac in table.by_mac}
        ids = {nic.nic: nic.password_id for nic in table.network.nics if nic.password is not None}
        for at in [at for at in self._sent_passwords if at[0] == key and at[1] not in ids]:
            del self._sent_passwords[at]
        for at, password_id in [(at, it) for at, it in self._taken.items() if at[0] == key]:
            if ids.get(at[1]) == password_id:
                # The agent did not get the first message, or had made this table before.
                self._send(_password_taken(*at, password_id))
            else:
                del self._taken[at]

    def _close_sockets(self, network: _NetworkRuntime) -> None:
        for _, sock in network.sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        network.sockets = []

    def _watch(self, key: Key, network: _NetworkRuntime, listener: Listener, sock: socket.socket) -> None:
        if sock.fileno() < 0:
            return
        if listener.kind == "dhcp":
            self._loop.add_reader(sock.fileno(), partial(self._receive_dhcp, key, network, sock))
        else:
            self._loop.add_reader(sock.fileno(), partial(self._accept, key, network, listener, sock))

    # ---- requests of the VMs

    def _receive_dhcp(self, key: Key, network: _NetworkRuntime, sock: socket.socket) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            try:
                packet = sock.recv(_PACKET_BYTES_MAX)
            except OSError:
                return
            request = dhcp.parse(packet)
            if request is None:
                continue
            if request.type == dhcp.MessageType.DECLINE and (row := network.table.by_mac.get(request.mac)):
                text = f"the VM declines its address {row.nic.ip}: another machine on the segment uses it"
                self._notice(key, network, row.nic, text)
            reply = dhcp.respond(request, network.table)
            if reply is None:
                continue
            to = (reply.to, dhcp.CLIENT_PORT)
            try:
                sock.sendmsg([reply.packet], network.table.reply_source, socket.MSG_DONTWAIT, to)
            except OSError as error:
                row = network.table.by_mac[request.mac]
                self._notice(key, network, row.nic, f"the DHCP reply to {reply.to} cannot be sent: {error.strerror}")

    def _accept(self, key: Key, network: _NetworkRuntime, listener: Listener, sock: socket.socket) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, (address, _port) = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError:
                self._loop.remove_reader(sock.fileno())
                again = partial(self._watch, key, network, listener, sock)
                self._loop.call_later(_OUT_OF_DESCRIPTORS_S, again)
                return
            owner = _owner(network, listener, connection, address)
            if owner is None:
                connection.close()
                continue
            vm = network.vm_loads.setdefault(owner.mac, limits.vm_load(network.load))
            if vm.full or (network.load.full and not _make_room(network, vm)):
                connection.close()
                self._limited(key, network, owner.nic, vm, f"holds {vm.connections} connections: more are closed")
                continue
            vm.connections += 1
            network.load.connections += 1
            self._start_connection(key, network, listener, connection, owner, vm)

    def _start_connection(
        self,
        key: Key,
        network: _NetworkRuntime,
        listener: Listener,
        sock: socket.socket,
        owner: TableRow,
        vm: limits.Load,
    ) -> None:
        def site(request: h11.Request) -> HttpAnswer | None:
            # Look up the address for each request: it may belong to another VM since the connection was opened.
            row = network.table.by_ip.get(owner.nic.ip)
            if row is None or row.mac != owner.mac or self._networks.get(key) is not network:
                return None
            nic = row.nic
            if not limits.admitted(vm, network.load):
                text = f"sends more than {limits.VM_REQUESTS_PER_S:.0f} requests per second: more are refused"
                self._limited(key, network, nic, vm, text)
                return TOO_MANY_REQUESTS
            if listener.kind != "metadata":
                return self._password(key, request, nic)
            answer = metadata.respond(request, nic)
            return answer if self._has_room(network, vm, answer.body) else TOO_MUCH_UNREAD

        def ended(connection: HttpConnection) -> None:
            network.connections.pop(connection, None)
            network.load.connections -= 1
            vm.connections -= 1

        sock.setblocking(False)
        network.connections[HttpConnection(self._loop, sock, site, ended, vm.unread)] = vm

    def _has_room(self, network: _NetworkRuntime, vm: limits.Load, body: bytes) -> bool:
        """Whether an answer to ``vm`` fits into the memory for unread answers.

        Answers to the VM that has most of them make room, the oldest first: in the same network, or in the network that
        has most. ``vm`` gets no room if it, or its network, would have the most itself.
        """
        while more := vm.unread.growth(body):
            if network.load.unread.bytes + more > limits.NETWORK_UNREAD_BYTES_MAX:  # guard: unread-of-a-network
                crowded = network
            elif self._unread.bytes + more > limits.UNREAD_BYTES_MAX:  # guard: unread-of-all-networks
                crowded = max(self._networks.values(), key=lambda it: it.load.unread.bytes)
                if crowded.load.unread.bytes <= network.load.unread.bytes + more:
                    return False
            else:
                return True
            waiting = [(connection, load) for connection, load in crowded.connections.items() if connection.unread]
            most = max((load for _, load in waiting), key=lambda it: it.unread.bytes, default=vm)
            if most is vm or (crowded is network and most.unread.bytes <= vm.unread.bytes + more):
                return False
            next(connection for connection, load in waiting if load is most).close()
        return True

    def _password(self, key: Key, request: h11.Request, nic: GuestNic) -> HttpAnswer:
        at = (key, nic.nic)
        secret: Secret | None = nic.password
        if self._taken.get(at) == nic.password_id:
            secret = None
        outcome = password.respond(request, secret)
        if outcome.given:
            self._sent_passwords[at] = nic.password_id
        if outcome.taken and secret is not None and self._sent_passwords.get(at, nic.password_id) == nic.password_id:
            self._taken[at] = nic.password_id  # guard: a-taken-password-is-remembered
            self._send(_password_taken(key, nic.nic, nic.password_id))
        return outcome.answer

    def _limited(self, key: Key, network: _NetworkRuntime, nic: GuestNic, vm: limits.Load, text: str) -> None:
        if vm.notice_due():  # guard: a-limited-vm-is-named
            self._notice(key, network, nic, f"metadata and passwords: the VM {text}", limited=True)

    def _notice(self, key: Key, network: _NetworkRuntime, nic: GuestNic, text: str, *, limited: bool = False) -> None:
        if network.notices.take():
            self._send(Notice(scope_id=key[0], network_id=key[1], nic=nic.nic, text=text, limited=limited))


def _owner(network: _NetworkRuntime, listener: Listener, connection: socket.socket, address: str) -> TableRow | None:
    """The NIC with the source address of a connection; None if another machine has opened it (see peer.py)."""
    row = network.table.by_ip.get(address)
    if row is None:
        return None
    return row if listener.macs_checked or peer.first_mac(connection) == row.mac else None


def _make_room(network: _NetworkRuntime, vm: limits.Load) -> bool:
    """Close the oldest connection of the VM that has the most, to make room for a connection of ``vm``.

    Returns False if no VM has at least two connections more than ``vm``.
    """
    most = max(network.connections.values(), key=lambda it: it.connections)
    if most.connections <= vm.connections + 1:
        return False
    next(it for it, load in network.connections.items() if load is most).close()
    return True


def _password_taken(key: Key, nic: str, password_id: str) -> PasswordTaken:
    return PasswordTaken(scope_id=key[0], network_id=key[1], nic=nic, password_id=password_id)


def _prepare(listener: Listener, sock: socket.socket) -> None:
    """Check and configure a socket. Raises ValueError if it has the wrong type or cannot be served safely."""
    wanted = socket.SOCK_DGRAM if listener.kind == "dhcp" else socket.SOCK_STREAM
    if sock.family != socket.AF_INET or sock.type != wanted:
        got = f"{sock.family.name} {sock.type.name}"
        raise ValueError(f"the {listener.kind} descriptor is a socket of type {got}, not AF_INET {wanted.name}")
    sock.setblocking(False)
    if listener.kind == "dhcp":
        # Send without a UDP checksum (RFC 768 allows it, and every client accepts it). Otherwise the kernel leaves the
        # checksum to the network card, and on a link without one a client that reads raw frames sees a wrong checksum.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
        return
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"the {listener.kind} descriptor does not listen")
    if not listener.macs_checked and not peer.keep_first_packet(sock):
        raise ValueError("this kernel does not keep the MAC address of a connection, and no nftables rule checks it")
