"""A small agent with one scope, for tests of gates and leases. It runs in the namespaces of an :class:`AgentHost`.

It reads a line for each command from standard input, and writes a line of JSON for each answer: ``converge``,
``converge gated``, ``converge leased``, ``converge gated leased``, ``converge gone``, ``open``, ``close``, ``closed``,
``tidy``, ``uninstall``, ``occupied <seconds>``, ``answers <link>``, ``guard <link> <mark>``, ``guarded``,
``renew <mark> <seconds> <at>``, ``end <mark>``, ``alive``. With the argument ``watch`` it watches the host as the
agent does.

:class:`GatedAgent` is its other end, in the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import netloom
from golden.rendered import load
from kernel.agent_host import AgentHost
from netloom.agent.clock import LoopClock
from netloom.agent.host import gate, lease
from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.host.converge import KernelHost
from netloom.agent.host.watcher import Watcher
from netloom.agent.log import Log
from netloom.agent.setup import uninstall
from netloom.errors import HostRefused
from netloom.render.scope import render
from netloom.render.want import Want

TESTS = Path(__file__).parents[1]
MARK = 0x0A1B2C3D  # of the group


class GatedAgent:
    """The small agent on a host."""

    def __init__(self, host: AgentHost, scenario: str, *options: str) -> None:
        paths = f"{Path(netloom.__file__).parents[1]}:{TESTS}"
        self._process = subprocess.Popen(
            [
                *("nsenter", "-t", str(host.pid), "-n", "-m", "--"),
                *(sys.executable, "-m", "kernel.gated_agent", scenario, *options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": paths},
        )

    def __call__(self, command: str) -> Any:
        return self.start(command)()

    def start(self, command: str) -> Callable[[], Any]:
        """Send the command; what is returned waits for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def stopped(self, signal_number: int) -> None:
        """Stop the agent (SIGSTOP), or let it go on (SIGCONT)."""
        self._process.send_signal(signal_number)

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.kill()
        self._process.wait(60)


@contextlib.contextmanager
def gated_agent(host: AgentHost, scenario: str = "ip6", *options: str) -> Iterator[GatedAgent]:
    """Start the small agent with a golden scenario, and end it after the block."""
    agent = GatedAgent(host, scenario, *options)
    try:
        yield agent
    finally:
        agent.close()


class Agent:
    """The host and one scope of the golden scenarios. Implements ``WatchHandler``."""

    def __init__(self, scenario: str) -> None:
        scope = load(TESTS / "golden" / scenario)
        self.scope_id, self.want = scope.scope_id, render(scope)
        self.host = KernelHost(Path("/var/lib/netloom"))
        self.host.prepare()

    def do(self, command: str) -> object:
        try:
            return self.done(command)
        except HostRefused as error:
            return {"error": str(error)}

    def done(self, command: str) -> object:
        want = self.want
        match command.split():
            case ["converge", *how]:
                leased = MARK if "leased" in how else 0
                wanted = replace(want, gated="gated" in how, lease=leased)
                if "gone" in how:
                    wanted = Want(namespace="")
                return self.described(self.host.converge(self.scope_id, self.host.placed(self.scope_id, wanted), None))
            case ["open"]:
                return self.announced(self.host.open_gate(self.scope_id, want))
            case ["close"]:
                self.host.close_gate(self.scope_id, want)
                return None
            case ["tidy"]:
                return [str(it) for it in self.host.tidy()]
            case ["uninstall"]:
                return uninstall.remove_shared_links()
            case ["occupied", seconds]:
                found = self.host.occupied(self.scope_id, want, float(seconds), bytes(11))
                return {"owners": found.owners, "probing": found.probing, "unknown": found.unknown}
            case ["answers", link]:
                ports = tuple(it for it in want.ports if it.link == link)
                return self.host.anybody_answers(self.scope_id, replace(want, ports=ports), 0.3)
            case ["closed"]:
                return sorted(gate.closed())
            case ["guard", link, mark]:
                lease.guard({link: int(mark)})
                return None
            case ["renew", mark, seconds, at]:
                return lease.renew({int(mark): float(seconds)}, float(at))
            case ["end", mark]:
                return lease.end([int(mark)])
            case ["alive"]:
                return lease.alive()
            case ["guarded"]:
                return lease.guarded()
        raise ValueError(command)

    def described(self, changes: HostChanges) -> dict[str, Any]:
        return {"steps": [str(it) for it in changes.steps], "announce": self.announced(changes.announcements)}

    @staticmethod
    def announced(announcements: tuple[Announcement, ...]) -> list[str]:
        return sorted(it.address for it in announcements)

    # What the watcher calls.

    def busy(self, scope_id: str) -> bool:
        return False

    async def repair(self, scope_id: str, why: str) -> int | None:
        return 0

    def firewall_changed(self) -> None:
        pass

    def tidy_soon(self) -> None:
        pass

    def orphaned(self, bridge: str, links: frozenset[str]) -> None:
        pass


async def main() -> None:
    scenario, *options = sys.argv[1:]
    agent = Agent(scenario)
    loop = asyncio.get_running_loop()
    log = Log("/var/log/gated.log")
    watcher = Watcher(loop, LoopClock(loop), log, agent, agent.orphaned, agent.host.keep_gates_closed)
    if "watch" in options:
        await loop.run_in_executor(None, watcher.open)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer = await loop.run_in_executor(None, agent.do, line.strip())
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    watcher.stop()


if __name__ == "__main__":
    asyncio.run(main())
