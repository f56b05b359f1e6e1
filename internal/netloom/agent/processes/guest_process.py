"""The agent's end of the guest process: started, adopted, replaced, revived, and told what to answer.

The sockets are opened here, inside the namespaces, and handed over with the tables. The agent keeps a copy of each, so
that a guest process that dies loses no request that waits in a socket: the next one is given the same sockets. A new
agent borrows them from the running process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from netloom.agent.environment import PATH
from netloom.agent.kernel import namespaces
from netloom.agent.log import Log
from netloom.agent.processes.supervisor import Record, alive, read_record, record_of
from netloom.errors import HostRefused
from netloom.guestwire import (
    GUEST_PROTOCOL,
    Done,
    Drop,
    GuestNetwork,
    Hello,
    Lend,
    Lent,
    Listener,
    ListenerKind,
    Message,
    Notice,
    PasswordTaken,
    Ping,
    Serve,
    Update,
)
from netloom.guestwire.channel import Channel, ChannelError
from netloom.names import guest_link

_T = TypeVar("_T")
_A = TypeVar("_A", Done, Lent)

DIRECTORY = Path("/run/netloom")
_RECORD = "guest.json"  # which process was started last

LISTENERS: tuple[Listener, ...] = (Listener("dhcp"), Listener("metadata"), Listener("password"))
_PORTS: dict[ListenerKind, int] = {"dhcp": 67, "metadata": 80, "password": 8080}
_SO_BINDTOIFINDEX = 62  # asm-generic/socket.h: by number what SO_BINDTODEVICE says by name
_IP_FREEBIND = 15  # linux/in.h: bind to an address that the link may get later

CONNECT_S = 10.0
ANSWER_S = 10.0
BACK_OFF_S = (0.0, 0.2, 0.5, 1.0, 3.0, 10.0)
SETTLED_S = 30.0

Key = tuple[str, str]  # scope_id, network_id


class _Network:
    """What is answered in one network.

    ``table`` is None in a network that was borrowed from a running process and whose scope has not spoken yet.
    """

    def __init__(self, table: GuestNetwork | None, revision: int, sockets: list[socket.socket]) -> None:
        self.table = table
        self.revision = revision
        self.sockets = sockets
        self.served = False  # by the process that is connected now

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


class Guests:
    """``converge`` and ``end`` belong to worker threads, one a scope at a time; everything else to the event loop.

    ``taken`` is called on the loop when a VM has acknowledged its password.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        command: Sequence[str],
        build: str,
        taken: Callable[[PasswordTaken], None],
        directory: Path = DIRECTORY,
    ) -> None:
        self._loop = loop
        self._log = log
        self._command = tuple(command)
        self._build = build
        self._taken = taken
        self._directory = directory
        self._networks: dict[Key, _Network] = {}
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: dict[int, asyncio.Future[tuple[Message, list[int]]]] = {}
        self._hello: asyncio.Future[Hello] | None = None
        self._seq = itertools.count(1)
        self._starting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._since = 0.0
        self._stopped = False
        self.pid = 0
        self.ends = 0  # how often one died, or hung and was ended

    # ----------------------------------------------------------------------------------- called by worker threads

    def converge(self, scope_id: str, namespace: str, wanted: tuple[GuestNetwork, ...]) -> list[str]:
        """Exactly these networks of the scope are answered, from these tables; what it did, in words.

        Raises HostRefused when the guest process refuses a table or cannot be started.
        """
        keys = {(table.scope_id, table.network_id) for table in wanted}
        did: list[str] = []
        # Copied in one go: the loop adds and removes meanwhile.
        for key in [key for key in list(self._networks) if key[0] == scope_id and key not in keys]:
            self._on_loop(self._drop(key))
            did.append(f"guest: drop {key[1]}")
        for table in wanted:
            key = (table.scope_id, table.network_id)
            has = self._networks.get(key)
            if has is not None and _fits(has, namespace, table):
                if self._on_loop(self._update(has, table)):
                    did.append(f"guest: update {table.network_id}")
            else:
                network = _Network(table, table.revision, _open(namespace, table))
                self._on_loop(self._serve(key, network))
                did.append(f"guest: serve {table.network_id}")
        return did

    def unserved(self, namespace: str, wanted: tuple[GuestNetwork, ...]) -> list[str]:
        """Those of these networks that are not answered from these tables now; changes nothing."""
        return [table.network_id for table in wanted if not self._serves(namespace, table)]

    def _serves(self, namespace: str, table: GuestNetwork) -> bool:
        has = self._networks.get((table.scope_id, table.network_id))
        return has is not None and has.served and has.revision == table.revision and _fits(has, namespace, table)

    def scopes(self) -> set[str]:
        """The scopes with networks that are answered."""
        return {scope_id for scope_id, _ in list(self._networks)}

    def end(self, scope_id: str) -> list[str]:
        """Nothing of the scope is answered any more, and no socket keeps its namespace alive."""
        return self.converge(scope_id, "", ())

    def _on_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ------------------------------------------------------------------------------------------------- what is said

    async def _serve(self, key: Key, network: _Network) -> None:
        had = self._networks.pop(key, None)
        self._networks[key] = network
        if had is not None:
            had.close()
        # A process that starts is told of every network, this one included.
        if not await self._ensure():
            await self._hand_over(network)

    async def _update(self, network: _Network, table: GuestNetwork) -> bool:
        same = network.served and network.revision == table.revision
        network.table, network.revision = table, table.revision
        if same or await self._ensure():
            return not same
        if network.served:
            await self._say(Update(seq=next(self._seq), network=table), Done)
        else:
            await self._hand_over(network)
        return True

    async def _drop(self, key: Key) -> None:
        network = self._networks.pop(key, None)
        if network is not None:
            network.close()
        if self._channel is None:
            return
        try:
            await self._say(Drop(seq=next(self._seq), scope_id=key[0], network_id=key[1]), Done)
        except HostRefused:
            if self._channel is not None:
                raise
            # It died, and with it what it served; the next process is not told of this network.

    async def _hand_over(self, network: _Network) -> None:
        if network.table is not None:
            message = Serve(seq=next(self._seq), network=network.table, listeners=LISTENERS)
            await self._say(message, Done, [sock.fileno() for sock in network.sockets])
            network.served = True

    async def _say(
        self,
        message: Serve | Update | Drop | Lend | Ping,
        kind: type[_A],
        descriptors: Sequence[int] = (),
        wait_s: float = ANSWER_S,
    ) -> tuple[_A, list[int]]:
        """Says it and waits for the answer. Raises HostRefused."""
        channel = self._channel
        if channel is None:
            raise HostRefused("the guest process is not there", hint="it is being started again; repeat the command")
        answer: asyncio.Future[tuple[Message, list[int]]] = self._loop.create_future()
        self._answers[message.seq] = answer
        try:
            channel.queue(message, descriptors)
            self._flush()
            reply, received = await asyncio.wait_for(answer, wait_s)
        except (ChannelError, TimeoutError) as error:
            raise HostRefused(f"the guest process does not answer: {error!s}") from error
        finally:
            self._answers.pop(message.seq, None)
        if isinstance(reply, Done) and reply.error:
            raise HostRefused(f"the guest process refuses: {reply.error}")
        if not isinstance(reply, kind):
            raise HostRefused(f"the guest process answers {type(reply).__name__} to {type(message).__name__}")
        return reply, received

    async def answers(self, wait_s: float) -> bool:
        """Whether the process that is connected answers; True when there is none, which is being seen to."""
        channel = self._channel
        if channel is None:
            return True
        try:
            await self._say(Ping(seq=next(self._seq)), Done, wait_s=wait_s)
        except HostRefused:
            return self._channel is not channel
        return True

    def end_silent(self, pid: int) -> bool:
        """Ends the process of that number, when it is the one that we know and that is connected.

        Its own word for its number is not enough: whoever took it over could name any process.
        """
        record = read_record(self._directory / _RECORD)
        if self._channel is None or record is None or record.pid != pid:
            return False
        return _end(record)

    # -------------------------------------------------------------------------------------------------- the process

    async def adopt(self) -> None:
        """Takes over the guest process that runs, or starts one: it belongs to the host, and to no network.

        Before any scope converges. Raises HostRefused; a network that needs it tries again.
        """
        async with self._starting:
            if self._channel is not None:
                return
            try:
                hello = await self._connect()
            except (FileNotFoundError, ConnectionRefusedError):
                await self._start()
            except HostRefused as error:
                # It is there and says nothing. Its sockets would keep the next one's from being opened.
                record = read_record(self._directory / _RECORD)
                if record is not None and _end(record):
                    self._log.line(f"{error}; guest process (pid {record.pid}): ended")
                await self._start()
            else:
                await self._welcome(hello)

    async def _ensure(self) -> bool:
        """A process answers. True when it was started for this, and so has been told of everything."""
        async with self._starting:
            if self._channel is not None:
                return False
            await self._start()
            return True

    async def _start(self) -> None:
        self._spawn()
        try:
            hello = await self._connect()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise HostRefused(f"the guest process does not start: {self._last_words()}") from error
        except HostRefused:
            if self._process is not None:
                self._process.kill()  # the next one gets another socket, and nobody would find this one again
            raise
        await self._welcome(hello)

    async def _welcome(self, hello: Hello) -> None:
        """What it serves and nobody claimed yet is borrowed; what it should serve and does not is given to it."""
        self.pid, self._since = hello.pid, time.monotonic()
        served = {(it.scope_id, it.network_id): it.revision for it in hello.served}
        for key, revision in served.items():
            if key not in self._networks:
                lend = Lend(seq=next(self._seq), scope_id=key[0], network_id=key[1])
                lent, descriptors = await self._say(lend, Lent)
                sockets = [socket.socket(fileno=it) for it in descriptors]
                if lent.listeners == LISTENERS:
                    self._networks[key] = _Network(None, revision, sockets)
                    self._networks[key].served = True
                else:
                    for sock in sockets:
                        sock.close()
        if (hello.build, hello.protocol) != (self._build, GUEST_PROTOCOL):
            await self._replace(hello)
            return
        for key, network in list(self._networks.items()):
            try:
                if key not in served:
                    await self._hand_over(network)
                elif network.table is not None and served[key] != network.revision:
                    await self._say(Update(seq=next(self._seq), network=network.table), Done)
                    network.served = True
            except HostRefused as error:
                if self._channel is None:
                    raise
                # One network's table is refused: its scope hears of it when it converges, the others are served.
                self._log.line(f"scope={key[0]} network={key[1]} {error}")
        self._log.line(f"guest process {hello.pid}: {len(served)} networks, behind {', '.join(hello.layers)}")

    async def _replace(self, old: Hello) -> None:
        """Another build runs: this build's process is given the same sockets, and only then the other is told to end.

        Borrowed networks are handed over when their scopes converge; until then the old process answers in them.
        """
        self._log.line(f"guest process {old.pid} is of build {old.build or 'unknown'}: starting {self._build}")
        old_channel, self._channel = self._channel, None
        if old_channel is not None:
            # It answers until it ends, and a password that it hands out meanwhile has to be erased all the same.
            self._loop.remove_writer(old_channel.fileno())
            self._loop.add_reader(old_channel.fileno(), self._hear_out, old_channel)
        self._forget()
        record = read_record(self._directory / _RECORD)
        await self._start()
        if record is None or record.pid != old.pid:
            self._log.line(f"guest process {old.pid} is none that was noted here: it is left alone")
            return
        task = self._loop.create_task(self._retire(record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hear_out(self, channel: Channel) -> None:
        try:
            arrived = channel.receive()
        except ChannelError:
            self._loop.remove_reader(channel.fileno())
            channel.close()
            return
        for message, _ in arrived:
            if isinstance(message, PasswordTaken):
                self._taken(message)

    async def _retire(self, record: Record) -> None:
        until = time.monotonic() + SETTLED_S
        # Scopes converge in threads, and all of them count: there is no one event to wait for.
        while any(it.table is None for it in self._networks.values()) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if alive(record):
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGTERM)

    def _spawn(self) -> None:
        path = self._directory / "guest.sock"
        root = self._directory / "empty"
        root.mkdir(mode=0o555, exist_ok=True)
        root.chmod(0o555)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        log = os.open(self._directory / "guest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            mask = os.umask(0o177)  # the socket is root's alone from its first moment
            try:
                listener.bind(str(path))
            finally:
                os.umask(mask)
            listener.listen(4)
            argv = [*self._command, "--control", str(listener.fileno()), "--root", str(root), "--build", self._build]
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[listener.fileno()],
                cwd="/",
                env={"PATH": PATH, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
            (self._directory / _RECORD).write_bytes(msgspec.json.encode(record_of(self._process.pid)))
        finally:
            os.close(log)
            listener.close()

    async def _connect(self) -> Hello:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # It listens since before the process began, so this does not wait; the hello does.
            sock.connect(str(self._directory / "guest.sock"))
        except OSError:
            sock.close()
            raise
        self._channel = Channel(sock)
        self._loop.add_reader(sock, self._readable)
        self._hello = self._loop.create_future()
        try:
            return await asyncio.wait_for(self._hello, CONNECT_S)
        except (TimeoutError, ChannelError) as error:
            self._forget()
            raise HostRefused(f"the guest process does not answer: {self._last_words()}") from error
        finally:
            self._hello = None

    def _readable(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            arrived = channel.receive()
        except ChannelError as error:
            self._lost(error)
            return
        for message, descriptors in arrived:
            if isinstance(message, Hello):
                if self._hello is not None and not self._hello.done():
                    self._hello.set_result(message)
            elif isinstance(message, PasswordTaken):
                self._taken(message)
            elif isinstance(message, Notice):
                self._log.line(
                    f"scope={message.scope_id} network={message.network_id} nic={message.nic} {message.text}"
                )
            elif isinstance(message, Done | Lent):
                answer = self._answers.get(message.seq)
                if answer is not None and not answer.done():
                    answer.set_result((message, descriptors))
                else:
                    for descriptor in descriptors:
                        os.close(descriptor)

    def _flush(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            channel.flush()
        except ChannelError as error:
            self._lost(error)
            return
        if channel.pending:
            self._loop.add_writer(channel.fileno(), self._flush)
        else:
            self._loop.remove_writer(channel.fileno())

    def _lost(self, error: ChannelError) -> None:
        """The process has ended, or stopped making sense: another one takes its place."""
        self._forget()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        if self._hello is not None and not self._hello.done():
            self._hello.set_exception(error)
            return  # whoever waits for the hello deals with it
        if self._stopped:
            return
        self.ends += 1
        settled = time.monotonic() - self._since > SETTLED_S
        self._failures = 1 if settled else self._failures + 1
        wait_s = BACK_OFF_S[min(self._failures - 1, len(BACK_OFF_S) - 1)]
        self._log.line(f"guest process {self.pid} has ended ({error}): another one in {wait_s:.1f} s")
        task = self._loop.create_task(self._revive(wait_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _revive(self, wait_s: float) -> None:
        while not self._stopped:
            await asyncio.sleep(wait_s)
            try:
                await self._ensure()
            except HostRefused as error:
                self._failures += 1
                wait_s = BACK_OFF_S[min(self._failures, len(BACK_OFF_S) - 1)]
                self._log.line(f"{error}; again in {wait_s:.1f} s")
            else:
                return

    def _forget(self) -> None:
        if self._channel is not None:
            self._loop.remove_reader(self._channel.fileno())
            self._loop.remove_writer(self._channel.fileno())
            self._channel.close()
            self._channel = None
        for network in self._networks.values():
            network.served = False
        if self._process is not None:
            self._process.poll()

    def stop(self) -> None:
        """The agent goes; the guest process goes on answering."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        self._forget()

    def _last_words(self) -> str:
        try:
            text = (self._directory / "guest.log").read_text(errors="replace").strip()
        except OSError:
            text = ""
        return text.splitlines()[-1][:400] if text else "it said nothing"


def _end(record: Record) -> bool:
    if not alive(record):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGKILL)
    return True


def _fits(has: _Network, namespace: str, table: GuestNetwork) -> bool:
    """Whether the sockets that are there are those that the table needs.

    In a namespace, or on a link, that was made anew under the old name they would be deaf.
    """
    if not has.sockets:
        return False
    sock = has.sockets[1]  # for metadata: the one for DHCP has no address
    link = _link_number(namespace, table.network_id)
    place = (namespaces.identity(namespace), link, table.server_ip)
    return (_namespace_of(sock), sock.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX), sock.getsockname()[0]) == place


def _link_number(namespace: str, network_id: str) -> int:
    """The number of the network's guest link; 0 when there is none."""
    with namespaces.inside(namespace):
        try:
            return socket.if_nametoindex(guest_link(network_id))
        except OSError:
            return 0


def _namespace_of(sock: socket.socket) -> int:
    """The inode of the namespace that a socket stands in (SIOCGSKNS, linux/sockios.h); 0: it cannot be told."""
    try:
        descriptor = fcntl.ioctl(sock.fileno(), 0x894C)
    except OSError:
        return 0
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


def _open(namespace: str, table: GuestNetwork) -> list[socket.socket]:
    """The sockets of ``LISTENERS``, in order, opened inside the namespace. In a worker thread."""
    opened: list[socket.socket] = []
    link = guest_link(table.network_id).encode()
    try:
        with namespaces.inside(namespace):
            for listener in LISTENERS:
                datagrams = listener.kind == "dhcp"
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM)
                opened.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link)
                if datagrams:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                    sock.bind(("0.0.0.0", _PORTS[listener.kind]))
                else:
                    sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
                    sock.bind((table.server_ip, _PORTS[listener.kind]))
                    sock.listen(128)
    except OSError as error:
        for sock in opened:
            sock.close()
        raise HostRefused(f"the guest services of network {table.network_id}: {error.strerror}") from error
    return opened
