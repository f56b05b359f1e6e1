"""Where packets come from and go to: what a test may ask of a VM, a host, or a machine of the internet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from bed.hands import BedError, Hands, Running


@dataclass(frozen=True)
class Done:
    """A program that has ended."""

    status: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Execution:
    """A program run as CloudStack's client runs it: merged output, and whether it had to be killed (``hung``)."""

    status: int
    output: str
    seconds: float
    hung: str


@dataclass(frozen=True)
class Answer:
    """What became of a connection or a datagram.

    ``outcome``: ``connected`` or ``answered``; ``refused``, ``reset``, ``timeout``, ``unreachable``, ``prohibited``;
    ``silent`` when a connection was made and nothing was said. Where one of the bed's servers answered: its name, its
    port, the address it was reached at, and the source address and port it saw.
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
class Flooded:
    """New flows by port: how many were sent, how many answered."""

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
    """Listening sockets of one place. Ends with its ``with`` block, or with the place."""

    def __init__(self, place: Place, handles: list[str]) -> None:
        self._place, self._handles = place, handles

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._place.hands.call("end_serving", handles=self._handles)

    def callers(self) -> list[tuple[str, int]]:
        """Who came so far: source address and port as the service saw them."""
        found = [self._place.hands.call("callers", handle=handle)["callers"] for handle in self._handles]
        return [(address, port) for callers in found for address, port in callers]

    def received(self) -> int:
        """Datagrams, or bytes after accept, that came so far."""
        return sum(self._place.hands.call("callers", handle=handle)["received"] for handle in self._handles)

    def say(self, text: str) -> int:
        """Send a line on every open connection: the server speaks first. How many connections took it."""
        return sum(self._place.hands.call("server_says", handle=handle, text=text) for handle in self._handles)


class Connection:
    """A TCP connection to one of the bed's servers that is kept open."""

    def __init__(self, place: Place, value: dict[str, Any]) -> None:
        self._place, self._number = place, int(value["number"])
        self.answer = _answer({"outcome": "connected", **value})

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, text: str = "still there?", timeout_s: float = 2.0) -> str:
        """Send a line, wait for its echo: ``answered``, ``timeout``, ``reset`` or ``closed``."""
        return str(self._place.hands.call("ask_on", number=self._number, text=text, timeout_s=timeout_s))

    def hear(self, timeout_s: float = 2.0) -> str:
        """The next line that the server sends; ``<timeout>``, ``<reset>`` or ``<closed>`` when none comes."""
        return str(self._place.hands.call("hear_on", number=self._number, timeout_s=timeout_s))

    def close(self, *, abruptly: bool = False) -> None:
        self._place.hands.call("close_tcp", number=self._number, abruptly=abruptly)


class Place:
    """Something that holds namespaces: commands, files, and packets from and to it."""

    def __init__(self, name: str, hands: Hands) -> None:
        self.name = name
        self.hands = hands

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} {self.name}>"

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hands.end()

    # --- commands and files

    def run(
        self, *argv: str, check: bool = True, input: str = "", uid: int = 0, timeout_s: float = 60.0, **environment: str
    ) -> Done:
        """A program in this place. Raises BedError when ``check`` and its exit status is not 0."""
        done = Done(
            **self.hands.call(
                "run", argv=argv, input=input, uid=uid, timeout_s=timeout_s, environment=environment or None
            )
        )
        if check and done.status:
            raise BedError(f"{self.name}: {' '.join(argv)}: exit status {done.status}\n{done.out}{done.err}")
        return done

    def sh(self, script: str, *, check: bool = True) -> str:
        """What a shell script printed."""
        return self.run("sh", "-c", script, check=check).out

    def read(self, path: str) -> str:
        return str(self.hands.call("read", path=path))

    def write(self, path: str, text: str, *, mode: int = 0o644, uid: int = 0) -> None:
        self.hands.call("write", path=path, text=text, mode=mode, uid=uid)

    def sysctl(self, name: str, value: str = "") -> str:
        """Set a sysctl of the network namespace when there is a value; what it is now."""
        return str(self.hands.call("sysctl", name=name, value=value))

    def remove(self, path: str) -> None:
        self.hands.call("remove", path=path)

    def listing(self, path: str) -> list[str]:
        """The names in a directory; nothing when there is none."""
        return list(self.hands.call("listing", path=path))

    def links(self, *lines: str) -> None:
        """Lines of ``ip -batch``, in one process."""
        if lines:
            self.run("ip", "-batch", "-", input="\n".join(lines) + "\n")

    # --- asking

    def tcp(self, address: str, port: int, **options: Any) -> Answer:
        """One TCP connection. Options: timeout_s, source, source_port, say."""
        return _answer(self.hands.call("tcp_connect", address=address, port=port, **options))

    def tcp_many(self, calls: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Many connections at a time; each mapping has the arguments of one ``tcp``."""
        return [_answer(value) for value in self.hands.call("many", probe="tcp_connect", calls=list(map(dict, calls)))]

    def udp(self, address: str, port: int, **options: Any) -> Answer:
        """One datagram and its answer. Options: timeout_s, source, source_port, say, tries."""
        return _answer(self.hands.call("udp_exchange", address=address, port=port, **options))

    def udp_many(self, calls: Sequence[Mapping[str, Any]]) -> list[Answer]:
        return [_answer(value) for value in self.hands.call("many", probe="udp_exchange", calls=list(map(dict, calls)))]

    def ping(self, address: str, **options: Any) -> Ping:
        """ICMP queries. Options: kind (8 echo, 13 timestamp), code, count, timeout_s, source, size."""
        return Ping(**self.hands.call("icmp", address=address, **options))

    def open(self, address: str, port: int, **options: Any) -> Connection:
        """A connection that stays. Options: timeout_s, source, source_port. Raises Refused."""
        return Connection(self, self.hands.call("open_tcp", address=address, port=port, **options))

    def transfer(self, address: str, port: int, *, seconds: float = 30.0, **options: Any) -> Running[Transferred]:
        """A long transfer, until stopped or over; connected when this returns."""
        running = self.hands.start(
            "transfer", lambda value: Transferred(**value), address=address, port=port, seconds=seconds, **options
        )
        return running.wait_ready()

    def flood_udp(
        self, address: str, ports: Sequence[int], *, count: int = 1000, rate: int = 1000, **options: Any
    ) -> Running[Flooded]:
        """``count`` new flows at ``rate`` per second to the ports in turn. Options: linger_s, source."""
        return self.hands.start(
            "flood_udp", _flooded, address=address, ports=list(ports), count=count, rate=rate, **options
        )

    def flood_tcp(self, address: str, port: int, *, seconds: float = 5.0, **options: Any) -> Running[dict[str, int]]:
        """New connections without pause; the count of each outcome. Options: width, timeout_s, source."""
        return self.hands.start("flood_tcp", dict, address=address, port=port, seconds=seconds, **options)

    # --- serving

    def serve_tcp(self, *ports: int, address: str = "") -> Service:
        """Say who answers and who seems to call, then echo."""
        return Service(self, self._serve("tcp", ports, address))

    def serve_udp(self, *ports: int, address: str = "") -> Service:
        """Answer every datagram with who answers and who seems to call."""
        return Service(self, self._serve("udp", ports, address))

    def _serve(self, kind: str, ports: Sequence[int], address: str) -> list[str]:
        return list(self.hands.call("serve", kind=kind, ports=list(ports), address=address, name=self.name))

    # --- frames

    def watch_arp(self, link: str = "eth0", *, seconds: float = 30.0) -> Running[list[Arp]]:
        """The ARP frames that arrive, until stopped; watching when this returns."""
        shape: Callable[[Any], list[Arp]] = lambda value: [Arp(**each) for each in value]  # noqa: E731
        return self.hands.start("watch_arp", shape, link=link, seconds=seconds).wait_ready()

    def who_has(self, address: str, *, link: str = "eth0", **options: Any) -> list[str]:
        """The MAC addresses that answer ARP for an address. Options: source, timeout_s."""
        return list(self.hands.call("who_has", link=link, address=address, **options))

    def send_frame(self, frame: str, *, link: str = "eth0", count: int = 1) -> None:
        self.hands.call("send_frame", link=link, frame=frame, count=count)

    def capture(self, link: str = "eth0", *, seconds: float = 10.0, **options: Any) -> Running[list[str]]:
        """Frames that arrive, as hexadecimal, until stopped. Options: ethertype, count_max."""
        return self.hands.start("capture", list, link=link, seconds=seconds, **options).wait_ready()


def until(what: Callable[[], Any], *, seconds: float = 10.0, pause_s: float = 0.05) -> bool:
    """Whether ``what`` became true within the time."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True
