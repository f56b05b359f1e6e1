"""The methods that a test calls on a simulated machine: a VM, a host, a node of the internet or the switch.

Each method sends one request to the machine's process (bed/client.py) and returns a typed answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from bed.client import BedError, Client, Running
from bed.probes import PATIENCE_S


@dataclass(frozen=True)
class Done:
    """Exit status and output of a program that has ended."""

    status: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Execution:
    """A program run as CloudStack's client runs it: stdout and stderr merged.

    ``hung`` says in which phase the program was killed; empty when it ended by itself.
    """

    status: int
    output: str
    seconds: float
    hung: str


@dataclass(frozen=True)
class Answer:
    """The result of one connection or datagram.

    ``outcome`` is ``connected``, ``answered``, ``refused``, ``reset``, ``timeout``, ``unreachable`` or ``prohibited``,
    or ``silent`` when the connection was made and the server sent nothing. When a server of the bed answered, the other
    fields are its name and port, the address on which it was reached, and the source address and port that it saw.
    """

    outcome: str
    banner: str = ""
    server: str = ""
    port: int = 0
    at: str = ""
    saw: str = ""
    saw_port: int = 0
    local: str = ""
    local_port: int = 0

    @property
    def ok(self) -> bool:
        return self.outcome in ("connected", "answered", "silent")


def _answer(value: dict[str, Any]) -> Answer:
    told: dict[str, Any] = {}
    if value["banner"].startswith("{"):
        told = json.loads(value["banner"])
    local = value.get("local", ["", 0])
    saw = told.get("saw", ["", 0])
    return Answer(
        outcome=value["outcome"],
        banner=value["banner"],
        server=told.get("server", ""),
        port=told.get("port", 0),
        at=told.get("at", ""),
        saw=saw[0],
        saw_port=saw[1],
        local=local[0],
        local_port=local[1],
    )


@dataclass(frozen=True)
class Ping:
    outcome: str
    answered: int
    sent: int
    sender: str

    @property
    def ok(self) -> bool:
        return self.answered == self.sent


@dataclass(frozen=True)
class Transferred:
    """A long transfer through an echo server."""

    sent: int
    echoed: int
    intact: bool
    stall_s: float
    failure: str


@dataclass(frozen=True)
class Steady:
    """Datagrams at a steady rate. ``gap_s``: the longest time between two answers."""

    sent: int
    answered: int
    gap_s: float


@dataclass(frozen=True)
class Flooded:
    """New flows by port: the number sent and the number answered."""

    sent: dict[int, int]
    answered: dict[int, int]

    def lost(self, port: int) -> int:
        return self.sent[port] - self.answered[port]


def _flooded(value: dict[str, dict[str, int]]) -> Flooded:
    sent, answered = ({int(port): count for port, count in value[key].items()} for key in ("sent", "answered"))
    return Flooded(sent, answered)


@dataclass(frozen=True)
class Arp:
    operation: str
    sender_mac: str
    sender: str
    target: str
    gratuitous: bool
    broadcast: bool


class Service:
    """Listening sockets of one machine. They close at the end of the ``with`` block, or with the machine."""

    def __init__(self, machine: Machine, handles: list[str]) -> None:
        self._machine, self._handles = machine, handles

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._machine.client.call("end_serving", handles=self._handles)

    def callers(self) -> list[tuple[str, int]]:
        """Source address and port of every caller so far, as the service saw them."""
        found = [self._machine.client.call("callers", handle=handle)["callers"] for handle in self._handles]
        return [(address, port) for callers in found for address, port in callers]

    def received(self) -> int:
        """The number of datagrams, or of bytes after accept, received so far."""
        return sum(self._machine.client.call("callers", handle=handle)["received"] for handle in self._handles)

    def say(self, text: str) -> int:
        """Send a line on every open connection, before the client sends anything. Returns the number of connections."""
        return sum(self._machine.client.call("server_says", handle=handle, text=text) for handle in self._handles)


class Connection:
    """A TCP connection to a server of the bed; it stays open."""

    def __init__(self, machine: Machine, value: dict[str, Any]) -> None:
        self._machine, self._number = machine, int(value["number"])
        self.answer = _answer({"outcome": "connected", **value})

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, text: str = "still there?", timeout_s: float = PATIENCE_S) -> str:
        """Send a line, wait for its echo: ``answered``, ``timeout``, ``reset`` or ``closed``."""
        return str(self._machine.client.call("ask_on", number=self._number, text=text, timeout_s=timeout_s))

    def hear(self, timeout_s: float = PATIENCE_S) -> str:
        """The next line that the server sends; ``<timeout>``, ``<reset>`` or ``<closed>`` when none comes."""
        return str(self._machine.client.call("hear_on", number=self._number, timeout_s=timeout_s))

    def close(self, *, abruptly: bool = False) -> None:
        self._machine.client.call("close_tcp", number=self._number, abruptly=abruptly)


class Machine:
    """One simulated machine: runs commands, reads and writes files, sends and receives packets in its namespaces."""

    def __init__(self, name: str, client: Client) -> None:
        self.name = name
        self.client = client

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} {self.name}>"

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.end()

    # --- commands and files

    def run(
        self, *argv: str, check: bool = True, input: str = "", uid: int = 0, timeout_s: float = 60.0, **environment: str
    ) -> Done:
        """Run a program on this machine. Raises BedError when ``check`` is set and the exit status is not 0."""
        done = Done(
            **self.client.call(
                "run", argv=argv, input=input, uid=uid, timeout_s=timeout_s, environment=environment or None
            )
        )
        if check and done.status:
            raise BedError(f"{self.name}: {' '.join(argv)}: exit status {done.status}\n{done.out}{done.err}")
        return done

    def sh(self, script: str, *, check: bool = True) -> str:
        """Run a shell script; returns its standard output."""
        return self.run("sh", "-c", script, check=check).out

    def read(self, path: str) -> str:
        return str(self.client.call("read", path=path))

    def write(self, path: str, text: str, *, mode: int = 0o644, uid: int = 0) -> None:
        self.client.call("write", path=path, text=text, mode=mode, uid=uid)

    def sysctl(self, name: str, value: str = "") -> str:
        """Set a sysctl of the network namespace, unless ``value`` is empty. Returns the present value."""
        return str(self.client.call("sysctl", name=name, value=value))

    def remove(self, path: str) -> None:
        self.client.call("remove", path=path)

    def listing(self, path: str) -> list[str]:
        """The names in a directory; empty when the directory does not exist."""
        return list(self.client.call("listing", path=path))

    def links(self, *lines: str) -> None:
        """Run lines of ``ip -batch`` in one process."""
        if lines:
            self.run("ip", "-batch", "-", input="\n".join(lines) + "\n")

    # --- asking

    def tcp(self, address: str, port: int, **options: Any) -> Answer:
        """One TCP connection. Options: timeout_s, source, source_port, say."""
        return _answer(self.client.call("tcp_connect", address=address, port=port, **options))

    def tcp_many(self, calls: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Many connections at a time; each mapping has the arguments of one ``tcp``."""
        return [_answer(value) for value in self.client.call("many", probe="tcp_connect", calls=list(map(dict, calls)))]

    def udp(self, address: str, port: int, **options: Any) -> Answer:
        """One datagram and its answer. Options: timeout_s, source, source_port, say, tries."""
        return _answer(self.client.call("udp_exchange", address=address, port=port, **options))

    def ping(self, address: str, **options: Any) -> Ping:
        """ICMP queries. Options: kind (8 echo, 13 timestamp), code, count, timeout_s, source, size."""
        return Ping(**self.client.call("icmp", address=address, **options))

    def open(self, address: str, port: int, **options: Any) -> Connection:
        """Open a connection and keep it. Options: timeout_s, source, source_port. Raises Refused."""
        return Connection(self, self.client.call("open_tcp", address=address, port=port, **options))

    def transfer(self, address: str, port: int, *, seconds: float = 30.0, **options: Any) -> Running[Transferred]:
        """Start a long transfer; it is connected when this returns. It ends after ``seconds``, or when stopped."""
        running = self.client.start(
            "transfer", lambda value: Transferred(**value), address=address, port=port, seconds=seconds, **options
        )
        return running.wait_ready()

    def steady_udp(self, address: str, port: int, *, seconds: float = 60.0, **options: Any) -> Running[Steady]:
        """Send datagrams at a steady rate; the first is answered when this returns. Options: every_s."""
        running = self.client.start(
            "steady_udp", lambda value: Steady(**value), address=address, port=port, seconds=seconds, **options
        )
        return running.wait_ready()

    def burst_udp(self, address: str, port: int, *, count: int, size: int = 18) -> float:
        """Send so many datagrams of one flow without a pause; returns the seconds. Nobody needs to answer."""
        return float(self.client.call("burst_udp", address=address, port=port, count=count, size=size))

    def flood_udp(
        self, address: str, ports: Sequence[int], *, count: int = 1000, rate: int = 1000, **options: Any
    ) -> Running[Flooded]:
        """Send ``count`` new flows at ``rate`` per second, to the ports in turn. Options: linger_s, source."""
        return self.client.start(
            "flood_udp", _flooded, address=address, ports=list(ports), count=count, rate=rate, **options
        )

    def flood_tcp(self, address: str, port: int, *, seconds: float = 5.0, **options: Any) -> Running[dict[str, int]]:
        """Open new connections without pause; returns the count of each outcome. Options: width, timeout_s, source."""
        return self.client.start("flood_tcp", dict, address=address, port=port, seconds=seconds, **options)

    # --- serving

    def serve_tcp(self, *ports: int, address: str = "") -> Service:
        """Serve TCP: send the server's name and the client address that it saw, then echo."""
        return Service(self, self._serve("tcp", ports, address))

    def serve_udp(self, *ports: int, address: str = "") -> Service:
        """Serve UDP: answer every datagram with the server's name and the client address that it saw."""
        return Service(self, self._serve("udp", ports, address))

    def _serve(self, kind: str, ports: Sequence[int], address: str) -> list[str]:
        return list(self.client.call("serve", kind=kind, ports=list(ports), address=address, name=self.name))

    # --- frames

    def watch_arp(self, link: str = "eth0", *, seconds: float = 30.0, announced: str = "") -> Running[list[Arp]]:
        """Record arriving ARP frames until stopped; recording has begun when this returns.

        Given ``announced``, it ends with the first gratuitous frame of this address.
        """
        shape: Callable[[Any], list[Arp]] = lambda value: [Arp(**each) for each in value]  # noqa: E731
        return self.client.start("watch_arp", shape, link=link, seconds=seconds, announced=announced).wait_ready()

    def who_has(self, address: str, *, link: str = "eth0", **options: Any) -> list[str]:
        """The MAC address of each answer to one ARP request. Options: source, timeout_s."""
        return list(self.client.call("who_has", link=link, address=address, **options))

    def send_frame(self, frame: str, *, link: str = "eth0", count: int = 1) -> None:
        self.client.call("send_frame", link=link, frame=frame, count=count)

    def capture(self, link: str = "eth0", *, seconds: float = 10.0, **options: Any) -> Running[list[str]]:
        """Record arriving frames, as hexadecimal, until stopped. Options: ethertype, count_max."""
        return self.client.start("capture", list, link=link, seconds=seconds, **options).wait_ready()


def until(what: Callable[[], Any], *, seconds: float = 30.0, pause_s: float = 0.05) -> bool:
    """Poll ``what``; returns whether it became true within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True
