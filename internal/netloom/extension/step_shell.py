"""A shell on a host that executes steps, one after the other, over one SSH channel.

Each new channel costs a login shell, which may take longer than the login itself. So the script of a step shell reads
the names of its steps from stdin, one per line. It prints a line after each: ``netloom-end`` and the exit status. The
step ``connect`` executes the relay to the agent in place of the shell, if the host has one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

from netloom.errors import one_line
from netloom.extension.ssh import OUTPUT_BYTES_MAX, AgentChannel, CompletedCommand, ConnectionLost, SshConnection

_END = b"\nnetloom-end "  # the first byte of the relay's output is 0: it is the length of a short frame
_ENDED = re.compile(rb"\nnetloom-end ([0-9]{1,3})\n\Z")
_END_BYTES_MAX = 32
_ANSWERS = ("netloom-", "{")  # how the lines of a step's answer begin; all other lines of its output are complaints


class StepShell:
    """One such shell, which runs as root. The first step starts it by ``argv``, the script and its arguments."""

    def __init__(self, connection: SshConnection, argv: Sequence[str]) -> None:
        self._connection = connection
        self._argv = argv
        self._channel: AgentChannel | None = None
        self._begin()

    @property
    def is_open(self) -> bool:
        """Whether the shell waits for a step."""
        return self._channel is not None and not self._channel.lost.done()

    async def step(self, *words: str, feed: Callable[[], bytes] | None = None) -> CompletedCommand:
        """Execute a step and wait for its end.

        ``feed`` returns the next chunk of the step's stdin, as fast as the host takes them, and then none.
        Raises ConnectionLost, and HostUnreachable when the host runs no command, or when its output does not end.
        """
        self._begin()
        if self._channel is None:
            self._channel = await self._connection.run(self._received, self._argv)
        channel = self._channel
        try:
            channel.write(f"{' '.join(words)}\n".encode())
            while feed is not None and not self._ended.done() and (chunk := feed()):
                channel.write(chunk)
                await channel.drain()
        except OSError:  # the shell has ended; its status and stderr say why
            pass
        await _first_of(self._ended, channel.lost)
        status = self._ended.result() if self._ended.done() else channel.exit_status
        if status is None and not channel.exit_signal:
            raise ConnectionLost(f"{self._connection.host}: the connection broke: {channel.lost.result() or 'closed'}")
        out = self._output.decode("utf-8", "replace")
        complaint = "\n".join(line for line in out.splitlines() if not line.startswith(_ANSWERS))
        how = f"signal {channel.exit_signal}" if channel.exit_signal else f"status {status}"
        return CompletedCommand(status, out, one_line(complaint, 400) or channel.stderr or f"it ended with {how}")

    async def connect(self, received: Callable[[bytes], None]) -> AgentChannel | None:
        """Become the relay to the agent, whose output goes to ``received``. None: there is none, and the shell stays.

        Nothing is written to a new shell: if sshd forces the relay as the command, that is not disturbed.
        """
        self._begin()
        relays: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def first(data: bytes) -> None:
            if relays.done():
                received(data)
                return
            self._received(data)
            if not _END.startswith(bytes(self._output[: len(_END)])) and not self._ended.done():
                relays.set_result(None)
                received(bytes(self._output))

        if self._channel is None:
            channel = await self._connection.run(first, [*self._argv, "connect"])
        else:
            channel = self._channel
            channel.received = first
            channel.write(b"connect\n")
        await _first_of(relays, self._ended, channel.lost)
        is_shell = self._ended.done()
        self._channel = channel if is_shell else None
        channel.received = self._received if is_shell else received
        return None if is_shell else channel

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def _begin(self) -> None:
        self._output = bytearray()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def _received(self, data: bytes) -> None:
        if self._ended.done():
            return
        self._output += data
        if len(self._output) > OUTPUT_BYTES_MAX:  # guard: the-output-of-a-step-ends
            self._connection.close()
            self._ended.set_exception(self._connection.too_much_output())
        elif ended := _ENDED.search(self._output[-_END_BYTES_MAX:]):
            del self._output[-len(ended[0]) :]
            self._ended.set_result(int(ended[1]))


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    """Wait until one of them is done."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
