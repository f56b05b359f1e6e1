"""A host whose agents and relays can be killed after any effect, and what it has, for an exact comparison."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import processes
from crash.effects import Tracer
from crash.sequences import OTHER
from kernel.agent_host import NO_CHECKS, PROGRAM, AgentHost, wait_until
from netloom.wire import Call, FrameReader, Hello, Message, Reply, encode

LOOK = [sys.executable, "-E", str(Path(__file__).with_name("look.py"))]
STATE = "/var/lib/netloom/scopes"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# Its number alone may also be in a process id or a digest.
_OF_OTHER = re.compile(rf"(?:net-|vnetg|vnetpn|gst-|eth1[.-]1){OTHER}\b")

State = dict[str, bytes]  # the state files by name
Found = dict[str, list[str]]


class Look(NamedTuple):
    """What a host has. ``found``: all that its networks consist of. ``beside``: all that belongs to the network beside,

    also the ids of its processes and the generation of its ruleset.
    """

    found: Found
    beside: Found


class CrashHost(AgentHost):
    """An :class:`AgentHost` with traced relays, as sshd starts them, and traced agents, which the relays start."""

    def __init__(self, tracer: Tracer, vlans: tuple[str, ...]) -> None:
        super().__init__(vlans)
        self.tracer = tracer
        self._looker = subprocess.Popen(
            [*self._entered, *LOOK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PATH": PATH}
        )

    @property
    def _entered(self) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "--"]

    def start(self, *_: str) -> None:
        """Let a relay start an agent, and wait until the agent has restored its scopes."""
        before = self.log().count(" restored")
        with self.relay() as relay:
            assert relay.greeted, "no agent answers"
            wait_until(lambda: self.log().count(" restored") > before, 60)

    def kill_agents(self) -> None:
        """Kill the agent, if there is one."""
        for pid in self.processes("serve"):
            processes.kill(pid)
        wait_until(lambda: not self.processes("serve"))

    def lose_everything(self) -> None:
        """Remove what a power cut removes: processes, namespaces, links, rulesets and /run. The state stays."""
        for pid in self.processes():
            if pid != self._looker.pid:
                processes.kill(pid)
        for name in os.listdir(self.path("/run/netns")):
            self.ip("netns", "del", name)
        for name, link in self.links().items():
            if "ifalias" in link or link.get("linkinfo", {}).get("info_kind") == "bridge":
                self.run("ip", "link", "del", name, check=False)
            elif "." in name:
                self.ip("link", "set", name, "down")
        self.run("nft", "flush", "ruleset")
        shutil.rmtree(self.path("/run/netloom"))

    def close(self) -> None:
        self.kill_agents()
        for stream in (self._looker.stdin, self._looker.stdout):
            assert stream is not None
            stream.close()
        self._looker.wait(60)
        super().close()

    def open_relay(self) -> Relay:
        """Start a traced relay. It starts an agent if there is none."""
        return Relay(
            self.tracer.start(
                [*PROGRAM, "connect", *NO_CHECKS],
                before=self._entered,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": PATH},
            )
        )

    @contextlib.contextmanager
    def relay(self) -> Iterator[Relay]:
        """A relay that is closed after the block."""
        relay = self.open_relay()
        try:
            yield relay
        finally:
            relay.close()

    def repeated(self, call: Call) -> Reply:
        """The reply to a call over a new relay. Fails if the relay does not deliver one."""
        with self.relay() as relay:
            reply = relay.answer(call)
            assert reply is not None, f"no reply to {call.command}"
            return reply

    # ------------------------------------------------------------------------------------------------------ state

    def state(self) -> State:
        """The state files, without temporary ones."""
        return {it.name: it.read_bytes() for it in self.path(STATE).iterdir() if not it.name.startswith(".")}

    def put_state(self, state: State) -> None:
        """Replace all state files. No agent may run."""
        directory = self.path(STATE)
        shutil.rmtree(directory)
        directory.mkdir(mode=0o700)
        for name, data in state.items():
            file = directory / name
            file.touch(0o600)
            file.write_bytes(data)

    # ---------------------------------------------------------------------------------------------------- looking

    def look(self) -> Look:
        """Look at the host. Processes are named by their program and their network."""
        assert self._looker.stdin is not None
        assert self._looker.stdout is not None
        self._looker.stdin.write("look\n")
        self._looker.stdin.flush()
        found: Found = json.loads(self._looker.stdout.readline())
        generations = found.pop("generations")
        running = self._services(found["namespaces"])
        found["services"] = sorted({it.partition(" as ")[0] for it in running})
        everything = {**found, "services": running, "generations": generations}
        beside = {kind: [it for it in entries if _OF_OTHER.search(it)] for kind, entries in everything.items()}
        return Look(found, beside)

    def _services(self, namespaces: list[str]) -> list[str]:
        names = {os.stat(self.path(f"/run/netns/{it}")).st_ino: it for it in namespaces if self._is_namespace(it)}
        services = []
        for pid, words in self.processes().items():
            program = next((it for it in ("dnsmasq", "haproxy") if os.path.basename(words[0]) == it), "")
            with contextlib.suppress(OSError):
                if program:
                    services.append(f"{program} in {names.get(os.stat(f'/proc/{pid}/ns/net').st_ino)} as {pid}")
                elif "--control" in words:
                    services.append(f"guest process as {pid}")
        return sorted(services)

    def _is_namespace(self, name: str) -> bool:
        return self.path(f"/run/netns/{name}").stat().st_dev == os.stat("/proc/self/ns/net").st_dev


class Relay:
    """The host's end of an SSH channel: a process that relays to the agent."""

    _ids = itertools.count()

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._reader = FrameReader()
        self._messages: list[Message] = []
        self._send(Hello(version="test", build="test"))
        self.greeted = isinstance(self._receive(), Hello)

    def answer(self, call: Call) -> Reply | None:
        """The reply to the call; None when the connection broke first."""
        self.send(call)
        return self.reply()

    def send(self, call: Call) -> None:
        self._send(call)

    def reply(self) -> Reply | None:
        """The next reply; None when the connection breaks first."""
        reply = self._receive()
        return reply if isinstance(reply, Reply) else None

    def close(self) -> None:
        """Close the channel, as a management server does, and wait until the relay has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def _send(self, message: Message) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the relay has ended; there will be no answer
            self.process.stdin.write(encode(message))
            self.process.stdin.flush()

    def _receive(self) -> Message | None:
        assert self.process.stdout is not None
        while not self._messages:
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                return None
            self._messages += self._reader.feed(data)
        return self._messages.pop(0)
