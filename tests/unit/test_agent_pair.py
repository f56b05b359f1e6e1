"""The connections between the two hosts of a group, over the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from msgspec.structs import replace

from fakehost import FakeLog
from netloom import pairwire
from netloom.agent.standby import pair, pair_listener
from netloom.agent.standby.pair import Pairs
from netloom.agent.standby.sealing import AesGcm, Agreement
from netloom.pairwire import ANSWER_BYTES, Flows, FlowsEnd, Gone, PairMessage, Ping, Reader, Sealer, State, Stored
from netloom.secret import Secret
from netloom.standbywire import GroupHost, GroupSpec

GROUP = "0a0b0c0d"
SECRET = bytes(range(32))
PATIENCE_S = 30.0  # only stops hanging tests
GONE = Gone(scope_id="net-204")
STORED = Stored(scope_id="net-204", revision=9)
FLOWS = Flows(scope_id="net-204", create=bytes(64 << 10))


def free_port() -> int:
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::", 0))
        port: int = sock.getsockname()[1]
        return port


def spec(port: int, group_id: str = GROUP, secret: bytes = SECRET, address: str = "127.0.0.1") -> GroupSpec:
    first, second, witness = (GroupHost(name=it, address=address, port=port) for it in ("kvm1", "kvm2", "kvm3"))
    return GroupSpec(
        group_id=group_id, owner="o", first=first, second=second, witness=witness, secret=Secret(secret.hex())
    )


class Side:
    """One host. ``events``: what its handler was told, and ``messages`` the messages."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.log = FakeLog()
        self.events: list[str] = []
        self.messages: list[PairMessage] = []
        self.changed = asyncio.Event()
        self.breaks = False
        self.pairs = Pairs(asyncio.get_running_loop(), self.log, self)

    def serve(self, *specs: GroupSpec) -> None:
        self.pairs.set_groups([(it, self.name) for it in specs])

    def _told(self, event: str) -> None:
        self.events.append(event)
        self.changed.set()

    def pair_connected(self, group_id: str) -> None:
        self._told(f"{group_id} connected")

    def pair_lost(self, group_id: str) -> None:
        self._told(f"{group_id} lost")

    def pair_gap(self, group_id: str) -> None:
        self._told(f"{group_id} gap")

    def pair_received(self, group_id: str, message: PairMessage) -> None:
        self.messages.append(message)
        self.changed.set()
        if self.breaks:
            raise KeyError("hunter2")

    async def until(self, condition: Callable[[Side], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self):
                self.changed.clear()
                await self.changed.wait()

    def connected(self) -> bool:
        return self.pairs.connected(GROUP)


class Hosts:
    """The first and the second host, and a port that is free."""

    def __init__(self) -> None:
        self.port = free_port()
        self.spec = spec(self.port)
        self.sides: list[Side] = []
        self.first = self.new("kvm1")
        self.second = self.new("kvm2")

    def new(self, name: str) -> Side:
        side = Side(name, self.port)
        self.sides.append(side)
        return side

    async def connect(self) -> None:
        self.first.serve(self.spec)
        self.second.serve(self.spec)
        await self.first.until(Side.connected)
        await self.second.until(Side.connected)


@pytest.fixture(name="it")
async def two_hosts() -> AsyncIterator[Hosts]:
    both = Hosts()
    yield both
    for side in both.sides:
        side.pairs.close()
    await asyncio.sleep(0.01)  # the transports close their sockets
    assert [line for side in both.sides for line in side.log.lines if "bug" in line and not side.breaks] == []


class Stranger:
    """A connection to the first host that says what the test wants."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self._loop = asyncio.get_running_loop()
        self._port = port
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.bind((source, 0))

    async def connect(self) -> Stranger:
        async with asyncio.timeout(PATIENCE_S):
            await self._loop.sock_connect(self.sock, ("127.0.0.1", self._port))
        return self

    async def say(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def hear(self, length: int) -> bytes:
        """So many bytes, or fewer if the connection ends."""
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            while len(data) < length:
                try:
                    more = await self._loop.sock_recv(self.sock, length - len(data))
                except ConnectionResetError:
                    break
                if not more:
                    break
                data += more
        return data

    async def is_closed(self) -> bool:
        """Wait for the end of the connection; False if something came before."""
        return await self.hear(1) == b""

    async def authenticate(self, secret: bytes = SECRET) -> pairwire.Keys:
        agreement = Agreement()
        said = pairwire.hello(secret, int(GROUP, 16), agreement.nonce)
        await self.say(said)
        answered = await self.hear(ANSWER_BYTES)
        assert pairwire.is_answer(secret, said, answered)
        await self.say(pairwire.proof(secret, said, answered))
        return pairwire.keys(secret, said, answered, agreement.agreed(pairwire.nonce_in(answered)))

    def close(self) -> None:
        self.sock.close()


def sealed(key: bytes, *messages: PairMessage) -> bytes:
    sealer = Sealer(AesGcm(key))
    return b"".join(sealer.seal(part) for it in messages for part in pairwire.parts(pairwire.encode(it)))


# ---- connections


async def test_both_ends_send_and_receive(it: Hosts) -> None:
    await it.connect()
    assert it.first.pairs.send(GROUP, GONE) and it.second.pairs.send(GROUP, STORED)
    await it.second.until(lambda side: side.messages == [GONE])
    await it.first.until(lambda side: side.messages == [STORED])
    assert it.first.events == it.second.events == [f"{GROUP} connected"]
    assert it.first.log.lines == [f"group={GROUP} connected to kvm2"]


@pytest.mark.parametrize("address", ["::1", "localhost"])
async def test_a_host_is_reached_by_ipv6_and_by_name(it: Hosts, address: str) -> None:
    it.spec = spec(it.port, address=address)
    await it.connect()


async def test_a_large_state_arrives_and_does_not_hold_up_the_other_direction(it: Hosts) -> None:
    await it.connect()
    state = State(scope_id="net-204", epoch=1, joined=0, revision=1, data=os.urandom(1 << 20) * 40)
    assert it.first.pairs.send(GROUP, state) and it.first.pairs.send(GROUP, GONE)
    assert it.second.pairs.send(GROUP, STORED)
    await it.first.until(lambda side: side.messages == [STORED])
    await it.second.until(lambda side: len(side.messages) == 2)
    assert it.second.messages == [state, GONE]


async def test_the_second_host_connects_again_when_the_first_comes_back(it: Hosts) -> None:
    await it.connect()
    it.first.pairs.close()
    await it.second.until(lambda side: side.events[-1] == f"{GROUP} lost")
    assert not it.second.pairs.send(GROUP, GONE)
    again = it.new("kvm1")
    again.serve(it.spec)
    await again.until(Side.connected)
    await it.second.until(Side.connected)
    assert it.second.events == [f"{GROUP} connected", f"{GROUP} lost", f"{GROUP} connected"]


async def test_a_second_host_that_comes_back_replaces_its_old_connection(it: Hosts) -> None:
    """The old one still seems to be there: for example, its host lost its power."""
    await it.connect()
    again = it.new("kvm2")
    again.serve(it.spec)
    await again.until(Side.connected)
    await it.first.until(lambda side: side.events.count(f"{GROUP} connected") == 2)
    assert it.first.events[:3] == [f"{GROUP} connected", f"{GROUP} lost", f"{GROUP} connected"]
    it.second.pairs.close()
    assert again.pairs.send(GROUP, STORED)
    await it.first.until(lambda side: side.messages[-1:] == [STORED])


async def test_the_second_host_waits_for_the_first_and_logs_once(it: Hosts) -> None:
    it.second.serve(it.spec)
    await asyncio.sleep(1.0)
    assert len(it.second.log.lines) == 1
    assert it.second.log.lines[0].startswith(f"group={GROUP} no connection to kvm1 (127.0.0.1 port {it.port}): ")
    it.first.serve(it.spec)
    await it.second.until(Side.connected)


async def test_groups_end_and_others_stay(it: Hosts) -> None:
    other = spec(it.port, group_id="00000001", secret=b"o" * 32)
    it.first.serve(it.spec, other)
    it.second.serve(it.spec, other)
    for side in (it.first, it.second):
        await side.until(lambda side: side.pairs.connected(GROUP) and side.pairs.connected("00000001"))
    it.first.serve(other)
    assert not it.first.pairs.connected(GROUP)
    await it.second.until(lambda side: f"{GROUP} lost" in side.events)
    assert it.first.pairs.send("00000001", GONE)
    await it.second.until(lambda side: side.messages == [GONE])
    assert "00000001 lost" not in it.first.events + it.second.events


async def test_another_address_is_another_connection(it: Hosts) -> None:
    await it.connect()
    moved = replace(it.spec, first=replace(it.spec.first, address="127.0.0.2"))
    it.second.serve(moved)
    await it.second.until(lambda side: side.events == [f"{GROUP} connected", f"{GROUP} lost", f"{GROUP} connected"])
    it.second.serve(moved)
    assert it.second.connected(), "the same group stays connected"


async def test_nothing_listens_without_a_group_in_which_the_host_is_the_first(it: Hosts) -> None:
    it.second.serve(it.spec)
    witness = it.new("kvm3")
    witness.serve(it.spec)
    with pytest.raises(ConnectionRefusedError):
        await Stranger(it.port).connect()
    it.first.serve(it.spec)
    await it.first.until(Side.connected)
    it.first.serve()
    with pytest.raises(ConnectionRefusedError):
        await Stranger(it.port).connect()
    assert witness.events == []
    assert not witness.connected() and not witness.pairs.send(GROUP, GONE)


async def test_a_port_that_is_taken_is_logged_once_and_tried_again(it: Hosts) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", it.port))
        taken.listen()
        it.first.serve(it.spec)
        await asyncio.sleep(2 * pair.TICK_S)
        assert len(it.first.log.lines) == 1
        assert (
            it.first.log.lines[0] == f"the other host of a group cannot connect: port {it.port}: Address already in use"
        )
    it.second.serve(it.spec)
    await it.first.until(Side.connected)


@pytest.mark.mutation("a-bug-is-no-silence")
async def test_a_bug_with_a_message_is_logged_and_the_connection_goes_on(it: Hosts) -> None:
    await it.connect()
    it.first.breaks = True
    it.second.pairs.send(GROUP, STORED)
    it.second.pairs.send(GROUP, GONE)
    await it.first.until(lambda side: side.messages == [STORED, GONE])
    assert it.first.log.lines.count(f"group={GROUP} pair_received bug: KeyError") == 2
    assert "hunter2" not in "".join(it.first.log.lines)
    assert it.first.connected()


# ---- strangers


@pytest.mark.mutation("a-stranger-gets-no-answer")
async def test_a_stranger_gets_no_answer(it: Hosts) -> None:
    it.first.serve(it.spec)
    rubbish = os.urandom(pairwire.HELLO_BYTES)
    for said in (
        pairwire.hello(b"x" * 32, int(GROUP, 16), bytes(32)),
        pairwire.hello(SECRET, 1, bytes(32)),
        rubbish,
        b"GET / HTTP/1.1\r\nHost: kvm1\r\n\r\n" + bytes(100),
    ):
        stranger = await Stranger(it.port).connect()
        await stranger.say(said)
        assert await stranger.is_closed()
        stranger.close()
    assert it.first.events == []
    assert it.first.log.lines == [f"port {it.port}: 1 connections without the secret of a group were closed"]


@pytest.mark.mutation("a-replay-is-refused")
async def test_a_recorded_connection_is_of_no_use(it: Hosts) -> None:
    """A relay records all that the second host says, and says it again."""
    recorded = bytearray()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, questions = await asyncio.open_connection("127.0.0.1", it.port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, kept: bytearray) -> None:
            while data := await source.read(1 << 16):
                kept += data
                target.write(data)
            target.close()

        await asyncio.gather(copy(reader, questions, recorded), copy(answers, writer, bytearray()))

    relayed = await asyncio.start_server(relay, "127.0.0.1", 0)
    port = relayed.sockets[0].getsockname()[1]
    it.first.serve(it.spec)
    it.second.serve(replace(it.spec, first=replace(it.spec.first, port=port)))
    await it.second.until(Side.connected)
    it.second.pairs.send(GROUP, STORED)
    await it.first.until(lambda side: side.messages == [STORED])
    it.second.pairs.close()
    await it.first.until(lambda side: side.events[-1] == f"{GROUP} lost")
    relayed.close()

    replayed = await Stranger(it.port).connect()
    await replayed.say(bytes(recorded))
    assert len(await replayed.hear(ANSWER_BYTES + 1)) <= ANSWER_BYTES
    replayed.close()
    assert it.first.events == [f"{GROUP} connected", f"{GROUP} lost"]
    assert it.first.messages == [STORED]


@pytest.mark.mutation("the-first-host-is-authenticated")
async def test_the_second_host_sends_nothing_to_a_host_that_does_not_know_the_secret(it: Hosts) -> None:
    heard: list[bytes] = []

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.readexactly(pairwire.HELLO_BYTES)
        writer.write(pairwire.answer(b"x" * 32, said, Agreement().nonce))
        heard.append(await reader.read())
        it.second.changed.set()
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1", it.port)
    it.second.serve(it.spec)
    await it.second.until(lambda _: len(heard) >= 2)
    assert set(heard) == {b""}
    assert it.second.events == []
    reason = "its answer does not prove the secret of the group"
    assert it.second.log.lines == [f"group={GROUP} no connection to kvm1 (127.0.0.1 port {it.port}): {reason}"]
    server.close()


@pytest.mark.mutation("newcomers-have-two-seconds", instead="loop.call_later(1e6, self.refuse)")
async def test_a_connection_that_proves_nothing_is_closed(it: Hosts) -> None:
    it.first.serve(it.spec)
    said = pairwire.hello(SECRET, int(GROUP, 16), Agreement().nonce)
    for start in (said[:10], said):
        stranger = await Stranger(it.port).connect()
        await stranger.say(start)
        assert len(await stranger.hear(ANSWER_BYTES + 1)) == (ANSWER_BYTES if start == said else 0)
        stranger.close()


@pytest.mark.mutation("newcomers-are-bounded")
async def test_many_silent_connections_take_little_and_do_not_keep_the_other_host_out(it: Hosts) -> None:
    it.first.serve(it.spec)
    strangers = [await Stranger(it.port).connect() for _ in range(2 * pair_listener.NEWCOMERS_MAX)]
    for stranger in strangers:
        await stranger.say(b"netloom\1")
    newcomers = it.first.pairs._listeners[it.port]._newcomers
    most = 0
    for _ in range(100):
        await asyncio.sleep(0.01)
        most = max(most, len(newcomers))
    assert most == pair_listener.NEWCOMERS_MAX
    it.second.serve(it.spec)
    await it.second.until(Side.connected)
    for stranger in strangers:
        stranger.close()


@pytest.mark.mutation("a-flood-of-connections-costs-little")
async def test_a_flood_of_connections_is_accepted_slowly(it: Hosts) -> None:
    it.first.serve(it.spec)
    loop = asyncio.get_running_loop()
    began = loop.time()
    strangers = [await Stranger(it.port).connect() for _ in range(60)]
    for stranger in strangers:
        await stranger.say(bytes(100))
    for stranger in strangers:
        assert await stranger.is_closed()
        stranger.close()
    periods = (loop.time() - began) / pair_listener.PERIOD_S
    assert len(strangers) <= (periods + 1) * pair_listener.ACCEPTS_MAX
    it.second.serve(it.spec)
    await it.second.until(Side.connected)


@pytest.mark.mutation("a-flood-does-not-keep-the-other-host-out")
async def test_strangers_are_shut_out_for_a_while_after_a_flood(it: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_listener, "FLOOD_S", 2.0)
    it.first.serve(it.spec)
    strangers = [Stranger(it.port, "127.0.0.9") for _ in range(2 * pair_listener.ACCEPTS_MAX)]
    for stranger in strangers:
        with contextlib.suppress(BlockingIOError):
            stranger.sock.connect(("127.0.0.1", it.port))
        await stranger.say(bytes(100))
        await asyncio.sleep(0)
    for stranger in strangers:
        assert await stranger.is_closed()
        stranger.close()
    last = Stranger(it.port, "127.0.0.9")
    connecting = asyncio.ensure_future(last.connect())
    it.second.serve(it.spec)
    await it.second.until(Side.connected)
    assert not connecting.done()
    await connecting
    last.close()


async def test_nobody_is_shut_out_while_the_address_of_a_host_is_unknown(it: Hosts) -> None:
    """It has a name. Its address is known when it has connected once."""
    named = replace(it.spec, second=replace(it.spec.second, address="localhost"))
    it.first.serve(named)
    assert it.first.pairs._known_sources() == set()
    it.second.serve(named)
    await it.first.until(Side.connected)
    assert it.first.pairs._known_sources() == {b"\x7f\0\0\1"}


async def test_a_group_that_ends_during_the_authentication_gets_no_connection(it: Hosts) -> None:
    other = spec(it.port, group_id="00000001")
    it.first.serve(it.spec, other)
    stranger = await Stranger(it.port).connect()
    said = pairwire.hello(SECRET, int(GROUP, 16), Agreement().nonce)
    await stranger.say(said)
    answered = await stranger.hear(ANSWER_BYTES)
    it.first.serve(other)
    await stranger.say(pairwire.proof(SECRET, said, answered))
    assert await stranger.is_closed()
    stranger.close()
    assert it.first.events == []


@pytest.mark.parametrize("damage", ["changed", "long", "repeated"])
async def test_a_damaged_record_ends_the_connection(it: Hosts, damage: str) -> None:
    it.first.serve(it.spec)
    peer = await Stranger(it.port).connect()
    keys = await peer.authenticate()
    record = sealed(keys.of_second, STORED)
    await peer.say(record)
    await it.first.until(lambda side: side.messages == [STORED])
    following = {"changed": record[:-1] + b"\0", "long": b"\xff" * 4, "repeated": record}[damage]
    await peer.say(following)
    await it.first.until(lambda side: side.events == [f"{GROUP} connected", f"{GROUP} lost"])
    assert it.first.messages == [STORED]
    peer.close()


# ---- a host that does not read, or does nothing


async def received(peer: Stranger, reader: Reader, messages: list[PairMessage]) -> None:
    """Wait for more, and read all that has come."""
    messages += reader.feed(await peer.hear(1))
    with contextlib.suppress(BlockingIOError):
        while data := peer.sock.recv(1 << 16):
            messages += reader.feed(data)


@pytest.mark.mutation("waiting-flows-are-bounded")
async def test_flows_that_nobody_reads_are_dropped_until_there_is_room(it: Hosts) -> None:
    it.first.serve(it.spec)
    peer = await Stranger(it.port).connect()
    keys = await peer.authenticate()
    await it.first.until(Side.connected)
    sent = 0
    while it.first.pairs.send(GROUP, FLOWS):
        sent += 1
        assert sent < 1000
    assert it.first.pairs.send(GROUP, STORED)
    assert not it.first.pairs.send(GROUP, FlowsEnd(scope_id="net-204", token=1)), "after a gap there are no flows"
    waits = asyncio.ensure_future(it.first.pairs.drained(GROUP))
    await asyncio.sleep(0)
    assert not waits.done()
    assert it.first.events == [f"{GROUP} connected"]

    reader, messages = Reader(AesGcm(keys.of_first)), list[PairMessage]()
    while len(messages) < sent + 1:
        await received(peer, reader, messages)
    assert sorted(map(repr, messages)) == sorted(map(repr, [*[FLOWS] * sent, STORED]))
    await it.first.until(lambda side: side.events[-1] == f"{GROUP} gap")
    assert it.first.events.count(f"{GROUP} gap") == 1
    assert await waits
    assert await it.first.pairs.drained(GROUP)
    assert it.first.pairs.send(GROUP, FLOWS)
    peer.close()
    await it.first.until(lambda side: side.events[-1] == f"{GROUP} lost")
    assert not await it.first.pairs.drained(GROUP)


@pytest.mark.mutation("control-overtakes-flows")
async def test_a_control_message_overtakes_the_flows_that_wait(it: Hosts) -> None:
    it.first.serve(it.spec)
    peer = await Stranger(it.port).connect()
    keys = await peer.authenticate()
    await it.first.until(Side.connected)
    for _ in range(100):
        assert it.first.pairs.send(GROUP, FLOWS)
    assert it.first.pairs.send(GROUP, STORED)
    reader, messages = Reader(AesGcm(keys.of_first)), list[PairMessage]()
    while messages.count(FLOWS) < 100:
        await received(peer, reader, messages)
    assert STORED in messages[:50]
    peer.close()


@pytest.mark.mutation("a-silent-host-is-noticed")
async def test_a_host_that_says_nothing_is_noticed_and_one_that_pings_is_not(it: Hosts) -> None:
    it.first.serve(it.spec)
    peer = await Stranger(it.port).connect()
    keys = await peer.authenticate()
    await it.first.until(Side.connected)
    sealer = Sealer(AesGcm(keys.of_second))
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() < began + pair.SILENT_S_MAX + 1.0:
        await peer.say(sealer.seal(next(pairwire.parts(pairwire.encode(Ping())))))
        await asyncio.sleep(0.2)
    assert it.first.events == [f"{GROUP} connected"]
    assert it.first.messages == []
    await it.first.until(lambda side: side.events[-1] == f"{GROUP} lost")
    assert it.first.log.lines[-1].startswith(f"group={GROUP} connection to kvm2 lost: silent for 3.")
    reader = Reader(AesGcm(keys.of_first))
    assert set(reader.feed(await peer.hear(1 << 16))) == {Ping()}
    peer.close()


async def test_a_host_that_only_talks_is_noticed(it: Hosts) -> None:
    """It pings, but reads nothing: its window closes, and the kernel ends the connection."""
    it.first.serve(it.spec)
    peer = await Stranger(it.port).connect()
    keys = await peer.authenticate()
    await it.first.until(Side.connected)
    while it.first.pairs.send(GROUP, FLOWS):
        pass
    sealer = Sealer(AesGcm(keys.of_second))

    async def ping() -> None:
        while it.first.connected():
            await peer.say(sealer.seal(next(pairwire.parts(pairwire.encode(Ping())))))
            await asyncio.sleep(0.3)

    pinging = asyncio.ensure_future(ping())
    await it.first.until(lambda side: side.events[-1] == f"{GROUP} lost")
    assert "silent" not in it.first.log.lines[-1]
    with contextlib.suppress(OSError):
        await pinging
    peer.close()
    assert f"{GROUP} gap" not in it.first.events


async def test_messages_in_random_order_and_size_arrive_in_order(it: Hosts) -> None:
    await it.connect()
    chance = random.Random(4)
    sizes = [chance.choice((0, 10, 1000, 70_000, 300_000)) for _ in range(300)]
    states = [
        State(scope_id=str(at), epoch=1, joined=0, revision=at, data=bytes(size)) for at, size in enumerate(sizes)
    ]
    for state in states:
        assert it.first.pairs.send(GROUP, state)
        if chance.random() < 0.1:
            await asyncio.sleep(0)
    await it.second.until(lambda side: len(side.messages) == len(states))
    assert it.second.messages == states


def test_a_group_without_a_right_secret_is_refused() -> None:
    async def run() -> None:
        side = Side("kvm1", free_port())
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            side.serve(replace(spec(1), secret=Secret("hunter2")))
        side.pairs.close()

    asyncio.run(run())
