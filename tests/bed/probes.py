"""The network operations of a bed process: connect, serve, ping, flood, record frames. All have limits.

Every function takes JSON values and returns a JSON value. Long ones look at ``stop`` and end early when it is set.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

TIMEOUT_S_MAX = 120.0
# How long a probe waits for what must come. On a loaded machine a process may get no processor for seconds.
PATIENCE_S = 20.0
FLOOD_COUNT_MAX = 200_000
FLOWS_MAX = 2000  # of a flood at a time
FAILURES = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.ETIMEDOUT: "timeout",
    errno.EACCES: "prohibited",
    errno.EPERM: "prohibited",
}
_ICMP_ERRORS = {3: "unreachable", 11: "expired"}
# linux/in.h and asm-generic/socket.h; Python 3.11 does not name them.
IP_PKTINFO = 8
SO_RCVBUFFORCE = 33
ETH_P_ALL, ETH_P_ARP = 0x0003, 0x0806


class Control(threading.Event):
    """An event that is set when the operation should end early. ``ready`` reports that the operation has begun."""

    def __init__(self, tell: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.ready = tell


def _bounded(seconds: float) -> float:
    if not 0 < seconds <= TIMEOUT_S_MAX:
        raise ValueError(f"{seconds} s is not within 0 and {TIMEOUT_S_MAX:.0f} s")
    return seconds


def _outcome(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return FAILURES.get(error.errno or 0, f"error {error}")


def _line(connection: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n") and len(text) < 65536:
        piece = connection.recv(4096)
        if not piece:
            break
        text += piece
    return text


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# --- asking ---------------------------------------------------------------------------------------


def tcp_connect(
    stop: Control,
    address: str,
    port: int,
    *,
    timeout_s: float = PATIENCE_S,
    source: str = "",
    source_port: int = 0,
    say: str = "",
) -> dict[str, Any]:
    """Open one TCP connection; returns its outcome and the first line that the server sent."""
    _bounded(timeout_s)
    with socket.socket(_family(address), socket.SOCK_STREAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.settimeout(timeout_s)
        banner = b""
        try:
            if source or source_port:
                client.bind((source, source_port))
            client.connect((address, port))
        except OSError as error:
            return {"outcome": _outcome(error), "banner": ""}
        local = client.getsockname()
        try:
            if say:
                client.sendall(say.encode())
            banner = _line(client)
            outcome = "connected"
        except OSError as error:
            outcome = "silent" if _outcome(error) == "timeout" else _outcome(error)
        return {"outcome": outcome, "banner": banner.decode("utf-8", "replace"), "local": list(local[:2])}


def udp_exchange(
    stop: Control,
    address: str,
    port: int,
    *,
    timeout_s: float = PATIENCE_S,
    source: str = "",
    source_port: int = 0,
    say: str = "hello",
    tries: int = 1,
) -> dict[str, Any]:
    """Send datagrams until one is answered; the outcome is ``answered``, ``timeout`` or an ICMP error."""
    _bounded(timeout_s * tries)
    with socket.socket(_family(address), socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.settimeout(timeout_s)
        if source or source_port:
            client.bind((source, source_port))
        outcome = "timeout"
        for _ in range(tries):
            try:
                client.connect((address, port))
                client.send(say.encode())
                banner = client.recv(65536)
                return {
                    "outcome": "answered",
                    "banner": banner.decode("utf-8", "replace"),
                    "local": list(client.getsockname()[:2]),
                }
            except OSError as error:
                outcome = _outcome(error)
        return {"outcome": outcome, "banner": ""}


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    total += total >> 16
    return int(~total & 0xFFFF)


def icmp(
    stop: Control,
    address: str,
    *,
    kind: int = 8,
    code: int = 0,
    count: int = 1,
    timeout_s: float = PATIENCE_S,
    source: str = "",
    size: int = 16,
) -> dict[str, Any]:
    """Send ICMP queries of type 8 (echo) or 13 (timestamp), one by one; returns the replies' number and sender."""
    _bounded(timeout_s * count)
    answer_kind = {8: 0, 13: 14}[kind]
    name = random.randrange(1 << 16)
    answered, said, sender = 0, "timeout", ""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        if source:
            raw.bind((source, 0))
        for sequence in range(count):
            body = struct.pack("!HH", name, sequence) + bytes(max(size, 12))
            packet = struct.pack("!BBH", kind, code, 0) + body
            packet = struct.pack("!BBH", kind, code, _checksum(packet)) + body
            try:
                raw.sendto(packet, (address, 0))
            except OSError as error:
                said = _outcome(error)
                continue
            deadline = time.monotonic() + timeout_s
            while True:
                raw.settimeout(max(0.0, deadline - time.monotonic()))  # 0: only what has arrived already
                try:
                    reply, peer = raw.recvfrom(4096)
                except (TimeoutError, BlockingIOError):
                    break
                header = (reply[0] & 15) * 4
                got_kind = reply[header]
                got_name, got_sequence = struct.unpack_from("!HH", reply, header + 4)
                if got_kind == answer_kind and (got_name, got_sequence) == (name, sequence):
                    answered, sender = answered + 1, peer[0]
                    break
                inner = header + 8
                if got_kind in _ICMP_ERRORS and len(reply) >= inner + 28:
                    inner += (reply[inner] & 15) * 4
                    if struct.unpack_from("!H", reply, inner + 4)[0] == name:
                        said, sender = _ICMP_ERRORS[got_kind], peer[0]
                        break
    return {"outcome": "answered" if answered else said, "answered": answered, "sent": count, "sender": sender}


# --- serving --------------------------------------------------------------------------------------


class Servers:
    """Servers that send each client their own name and the client address that they see, then echo.

    One thread for all of them. TCP: one JSON line after accept, then echo. UDP: one JSON line per datagram.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._listeners: dict[str, socket.socket] = {}
        self._clients: dict[str, list[socket.socket]] = {}
        self._seen: dict[str, list[list[Any]]] = {}
        self._received: dict[str, int] = {}
        self._thread: threading.Thread | None = None

    def serve(self, kind: str, address: str, ports: list[int], name: str) -> list[str]:
        """Listen on ports; returns handles for ``end_serving``."""
        handles = []
        for port in ports:
            if kind == "tcp":
                listener = socket.create_server((address, port), family=_family(address), backlog=512)
            else:
                listener = socket.socket(_family(address), socket.SOCK_DGRAM)
                # 10,000 datagrams, whatever net.core.rmem_max is: this thread may get no processor for seconds.
                listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
                if listener.family == socket.AF_INET:
                    listener.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
                else:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                listener.bind((address, port))
            listener.setblocking(False)
            handle = f"{kind}/{address or '*'}/{port}"
            with self._lock:
                self._listeners[handle], self._clients[handle] = listener, []
                self._seen[handle], self._received[handle] = [], 0
            action = self._accept if kind == "tcp" else self._answer
            self._selector.register(listener, selectors.EVENT_READ, (action, handle, name, port))
            handles.append(handle)
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, daemon=True)
            self._thread.start()
        return handles

    def end(self, handle: str) -> None:
        with self._lock:
            sockets = [self._listeners.pop(handle), *self._clients.pop(handle)]
        for each in sockets:
            self._drop(each)

    def seen(self, handle: str) -> dict[str, Any]:
        """The last 10,000 clients, as [address, port], and the number of datagrams or bytes received."""
        with self._lock:
            return {"callers": list(self._seen[handle]), "received": self._received[handle]}

    def say(self, handle: str, text: str) -> int:
        """Send a line on every open connection; returns the number of connections."""
        with self._lock:
            clients = list(self._clients[handle])
        told = 0
        for client in clients:
            try:
                client.send(text.encode() + b"\n")
                told += 1
            except OSError:
                self._drop(client)
        return told

    def _drop(self, each: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(each)
        with self._lock:
            for clients in self._clients.values():
                if each in clients:
                    clients.remove(each)
        each.close()

    def _loop(self) -> None:
        while True:
            for key, _ in self._selector.select(0.2):
                action, *rest = key.data
                try:
                    action(key.fileobj, *rest)
                except OSError:
                    if action == self._echo:
                        self._drop(key.fileobj)  # type: ignore[arg-type]

    def _note(self, handle: str, peer: Any, count: int = 1) -> None:
        with self._lock:
            if handle in self._seen:
                self._received[handle] += count
                if len(self._seen[handle]) < 10_000:
                    self._seen[handle].append(list(peer[:2]))

    def _banner(self, name: str, port: int, peer: Any, local: Any) -> bytes:
        return (json.dumps({"server": name, "port": port, "saw": list(peer[:2]), "at": local[0]}) + "\n").encode()

    def _accept(self, listener: socket.socket, handle: str, name: str, port: int) -> None:
        for _ in range(256):
            try:
                client, peer = listener.accept()
            except BlockingIOError:
                return
            client.setblocking(False)
            self._note(handle, peer, 0)
            try:
                client.send(self._banner(name, port, peer, client.getsockname()))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._clients.setdefault(handle, []).append(client)
            self._selector.register(client, selectors.EVENT_READ, (self._echo, handle, name, port))

    def _echo(self, client: socket.socket, handle: str, name: str, port: int) -> None:
        data = client.recv(65536)
        if not data:
            self._drop(client)
            return
        with self._lock:
            if handle in self._received:
                self._received[handle] += len(data)
        client.setblocking(True)
        client.settimeout(10)
        client.sendall(data)
        client.setblocking(False)

    def _answer(self, listener: socket.socket, handle: str, name: str, port: int) -> None:
        for _ in range(512):
            try:
                _, told, _, peer = listener.recvmsg(65536, 256)
            except BlockingIOError:
                return
            self._note(handle, peer)
            # Answer from the requested address. With several addresses the kernel would choose another one.
            level, kind, where = told[0]
            if level == socket.IPPROTO_IP:
                asked = socket.inet_ntop(socket.AF_INET, where[8:12])
                where = bytes(4) + where[8:12] + bytes(4)
            else:
                asked = socket.inet_ntop(socket.AF_INET6, where[:16])
            listener.sendmsg([self._banner(name, port, peer, (asked,))], [(level, kind, where)], 0, peer)


SERVERS = Servers()


def serve(stop: Control, kind: str, address: str, ports: list[int], name: str) -> list[str]:
    """Serve "tcp" or "udp" ports."""
    return SERVERS.serve(kind, address, ports, name)


def end_serving(stop: Control, handles: list[str]) -> None:
    for handle in handles:
        SERVERS.end(handle)


def callers(stop: Control, handle: str) -> dict[str, Any]:
    return SERVERS.seen(handle)


def server_says(stop: Control, handle: str, text: str) -> int:
    return SERVERS.say(handle, text)


# --- connections that are kept --------------------------------------------------------------------

_kept: dict[int, socket.socket] = {}


def open_tcp(
    stop: Control, address: str, port: int, *, timeout_s: float = PATIENCE_S, source: str = "", source_port: int = 0
) -> dict[str, Any]:
    """Open a connection and keep it; returns its number and the server's first line."""
    _bounded(timeout_s)
    client = socket.socket(_family(address), socket.SOCK_STREAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.settimeout(timeout_s)
    try:
        if source or source_port:
            client.bind((source, source_port))
        client.connect((address, port))
        banner = _line(client)
    except OSError:
        client.close()
        raise
    _kept[client.fileno()] = client
    return {"number": client.fileno(), "banner": banner.decode(), "local": list(client.getsockname()[:2])}


def ask_on(stop: Control, number: int, text: str, timeout_s: float) -> str:
    """Send a line on a kept connection and wait for its echo: ``answered``, ``timeout``, ``reset``, ``closed``."""
    _bounded(timeout_s)
    client = _kept[number]
    client.settimeout(timeout_s)
    try:
        client.sendall(text.encode() + b"\n")
        return "answered" if _line(client) else "closed"
    except OSError as error:
        return _outcome(error)


def hear_on(stop: Control, number: int, timeout_s: float) -> str:
    """Wait for a line on a kept connection: the line, or ``timeout``, ``reset``, ``closed`` in angle brackets."""
    _bounded(timeout_s)
    client = _kept[number]
    client.settimeout(timeout_s)
    try:
        return _line(client).decode().strip() or "<closed>"
    except OSError as error:
        return f"<{_outcome(error)}>"


def close_tcp(stop: Control, number: int, abruptly: bool = False) -> None:
    client = _kept.pop(number)
    if abruptly:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def transfer(
    stop: Control,
    address: str,
    port: int,
    *,
    seconds: float = 10.0,
    pause_s: float = 0.002,
    source: str = "",
) -> dict[str, Any]:
    """Transfer data through an echo server until stopped; returns bytes sent and echoed, whether they are equal, the
    longest time without progress, and the error that ended the transfer early.
    """
    _bounded(seconds)
    sent, echoed = hashlib.sha256(), hashlib.sha256()
    count, back, stall_s, failure = 0, 0, 0.0, ""
    seed = random.randbytes(8192)
    with socket.socket(_family(address), socket.SOCK_STREAM) as client:
        client.settimeout(15)
        try:
            if source:
                client.bind((source, 0))
            client.connect((address, port))
            _line(client)
            stop.ready()
            progress = time.monotonic()
            deadline = progress + seconds
            while time.monotonic() < deadline and not stop.is_set():
                block = seed[: 1 + count % 8191]
                client.sendall(block)
                sent.update(block)
                count += len(block)
                while back < count:
                    piece = client.recv(count - back)
                    if not piece:
                        raise ConnectionResetError(errno.ECONNRESET, "closed by the other side")
                    echoed.update(piece)
                    back += len(piece)
                now = time.monotonic()
                stall_s, progress = max(stall_s, now - progress), now
                time.sleep(pause_s)
        except OSError as error:
            failure = _outcome(error)
    return {
        "sent": count,
        "echoed": back,
        "intact": back == count and sent.digest() == echoed.digest(),
        "stall_s": round(stall_s, 3),
        "failure": failure,
    }


def steady_udp(
    stop: Control, address: str, port: int, *, seconds: float = 30.0, every_s: float = 0.005
) -> dict[str, Any]:
    """Send a datagram each ``every_s`` seconds on one flow until stopped; returns the numbers of datagrams and answers,
    and the longest time between two answers.
    """
    _bounded(seconds)
    sent, answered, gap_s = 0, 0, 0.0
    with socket.socket(_family(address), socket.SOCK_DGRAM) as client:
        client.connect((address, port))
        began = time.monotonic()
        last: float | None = None
        while time.monotonic() < began + seconds and not stop.is_set():
            with contextlib.suppress(OSError):  # an ICMP error is a missing answer
                client.settimeout(0)
                client.send(b"x")
            sent += 1
            due = began + sent * every_s
            while (left_s := due - time.monotonic()) > 0:
                client.settimeout(left_s)
                try:
                    client.recv(4096)
                except OSError:
                    continue
                now = time.monotonic()
                gap_s, last = max(gap_s, now - last if last is not None else 0.0), now
                if not answered:
                    stop.ready()
                answered += 1
    return {"sent": sent, "answered": answered, "gap_s": round(gap_s, 4)}


def burst_udp(stop: Control, address: str, port: int, *, count: int, size: int = 18) -> float:
    """Send so many datagrams of one flow without a pause; returns the seconds. Nobody needs to answer.

    On a bed the kernel forwards a datagram within the system call that sends it, so this is the time of the whole path.
    """
    if not 0 < count <= FLOOD_COUNT_MAX:
        raise ValueError(f"{count} is not within 0 and {FLOOD_COUNT_MAX}")
    data = bytes(size)
    with socket.socket(_family(address), socket.SOCK_DGRAM) as client:
        client.connect((address, port))
        began = time.perf_counter()
        for _ in range(count):
            client.send(data)
        return time.perf_counter() - began


# --- floods ---------------------------------------------------------------------------------------


def flood_udp(
    stop: Control,
    address: str,
    ports: list[int],
    *,
    count: int = 1000,
    rate: int = 1000,
    linger_s: float = PATIENCE_S,
    source: str = "",
) -> dict[str, Any]:
    """Send one datagram per new flow, at most at a rate, to the ports in turn; returns the answers per port.

    It ends with the last answer, and ``linger_s`` seconds after the last datagram when an answer is missing.
    """
    if not 0 < count <= FLOOD_COUNT_MAX:
        raise ValueError(f"{count} datagrams are too many")
    _bounded(count / rate + linger_s)
    sent = dict.fromkeys(map(str, ports), 0)
    answered = dict.fromkeys(map(str, ports), 0)
    selector = selectors.DefaultSelector()

    def forget(client: Any) -> None:
        selector.unregister(client)
        client.close()

    def collect(seconds: float) -> None:
        for key, _ in selector.select(seconds):
            client: socket.socket = key.fileobj  # type: ignore[assignment]
            try:
                client.recv(4096)
                answered[key.data] += 1
            except OSError:
                pass
            forget(client)

    due = time.monotonic()
    patience_s = linger_s
    for number in range(count):
        if stop.is_set():
            break
        port = ports[number % len(ports)]
        client = socket.socket(_family(address), socket.SOCK_DGRAM)
        client.setblocking(False)
        if source:
            client.bind((source, 0))
        try:
            client.sendto(b"x", (address, port))
            sent[str(port)] += 1
        except OSError:
            client.close()
            continue
        selector.register(client, selectors.EVENT_READ, str(port))
        # Descriptors are limited: wait for answers, and at last close the oldest flow without one.
        while len(selector.get_map()) > FLOWS_MAX and patience_s > 0:
            collect(0.05)
            patience_s -= 0.05
        if len(selector.get_map()) > FLOWS_MAX:
            forget(next(iter(selector.get_map().values())).fileobj)
        # After a pause of this process most of it is not made up for: a burst would fill the queues of the path.
        due = max(due + 1 / rate, time.monotonic() - 0.02)
        collect(max(0.0, due - time.monotonic()))
    deadline = time.monotonic() + linger_s
    while time.monotonic() < deadline and selector.get_map():
        collect(0.05)
    for key in list(selector.get_map().values()):
        forget(key.fileobj)
    selector.close()
    return {"sent": sent, "answered": answered}


def flood_tcp(
    stop: Control,
    address: str,
    port: int,
    *,
    seconds: float = 5.0,
    width: int = 4,
    timeout_s: float = 3.0,
    source: str = "",
) -> dict[str, Any]:
    """Open connections without pause in ``width`` threads; returns the count of each outcome."""
    _bounded(seconds)
    outcomes: dict[str, int] = {}
    lock = threading.Lock()
    deadline = time.monotonic() + seconds

    def run() -> None:
        while time.monotonic() < deadline and not stop.is_set():
            outcome = tcp_connect(stop, address, port, timeout_s=timeout_s, source=source)["outcome"]
            with lock:
                outcomes[outcome] = outcomes.get(outcome, 0) + 1

    threads = [threading.Thread(target=run) for _ in range(width)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


# --- frames ---------------------------------------------------------------------------------------


def _address(data: bytes) -> str:
    return ".".join(map(str, data))


def _mac(data: bytes) -> str:
    return data.hex(":")


def link_mac(link: str) -> str:
    with open(f"/sys/class/net/{link}/address") as file:
        return file.read().strip()


def _received(raw: socket.socket, deadline: float, stop: Control) -> tuple[bytes, Any] | None:
    """The next frame; None at the deadline and when stopped, once all frames that have arrived have been read."""
    while True:
        ended = stop.is_set() or time.monotonic() >= deadline
        raw.settimeout(0.0 if ended else 0.05)
        try:
            return raw.recvfrom(65536)
        except (TimeoutError, BlockingIOError):
            if ended:
                return None


def watch_arp(stop: Control, link: str, *, seconds: float = 10.0, announced: str = "") -> list[dict[str, Any]]:
    """Record ARP frames on a link until stopped. ``gratuitous``: sender and target address are equal.

    Given ``announced``, it ends with the first gratuitous frame of this address.
    """
    _bounded(seconds)
    frames: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as raw:
        raw.bind((link, ETH_P_ARP))
        stop.ready()
        while len(frames) < 10_000 and (received := _received(raw, deadline, stop)):
            frame, where = received
            if where[2] == socket.PACKET_OUTGOING or len(frame) < 42:
                continue
            frames.append(
                {
                    "operation": {1: "request", 2: "reply"}.get(struct.unpack_from("!H", frame, 20)[0], "other"),
                    "sender_mac": _mac(frame[22:28]),
                    "sender": _address(frame[28:32]),
                    "target": _address(frame[38:42]),
                    "gratuitous": frame[28:32] == frame[38:42],
                    "broadcast": frame[0:6] == b"\xff" * 6,
                }
            )
            if announced and frames[-1]["gratuitous"] and frames[-1]["sender"] == announced:
                break
    return frames


def who_has(stop: Control, link: str, address: str, *, source: str = "0.0.0.0", timeout_s: float = 0.5) -> list[str]:
    """Send an ARP request; returns the MAC address of each answer within the time.

    Two hosts that serve one network have the same MAC addresses, so equal ones are listed, too. Answers to a request
    with another ``source`` are left out.
    """
    _bounded(timeout_s)
    own = bytes.fromhex(link_mac(link).replace(":", ""))
    target = socket.inet_aton(address)
    request = b"\xff" * 6 + own + struct.pack("!HHHBBH", ETH_P_ARP, 1, 0x0800, 6, 4, 1)
    request += own + socket.inet_aton(source) + bytes(6) + target
    found: list[str] = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as raw:
        raw.bind((link, ETH_P_ARP))
        raw.send(request)
        deadline = time.monotonic() + timeout_s
        while True:
            raw.settimeout(max(0.0, deadline - time.monotonic()))  # 0: only what has arrived already
            try:
                frame = raw.recv(2048)
            except (TimeoutError, BlockingIOError):
                break
            is_reply = frame[20:22] == b"\0\2" and frame[28:32] == target and frame[38:42] == socket.inet_aton(source)
            if is_reply:
                found.append(_mac(frame[22:28]))
    return found


def send_frame(stop: Control, link: str, frame: str, count: int = 1) -> None:
    """Send a raw frame, given as hexadecimal, on a link."""
    if not 0 < count <= 1000:
        raise ValueError(f"{count} frames are too many")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((link, 0))
        for _ in range(count):
            raw.send(bytes.fromhex(frame))


def capture(
    stop: Control, link: str, *, seconds: float = 5.0, ethertype: int = ETH_P_ALL, count_max: int = 1000
) -> list[str]:
    """Record frames on a link until stopped; returns them as hexadecimal."""
    _bounded(seconds)
    frames: list[str] = []
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype)) as raw:
        raw.bind((link, ethertype))
        stop.ready()
        while len(frames) < count_max and (received := _received(raw, deadline, stop)):
            frame, where = received
            if where[2] != socket.PACKET_OUTGOING:
                frames.append(frame.hex())
    return frames


PROBES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        tcp_connect,
        udp_exchange,
        icmp,
        serve,
        end_serving,
        callers,
        server_says,
        open_tcp,
        ask_on,
        hear_on,
        close_tcp,
        transfer,
        steady_udp,
        burst_udp,
        flood_udp,
        flood_tcp,
        watch_arp,
        who_has,
        send_frame,
        capture,
    )
}
