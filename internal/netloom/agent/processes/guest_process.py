"""The guest process of the host: start it, adopt it, replace it by one of another build, revive it.

The guest process answers DHCP, metadata and password requests of all networks. The agent opens the sockets and passes
them to it with the tables, and keeps a copy of each socket. So a guest process that dies loses no request that waits
in a socket: the next one gets the same sockets. A new agent borrows them from the running process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from netloom.agent.backoff import Backoff
from netloom.agent.environment import PATH
from netloom.agent.log import Log
from netloom.agent.processes.files import bound_log
from netloom.agent.processes.guest_client import GuestClient
from netloom.agent.processes.process import Record, alive, kill, open_log, read_record, record_of, write_record
from netloom.errors import HostRefused
from netloom.files import remove_leftovers
from netloom.guestwire import GUEST_PROTOCOL, GuestHello, GuestNetwork, Notice, PasswordTaken
from netloom.guestwire.channel import ChannelError

DIRECTORY = Path("/run/netloom")
_LOG = "guest.log"
_RECORD = "guest.json"  # of the process that was started last
FORMER = "guest.former.json"  # of the process that this one replaces, until it has ended

HELLO_S_MAX = 10.0
BORROWED_AT_ONCE = 64  # networks
RETIRE_S_MAX = 30.0  # a replaced process ends after this time at the latest
BACKOFF = Backoff((0.0, 0.2, 0.5, 1.0, 3.0, 10.0), settled_s=30.0)

_LIMITED_S = 60.0
_LIMITED_KEPT = 500  # of all networks

Key = tuple[str, str]  # scope id, network id


class ServedNetwork:
    """A network whose requests the guest process answers, from ``table``, at ``sockets``.

    ``table`` is None if the sockets were borrowed from a running process, until the scope converges.
    """

    def __init__(self, table: GuestNetwork | None, revision: int, sockets: list[socket.socket]) -> None:
        self.table = table
        self.revision = revision
        self.sockets = sockets
        self.served = False  # by the process that is connected now

    def close(self) -> None:
        """Close the agent's copies of the sockets."""
        for sock in self.sockets:
            sock.close()


class GuestProcess:
    """The one guest process and the networks that it serves. All methods run on the event loop.

    ``taken`` is called when a VM has acknowledged its password.
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
        self._client: GuestClient | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._starting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = 0  # in a row
        self._since = 0.0
        self._stopped = False
        self.networks: dict[Key, ServedNetwork] = {}  # changed on the event loop alone; other threads read it
        self._limited: deque[tuple[float, Notice]] = deque(maxlen=_LIMITED_KEPT)
        self.pid = 0
        self.crashes = 0  # how often it died, or hung and was killed

    def limited(self, scope_id: str) -> list[Notice]:
        """The notices of the last minute that a NIC of the scope has used up its share of a service."""
        since = time.monotonic() - _LIMITED_S
        return [it for at, it in list(self._limited) if at >= since and it.scope_id == scope_id]

    # --------------------------------------------------------------------------------------------------- its networks

    async def serve(self, key: Key, network: ServedNetwork) -> None:
        """Serve a network, or serve it on other sockets than before.

        Raises HostRefused when the process refuses the table, or cannot be started.
        """
        had = self.networks.pop(key, None)
        self.networks[key] = network
        if had is not None:
            had.close()
        # A process that is started now gets all networks, and this one too.
        if not await self._ensure():
            await self._hand_over(network)

    async def update(self, network: ServedNetwork, table: GuestNetwork) -> bool:
        """Serve a network from another table; False: nothing has changed. Raises HostRefused as ``serve`` does."""
        same = network.served and network.revision == table.revision
        network.table, network.revision = table, table.revision
        if same or await self._ensure():
            return not same
        if network.served:
            await self._connected().update(table)
        else:
            await self._hand_over(network)
        return True

    async def drop(self, key: Key) -> None:
        """Stop serving a network and close its sockets, which keep its namespace alive. Raises HostRefused."""
        network = self.networks.pop(key, None)
        if network is not None:
            network.close()
        if self._client is None:
            return
        try:
            await self._client.drop(*key)
        except HostRefused:
            # If the process died it no longer serves the network, and the next process does not get it.
            if self._client is not None:
                raise

    async def _hand_over(self, network: ServedNetwork) -> None:
        if network.table is not None:
            await self._connected().serve(network.table, network.sockets)
            network.served = True

    def _connected(self) -> GuestClient:
        if self._client is None:
            raise HostRefused("the guest process does not run", hint="it is being restarted; repeat the command")
        return self._client

    # ------------------------------------------------------------------------------------------------------- liveness

    async def answers(self, wait_s: float) -> bool:
        """Whether the connected process answers within ``wait_s``. True when none is connected: it is restarted."""
        client = self._client
        if client is None:
            return True
        try:
            await client.ping(wait_s)
        except HostRefused:
            return self._client is not client
        return True

    def bound_log(self) -> None:
        """Shorten the log of the guest process if it is too long."""
        bound_log(self._directory / _LOG)

    def kill_hung(self, pid: int) -> bool:
        """Kill the connected process, if ``pid`` is the process that we recorded. It is revived as after a crash.

        The pid comes from the process itself. Without the check, an attacker who controls it could have any process
        killed.
        """
        record = read_record(self._directory / _RECORD)
        if self._client is None or record is None or record.pid != pid:
            return False
        return kill(record)

    # ---------------------------------------------------------------------------------------------- start and adopt

    async def adopt(self) -> None:
        """Connect to the running guest process, or start one. To be called before any scope converges.

        Raises HostRefused; ``serve`` tries again then.
        """
        with contextlib.suppress(OSError):
            remove_leftovers(self._directory)
        self._end_former()
        async with self._starting:
            if self._client is not None:
                return
            try:
                hello = await self._connect()
            except (FileNotFoundError, ConnectionRefusedError):
                await self._start()
            except HostRefused as error:
                # It hangs. As long as it runs its sockets block the ports for the next process.
                record = read_record(self._directory / _RECORD)
                if record is not None and kill(record):
                    self._log.line(f"{error}; guest process (pid {record.pid}) killed")
                await self._start()
            else:
                await self._welcome(hello)

    async def _ensure(self) -> bool:
        """Have a process connected. True: it was started now, so it has got all networks. Raises HostRefused."""
        async with self._starting:
            if self._client is not None:
                return False
            await self._start()
            return True

    async def _start(self) -> None:
        try:
            self._spawn()
        except OSError as error:  # for example: no room in /run, or the program may not be executed
            raise HostRefused(f"the guest process does not start: {error.strerror or error}") from error
        try:
            hello = await self._connect()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise HostRefused(f"the guest process does not start: {self._last_output()}") from error
        except HostRefused:
            if self._child is not None:
                self._child.kill()  # the next process gets another socket, so nothing would find this one again
            raise
        await self._welcome(hello)

    def _spawn(self) -> None:
        path = self._directory / "guest.sock"
        root = self._directory / "empty"
        root.mkdir(mode=0o555, exist_ok=True)
        root.chmod(0o555)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        log_path = self._directory / _LOG
        log_path.unlink(missing_ok=True)  # a process that is being replaced may still write to the old one
        log = open_log(log_path)
        try:
            mask = os.umask(0o177)  # only root may connect, from the moment when the socket exists
            try:
                listener.bind(str(path))
            finally:
                os.umask(mask)
            listener.listen(4)
            argv = [*self._command, "--control", str(listener.fileno()), "--root", str(root), "--build", self._build]
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[listener.fileno()],
                cwd="/",
                env={"PATH": PATH, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
            write_record(self._directory / _RECORD, record_of(self._child.pid))
        finally:
            os.close(log)
            listener.close()

    async def _connect(self) -> GuestHello:
        """Connect, and wait for the first message.

        Raises FileNotFoundError or ConnectionRefusedError when no process listens, HostRefused when it is silent.
        """
        self._client = GuestClient(self._loop, self._directory / "guest.sock", self._event, self._lost)
        try:
            return await self._client.hello(HELLO_S_MAX)
        except (TimeoutError, ChannelError) as error:
            self._disconnect()
            raise HostRefused(f"the guest process does not answer: {self._last_output()}") from error

    async def _welcome(self, hello: GuestHello) -> None:
        """Borrow the networks that only the process knows, and give it those that it does not serve yet."""
        self.pid, self._since = hello.pid, time.monotonic()
        self._record_adopted()
        served = {(it.scope_id, it.network_id): it.revision for it in hello.served}
        unknown = [it for it in served if it not in self.networks]
        for at in range(0, len(unknown), BORROWED_AT_ONCE):
            keys = unknown[at : at + BORROWED_AT_ONCE]
            found = await asyncio.gather(*(self._connected().borrow(*it) for it in keys))
            for key, sockets in zip(keys, found, strict=True):
                if sockets:
                    self.networks[key] = ServedNetwork(None, served[key], sockets)
                    self.networks[key].served = True
        if (hello.build, hello.protocol) != (self._build, GUEST_PROTOCOL):
            await self._replace(hello)
            return
        for key, network in list(self.networks.items()):
            if self.networks.get(key) is not network:
                continue  # guard: closed-sockets-are-not-handed-over
            try:
                if key not in served:
                    await self._hand_over(network)
                elif network.table is not None and served[key] != network.revision:
                    await self._connected().update(network.table)
                    network.served = True
            except HostRefused as error:
                if self._client is None:
                    raise
                # The process refuses this table. Its scope gets the error when it converges.
                self._log.line(f"scope={key[0]} network={key[1]} {error}")
        self._log.line(f"guest process {hello.pid}: {len(served)} networks, sandboxed by {', '.join(hello.layers)}")

    def _record_adopted(self) -> None:
        """Record the connected process: an earlier agent may have been killed after it had started it.

        The pid comes from the process itself, which an attacker may control. So it has to be that of a guest process.
        """
        path = self._directory / _RECORD
        record = read_record(path)
        if (record is None or record.pid != self.pid) and self._is_guest_process(self.pid):
            with contextlib.suppress(OSError):
                write_record(path, record_of(self.pid))

    def _is_guest_process(self, pid: int) -> bool:
        root = str(self._directory / "empty").encode()
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return b"guest" in words and b"--control" in words and root in words  # guard: only-a-guest-process-is-recorded

    # -------------------------------------------------------------------------------------------------------- replace

    async def _replace(self, old: GuestHello) -> None:
        """Start a process of this build beside the old one.

        A borrowed network is handed over when its scope converges; until then the old process serves it.
        """
        self._log.line(f"guest process {old.pid} is of build {old.build or 'unknown'}: starting {self._build}")
        # The old client stays open until its process ends: a password that the old process hands out has to be erased.
        self._client = None
        self._disconnect()
        record = read_record(self._directory / _RECORD)
        recorded = record is not None and record.pid == old.pid
        if record is not None and recorded:
            # This agent may be stopped before the old process is, and the other record will name the new one.
            with contextlib.suppress(OSError):
                write_record(self._directory / FORMER, record)  # guard: a-replaced-process-is-not-forgotten
        await self._start()
        if record is None or not recorded:
            self._log.line(f"guest process {old.pid} is not the one that was recorded: not ended")
            return
        self._in_background(self._retire(record))

    def _end_former(self) -> None:
        """End the process that an earlier agent replaced, if that agent was stopped before it ended it."""
        record = read_record(self._directory / FORMER)
        if record is not None and kill(record):
            self._log.line(f"guest process {record.pid}, which was replaced, killed")
        (self._directory / FORMER).unlink(missing_ok=True)

    async def _retire(self, record: Record) -> None:
        """End a replaced process when all networks are handed over."""
        until = time.monotonic() + RETIRE_S_MAX
        # All scopes have to converge, each in a thread; no single event says when.
        while any(it.table is None for it in self.networks.values()) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if alive(record):
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGTERM)
        (self._directory / FORMER).unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------------------------- revive

    def _event(self, client: GuestClient, message: PasswordTaken | Notice) -> None:
        if isinstance(message, PasswordTaken):
            self._taken(message)
        elif client is self._client:
            if message.limited:
                self._limited.append((time.monotonic(), message))
            self._log.line(f"scope={message.scope_id} network={message.network_id} nic={message.nic} {message.text}")

    def _lost(self, client: GuestClient, error: ChannelError) -> None:
        """Start another process when the connected one has ended, or has sent something that is no message.

        If it still runs it is killed: nothing would find it again.
        """
        if client is not self._client:
            return  # of a replaced process
        self._disconnect()
        if not client.greeted or self._stopped:
            return  # _connect() raises the error
        self.crashes += 1
        record = read_record(self._directory / _RECORD)
        if record is not None and record.pid == self.pid:
            kill(record)  # guard: a-process-that-was-given-up-ends
        failures = BACKOFF.earlier(self._failures, ran_s=time.monotonic() - self._since)
        self._failures = failures + 1
        wait_s = BACKOFF.delay_s(failures)
        self._log.line(f"guest process {self.pid} has ended ({error}): another one starts in {wait_s:.1f} s")
        self._in_background(self._revive(wait_s))

    async def _revive(self, wait_s: float) -> None:
        while not self._stopped:
            await asyncio.sleep(wait_s)
            try:
                await self._ensure()
            except HostRefused as error:
                wait_s = BACKOFF.delay_s(self._failures)
                self._failures += 1
                self._log.line(f"{error}; trying again in {wait_s:.1f} s")
            else:
                return

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        for network in self.networks.values():
            network.served = False
        if self._child is not None:
            self._child.poll()  # reaps it if it has ended

    def stop(self) -> None:
        """Disconnect, because the agent ends. The guest process keeps running."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        self._disconnect()

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _last_output(self) -> str:
        try:
            text = (self._directory / "guest.log").read_text(errors="replace").strip()
        except OSError:
            text = ""
        return text.splitlines()[-1][:400] if text else "it printed nothing"
