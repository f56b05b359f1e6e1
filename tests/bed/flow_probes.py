"""Many long-lived flows in one thread: each sends a numbered message, waits for its echo, and goes on.

Both ends check that no message is lost, repeated or out of order (TCP), or older than one before it (UDP).
bed/flows.py has the side of the test.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from bed.probes import FAILURES, IP_PKTINFO, SO_RCVBUFFORCE, Control

FLOWS_MAX = 8000
SECONDS_MAX = 900.0
_MESSAGE = struct.Struct("!IQ")  # the number of the flow; that of the message, from 1
_BACKLOG = 4096


def _allow_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _failure(number: int | None) -> str:
    return FAILURES.get(number or 0, f"error {number}")


def _bounded(seconds: float) -> float:
    if not 0 < seconds <= SECONDS_MAX:
        raise ValueError(f"{seconds} s is not within 0 and {SECONDS_MAX:.0f} s")
    return seconds


# --- the end that answers ---------------------------------------------------------------------------

_served: dict[str, Any] = {}


def _from_there(level: int, kind: int, where: bytes) -> tuple[int, int, bytes]:
    """The ancillary data that lets an answer leave from the address to which the question came."""
    if level == socket.IPPROTO_IP:
        return level, kind, bytes(4) + where[8:12] + bytes(4)
    return level, kind, where


class _Peer:
    """One connection, as the server sees it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""
        self.flow = -1
        self.number = 0


def serve_flows(stop: Control, *, places: list[list[Any]], seconds: float = SECONDS_MAX) -> dict[str, Any]:
    """Echo the messages of flows until stopped; ready when it listens. A place is [protocol, address, port].

    Returns the numbers of connections and messages, and of those that were out of order or ended by a reset.
    """
    _allow_descriptors()
    deadline = time.monotonic() + _bounded(seconds)
    counts = _served
    counts.update(connections=0, messages=0, disordered=0, resets=0)
    newest: dict[Any, int] = {}  # UDP: the number of the last message, by peer
    epoll = select.epoll()
    with contextlib.ExitStack() as stack:
        stack.enter_context(epoll)
        listeners: dict[int, socket.socket] = {}
        datagrams: dict[int, socket.socket] = {}
        for protocol, address, port in places:
            kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
            it = stack.enter_context(socket.socket(_family(address), kind))
            it.setblocking(False)
            it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if it.family == socket.AF_INET6:
                it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol == "udp":
                it.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
                # To answer from the address that was asked: with several the kernel would choose another one.
                if it.family == socket.AF_INET:
                    it.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
                else:
                    it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            it.bind((address, port))
            if protocol == "tcp":
                it.listen(_BACKLOG)
            (listeners if protocol == "tcp" else datagrams)[it.fileno()] = it
            epoll.register(it, select.EPOLLIN)
        peers: dict[int, _Peer] = {}

        def close_all() -> None:
            for it in peers.values():
                it.connection.close()

        stack.callback(close_all)

        def drop(descriptor: int) -> None:
            epoll.unregister(descriptor)
            peers.pop(descriptor).connection.close()

        def echo(descriptor: int) -> None:
            peer = peers[descriptor]
            data = peer.connection.recv(4096)
            if not data:
                drop(descriptor)
                return
            peer.buffer += data
            whole = len(peer.buffer) - len(peer.buffer) % _MESSAGE.size
            for flow, number in _MESSAGE.iter_unpack(peer.buffer[:whole]):
                if peer.flow < 0:
                    peer.flow = flow
                counts["disordered"] += (flow, number) != (peer.flow, peer.number + 1)
                counts["messages"] += 1
                peer.number = number
            # A client waits for each echo, so the socket has room.
            peer.connection.send(peer.buffer[:whole])
            peer.buffer = peer.buffer[whole:]

        stop.ready()
        while not stop.is_set() and time.monotonic() < deadline:
            for descriptor, _ in epoll.poll(0.2):
                try:
                    if descriptor in listeners:
                        connection, _ = listeners[descriptor].accept()
                        connection.setblocking(False)
                        peers[connection.fileno()] = _Peer(connection)
                        epoll.register(connection, select.EPOLLIN)
                        counts["connections"] += 1
                    elif descriptor in datagrams:
                        data, told, _, sender = datagrams[descriptor].recvmsg(4096, 256)
                        _, number = _MESSAGE.unpack(data)
                        counts["disordered"] += number <= newest.get(sender, 0)
                        counts["messages"] += 1
                        newest[sender] = number
                        datagrams[descriptor].sendmsg([data], [_from_there(*told[0])], 0, sender)
                    elif descriptor in peers:
                        echo(descriptor)
                except BlockingIOError:
                    continue
                except OSError:
                    if descriptor in peers:
                        counts["resets"] += 1
                        drop(descriptor)
    return counts


def flows_served(stop: Control) -> dict[str, Any]:
    """The numbers of ``serve_flows`` so far."""
    return dict(_served)


# --- the end that asks --------------------------------------------------------------------------------


class _Flow:
    """One flow, as the client sees it. Times are of time.monotonic; 0: not yet."""

    __slots__ = ("answered", "client", "failure", "gap_s", "group", "last", "number", "opened", "sent")

    def __init__(self, group: int) -> None:
        self.group = group
        self.client: socket.socket | None = None
        self.opened = self.last = self.sent = 0.0
        self.gap_s = 0.0
        self.number = self.answered = 0
        self.failure = ""

    def row(self) -> list[Any]:
        return [self.group, self.opened, self.last, round(self.gap_s, 4), self.answered, self.failure]


class _Client:
    """The flows of one process."""

    def __init__(self) -> None:
        self.flows: list[_Flow] = []
        self.opens = threading.Event()
        self.opens.set()


_client = _Client()


def run_flows(stop: Control, *, groups: list[dict[str, Any]], seconds: float = SECONDS_MAX) -> int:
    """Open flows and keep them going until stopped; returns their number. Ready at once.

    A group: protocol, address, port, count, per_s (how many are opened each second), every_s (from one answer to the
    next message; with UDP from one message to the next), and source, which may be empty.
    """
    _allow_descriptors()
    deadline = time.monotonic() + _bounded(seconds)
    if sum(it["count"] for it in groups) > FLOWS_MAX:
        raise ValueError("too many flows")
    flows, epoll = _client.flows, select.epoll()
    by_descriptor: dict[int, int] = {}
    order = itertools.count()
    began = time.monotonic()
    due: list[tuple[float, int, int, int]] = []  # time, order, group, flow; -1: open one more
    for group, it in enumerate(groups):
        for number in range(it["count"]):
            due.append((began + number / it["per_s"], next(order), group, -1))
    heapq.heapify(due)

    def fail(flow: _Flow, failure: str) -> None:
        flow.failure = failure
        if flow.client is not None:
            by_descriptor.pop(flow.client.fileno(), None)
            flow.client.close()

    def open_one(group: int) -> None:
        it = groups[group]
        flow = _Flow(group)
        flows.append(flow)
        kind = socket.SOCK_STREAM if it["protocol"] == "tcp" else socket.SOCK_DGRAM
        flow.client = socket.socket(_family(it["address"]), kind)
        flow.client.setblocking(False)
        try:
            if it["source"]:
                flow.client.bind((it["source"], 0))
            if it["protocol"] == "tcp":
                flow.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            status = flow.client.connect_ex((it["address"], it["port"]))
        except OSError as error:
            status = error.errno or -1
        if status not in (0, errno.EINPROGRESS):
            fail(flow, _failure(status))
            return
        by_descriptor[flow.client.fileno()] = len(flows) - 1
        if it["protocol"] == "tcp":
            epoll.register(flow.client, select.EPOLLOUT)
        else:
            epoll.register(flow.client, select.EPOLLIN)
            send(len(flows) - 1)

    def send(number: int) -> None:
        flow = flows[number]
        assert flow.client is not None
        it = groups[flow.group]
        flow.number += 1
        flow.sent = time.monotonic()
        if it["protocol"] == "udp":
            heapq.heappush(due, (flow.sent + it["every_s"], next(order), flow.group, number))
        try:
            flow.client.send(_MESSAGE.pack(number, flow.number))
        except OSError as error:
            if it["protocol"] == "tcp":  # a datagram may get lost, and an ICMP error is no end
                fail(flow, _failure(error.errno))

    def progress(number: int, answered: int) -> None:
        flow, now = flows[number], time.monotonic()
        if flow.last:
            flow.gap_s = max(flow.gap_s, now - flow.last)
        else:
            flow.opened = flow.opened or now
        flow.last, flow.answered = now, answered

    def read(number: int) -> None:
        flow = flows[number]
        assert flow.client is not None
        try:
            data = flow.client.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            if groups[flow.group]["protocol"] == "tcp":
                fail(flow, _failure(error.errno))
            return
        if groups[flow.group]["protocol"] == "udp":
            flow_number, answered = _MESSAGE.unpack(data)
            if flow_number == number and answered > flow.answered:
                progress(number, answered)
        elif not data:
            fail(flow, "closed")
        elif data != _MESSAGE.pack(number, flow.number):  # twelve bytes travel in one segment
            fail(flow, "wrong data")
        else:
            progress(number, flow.number)
            heapq.heappush(due, (flow.last + groups[flow.group]["every_s"], next(order), flow.group, number))

    def connected(number: int) -> None:
        flow = flows[number]
        assert flow.client is not None
        if status := flow.client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            fail(flow, _failure(status))
            return
        flow.opened = time.monotonic()
        epoll.modify(flow.client, select.EPOLLIN)
        send(number)

    stop.ready()
    with epoll:
        while not stop.is_set() and (now := time.monotonic()) < deadline:
            while due and due[0][0] <= now:
                _, _, group, number = heapq.heappop(due)
                if number >= 0:
                    if not flows[number].failure:
                        send(number)
                elif _client.opens.is_set():
                    open_one(group)
            pause_s = min(0.1, max(0.0, due[0][0] - time.monotonic())) if due else 0.1
            for descriptor, events in epoll.poll(pause_s):
                found = by_descriptor.get(descriptor)
                if found is None:
                    continue
                if events & select.EPOLLOUT:
                    connected(found)
                else:
                    read(found)
    for flow in flows:
        if flow.client is not None:
            flow.client.close()
    return len(flows)


def flows_seen(stop: Control) -> list[list[Any]]:
    """One row for each flow: group, time of the opening, of the last answer, longest gap, answers, failure."""
    return [it.row() for it in list(_client.flows)]


def open_no_more(stop: Control) -> float:
    """Open no further flows; returns the time."""
    _client.opens.clear()
    return time.monotonic()


OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (serve_flows, flows_served, run_flows, flows_seen, open_no_more)
}
