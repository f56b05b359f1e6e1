"""The engine of one host in a process of its own, for tests that stop or kill it. :class:`Agent` is its other end.

It writes a line to standard output for each change of its lease: the clock, and until when the lease lasts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

import netloom
from kernel.standby_hosts import Host, now
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.standby.engine import Engine
from netloom.secret import dec_hook, enc_hook
from netloom.standby.decision import Local
from netloom.standbywire import GroupSpec
from processes import kill
from unit.standby_group import Lines

TESTS = Path(__file__).parents[1]


class Agent:
    """The process on a host. ``leases``: the clock and the end of each change of its lease, oldest first."""

    def __init__(self, host: Host) -> None:
        self.leases: list[tuple[float, float]] = []
        spec = msgspec.json.encode((str(host.directory), host.name, host.spec, host.wire), enc_hook=enc_hook)
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", host.namespace, sys.executable, "-m", "kernel.standby_agent", spec.decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{Path(netloom.__file__).parents[1]}:{TESTS}"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        kill(self._process.pid, number)

    def end(self) -> None:
        """Kill the process, and read what it has written."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            clock, until = line.split()
            self.leases.append((float(clock), float(until)))


class _Leases:
    def renew(self, lives: Mapping[int, float], at: float) -> bool:
        for s in lives.values():
            self._write(now() - (time.monotonic() - at) + s)
        return True

    def end(self, marks: Iterable[int]) -> bool:
        self._write(0.0)
        return True

    def alive(self) -> dict[int, float]:
        return {}

    def _write(self, until: float) -> None:
        os.write(1, f"{now():.4f} {until:.4f}\n".encode())


def main() -> None:
    """Run until standard input is closed."""
    shape = tuple[str, str, GroupSpec, ClaimWire]
    directory, name, spec, wire = msgspec.json.decode(sys.argv[1], type=shape, dec_hook=dec_hook)
    engine = Engine(Path(directory), Lines(), lambda _: None, _Leases())
    engine.start()
    engine.set_group(spec, name)
    engine.set_wires(spec.group_id, {wire: 1})
    engine.set_local(spec.group_id, Local())
    sys.stdin.read()


if __name__ == "__main__":
    main()
