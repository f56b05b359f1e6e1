"""The networks that are served: their tables, their sockets, and who may ask.

All on one event loop and one thread. Every callback does a bounded piece of work and returns, so that a network that
floods its sockets costs the others a little time, and no answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable

import h11

from netloom.guest import dhcp, limits, metadata, password, peer
from netloom.guest.http import TOO_MANY, HttpAnswer, HttpConnection
from netloom.guest.table import GuestTable, mac_bytes
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

# What is taken from one socket before the others get their turn.
_PACKETS_AT_ONCE = 16
_ACCEPTS_AT_ONCE = 8
_PACKET_BYTES_MAX = 2048
# For how long a listener rests when there are no descriptors left.
_OUT_OF_DESCRIPTORS_S = 0.2

# linux/in.h, asm-generic/socket.h
_IP_PKTINFO = 8
_SO_NO_CHECK = 11

Key = tuple[str, str]  # scope_id, network_id


class _NetworkRuntime:
    def __init__(self, table: GuestTable) -> None:
        self.table = table
        self.sockets: list[tuple[Listener, socket.socket]] = []
        self.connections: dict[HttpConnection, limits.Load] = {}  # with the load of the VM, the oldest first
        self.load = limits.network_load()
        self.vm_loads: dict[bytes, limits.Load] = {}  # by MAC
        self.notices = limits.Bucket(limits.NOTICES_PER_S, limits.NOTICES_BURST)


class Networks:
    """``tell`` takes what the agent should know; when nobody listens it is lost, except passwords: see ``untold``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tell: Callable[[GuestMessage], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._networks: dict[Key, _NetworkRuntime] = {}
        # Acknowledged by the VM and still in the agent's table: (network, NIC) -> password_id.
        self._taken: dict[tuple[Key, str], str] = {}
        # Last given out: an acknowledgement is of that one, not of one that was set meanwhile.
        self._given: dict[tuple[Key, str], str] = {}

    # ---- what the agent asks

    @property
    def served(self) -> tuple[Served, ...]:
        """What is served, by revision."""
        return tuple(
            Served(*key, it.table.network.revision, tuple(listener for listener, _ in it.sockets))
            for key, it in sorted(self._networks.items())
        )

    @property
    def untold(self) -> list[PasswordTaken]:
        """The passwords that were taken and are still in the agent's table."""
        return [_taken(*at, id_) for at, id_ in self._taken.items()]

    def serve(self, asked: ServeNetwork, descriptors: list[int]) -> Ack:
        """Put table and sockets in force. On an error nothing changes, and the descriptors that came are closed."""
        sockets: list[tuple[Listener, socket.socket]] = []
        try:
            table = GuestTable(asked.network)
            for listener, descriptor in zip(asked.listeners, descriptors, strict=True):
                sock = socket.socket(fileno=descriptor)
                sockets.append((listener, sock))
                _prepare(listener, sock)
        except (ValueError, OSError) as error:
            for _, sock in sockets:
                sock.detach()
            for descriptor in descriptors:
                os.close(descriptor)
            return Ack(seq=asked.seq, error=f"network {asked.network.network_id}: {error}")
        key = (asked.network.scope_id, asked.network.network_id)
        network = self._networks.setdefault(
            key,
            _NetworkRuntime(table),  # guard: a-network-has-its-own-leases
        )
        self._close_sockets(network)
        network.sockets = sockets
        self._put(key, network, table)
        for listener, sock in sockets:
            self._watch(key, network, listener, sock)
        return Ack(seq=asked.seq)

    def update(self, seq: int, asked: GuestNetwork) -> Ack:
        """Put the table in force. On an error the old one stays."""
        key = (asked.scope_id, asked.network_id)
        network = self._networks.get(key)
        if network is None:
            return Ack(seq=seq, error=f"network {asked.network_id} is not served")
        try:
            self._put(key, network, GuestTable(asked))
        except ValueError as error:
            return Ack(seq=seq, error=f"network {asked.network_id}: {error}")
        return Ack(seq=seq)

    def drop(self, seq: int, key: Key) -> Ack:
        """Forget the network: sockets, connections, passwords."""
        network = self._networks.pop(key, None)
        if network is not None:
            self._close_sockets(network)
            for connection in list(network.connections):
                connection.close()
        for kept in (self._taken, self._given):
            for at in [at for at in kept if at[0] == key]:
                del kept[at]
        return Ack(seq=seq)

    def lend(self, seq: int, key: Key) -> tuple[LentSockets, list[int]]:
        """The network's listeners and their descriptors, which stay ours."""
        network = self._networks.get(key)
        sockets = network.sockets if network is not None else []
        return LentSockets(seq=seq, listeners=tuple(it for it, _ in sockets)), [sock.fileno() for _, sock in sockets]

    def stop(self) -> None:
        """Take nothing new; what is being answered is answered."""
        for network in self._networks.values():
            self._close_sockets(network)

    @property
    def idle(self) -> bool:
        """Whether nobody is connected."""
        return not any(network.connections for network in self._networks.values())

    def _put(self, key: Key, network: _NetworkRuntime, table: GuestTable) -> None:
        network.table = table
        network.vm_loads = {mac: load for mac, load in network.vm_loads.items() if mac in table.leases}
        ids = {nic.nic: nic.password_id for nic in table.network.nics if nic.password is not None}
        for at in [at for at in self._given if at[0] == key and at[1] not in ids]:
            del self._given[at]
        for at, id_ in [(at, id_) for at, id_ in self._taken.items() if at[0] == key]:
            if ids.get(at[1]) == id_:
                # The agent that sent this table has not heard of it.
                self._tell(_taken(*at, id_))
            else:
                del self._taken[at]

    def _close_sockets(self, network: _NetworkRuntime) -> None:
        for _, sock in network.sockets:
            self._loop.remove_reader(sock)
            sock.close()
        network.sockets = []

    def _watch(self, key: Key, network: _NetworkRuntime, listener: Listener, sock: socket.socket) -> None:
        if sock.fileno() < 0:
            return
        if listener.kind == "dhcp":
            self._loop.add_reader(sock, self._packets, key, network, sock)
        else:
            self._loop.add_reader(sock, self._accept, key, network, listener, sock)

    # ---- what the VMs ask

    def _packets(self, key: Key, network: _NetworkRuntime, sock: socket.socket) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            try:
                packet = sock.recv(_PACKET_BYTES_MAX)
            except OSError:
                return
            request = dhcp.parse(packet)
            if request is None:
                continue
            if request.type == dhcp.MessageType.DECLINE and (lease := network.table.leases.get(request.mac)):
                text = f"the VM declines its address {lease.nic.ip}: another machine on the segment uses it"
                self._notice(key, network, lease.nic, text)
            reply = dhcp.respond(request, network.table)
            if reply is None:
                continue
            # From the address that the reply names as its server, where the link has several.
            source = struct.pack("=I4s4s", 0, network.table.server_ip, b"\0\0\0\0")
            to = (reply.to, dhcp.CLIENT_PORT)
            try:
                sock.sendmsg([reply.packet], [(socket.IPPROTO_IP, _IP_PKTINFO, source)], socket.MSG_DONTWAIT, to)
            except OSError as error:
                lease = network.table.leases[request.mac]
                self._notice(key, network, lease.nic, f"the DHCP reply to {reply.to} cannot be sent: {error.strerror}")

    def _accept(self, key: Key, network: _NetworkRuntime, listener: Listener, sock: socket.socket) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, (address, _port) = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError:
                self._loop.remove_reader(sock)
                self._loop.call_later(_OUT_OF_DESCRIPTORS_S, self._watch, key, network, listener, sock)
                return
            mac = self._owner(network, listener, connection, address)
            if mac is None:
                connection.close()
                continue
            vm = network.vm_loads.setdefault(mac, limits.vm_load())
            if vm.full or (network.load.full and not _made_room(network, vm)):
                connection.close()
                continue
            vm.connections += 1
            network.load.connections += 1
            self._converse(key, network, listener, connection, address, mac, vm)

    def _owner(
        self, network: _NetworkRuntime, listener: Listener, connection: socket.socket, address: str
    ) -> bytes | None:
        """The MAC of the NIC that ``address`` belongs to, when it is that NIC that has connected."""
        nic = network.table.nics.get(address)
        if nic is None:
            return None
        mac = mac_bytes(nic.mac)
        return mac if listener.macs_checked or peer.first_mac(connection) == mac else None

    def _converse(
        self,
        key: Key,
        network: _NetworkRuntime,
        listener: Listener,
        sock: socket.socket,
        address: str,
        mac: bytes,
        vm: limits.Load,
    ) -> None:
        def site(request: h11.Request) -> HttpAnswer | None:
            # Asked anew for every request: the address may have become another VM's since the connection began.
            nic = network.table.nics.get(address)
            if nic is None or mac_bytes(nic.mac) != mac or self._networks.get(key) is not network:
                return None
            if not limits.admitted(vm, network.load):
                return TOO_MANY
            return metadata.respond(request, nic) if listener.kind == "metadata" else self._password(key, request, nic)

        def ended(connection: HttpConnection) -> None:
            network.connections.pop(connection, None)
            network.load.connections -= 1
            vm.connections -= 1

        sock.setblocking(False)
        network.connections[HttpConnection(self._loop, sock, site, ended)] = vm

    def _password(self, key: Key, request: h11.Request, nic: GuestNic) -> HttpAnswer:
        at = (key, nic.nic)
        secret: Secret | None = nic.password
        if self._taken.get(at) == nic.password_id:
            secret = None
        outcome = password.respond(request, secret)
        if outcome.given:
            self._given[at] = nic.password_id
        if outcome.taken and secret is not None and self._given.get(at, nic.password_id) == nic.password_id:
            self._taken[at] = nic.password_id  # guard: a-taken-password-is-remembered
            self._tell(_taken(key, nic.nic, nic.password_id))
        return outcome.answer

    def _notice(self, key: Key, network: _NetworkRuntime, nic: GuestNic, text: str) -> None:
        if network.notices.take():
            self._tell(Notice(scope_id=key[0], network_id=key[1], nic=nic.nic, text=text))


def _made_room(network: _NetworkRuntime, vm: limits.Load) -> bool:
    """Whoever has the most connections has lost the oldest of them to a VM that has fewer; False: nobody has more."""
    most = max(network.connections.values(), key=lambda it: it.connections)
    if most.connections <= vm.connections + 1:
        return False
    next(it for it, load in network.connections.items() if load is most).close()
    return True


def _taken(key: Key, nic: str, password_id: str) -> PasswordTaken:
    return PasswordTaken(scope_id=key[0], network_id=key[1], nic=nic, password_id=password_id)


def _prepare(listener: Listener, sock: socket.socket) -> None:
    """Raises ValueError when the descriptor is not what it is said to be, or cannot be served safely."""
    wanted = socket.SOCK_DGRAM if listener.kind == "dhcp" else socket.SOCK_STREAM
    if sock.family != socket.AF_INET or sock.type != wanted:
        raise ValueError(f"the {listener.kind} descriptor is no such socket: {sock.family.name} {sock.type.name}")
    sock.setblocking(False)
    if listener.kind == "dhcp":
        # No checksum instead of one that the network card was to fill in: a client that reads raw frames sees a wrong
        # one on a link without a card. RFC 768 allows it, and every client takes it.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
        return
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"the {listener.kind} descriptor does not listen")
    if not listener.macs_checked and not peer.keep_first_packet(sock):
        raise ValueError("this kernel does not tell a connection's MAC address, and nobody else checks it")
