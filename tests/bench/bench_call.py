"""Time one event with the resident helper and without it, against a new ``ssh`` connection, in turns. Needs root.

PYTHONPATH=internal:tests python tests/bench/bench_call.py [rounds]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ssh.lab import KEYS, MANAGEMENT, PYTHON, REPO, Caller, SshLab

STORED = {"host": "10.99.0.11", "namespace": "cs-net-42"}


def timed_ms(argv: list[str], environ: dict[str, str] | None = None) -> float:
    started = time.perf_counter()
    subprocess.run(argv, env=environ, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1000


def main(rounds: int) -> None:
    """Print the best and median time of each way, and its ratio to a new ssh connection."""
    with tempfile.TemporaryDirectory() as folder:
        lab = SshLab(Path(folder))
        try:
            lab.up()
            caller = Caller(lab, Path(folder))
            payload = str(caller.payload(caller.details(sshkey=lab.key("good"), port=KEYS), STORED))
            inside = ["ip", "netns", "exec", MANAGEMENT]
            key = [
                "-i",
                f"{folder}/keys/good",
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                f"UserKnownHostsFile={folder}/k",
            ]
            ssh = [*inside, "ssh", "-F", "none", "-q", "-p", str(KEYS), *key, f"root@{lab.h1.address}", "true"]
            event = [*inside, PYTHON, str(REPO / "cmd/netloom/main.py"), "implement-network", payload, "60"]
            standin = f"{PYTHON} {REPO}/tests/ssh/standin.py agent"
            environ = {
                "NETLOOM_DIR": str(caller.home),
                "NETLOOM_AGENT": standin,
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            }
            ways: dict[str, Callable[[], float]] = {
                "ssh host true": lambda: timed_ms(ssh),
                "event, helper": lambda: timed_ms(event, environ | {"NETLOOM_HELPER": "30"}),
                "event, alone": lambda: timed_ms(event, environ | {"NETLOOM_HELPER": "0"}),
                "python -c pass": lambda: timed_ms([*inside, "/usr/bin/python3", "-I", "-S", "-c", "pass"]),
            }
            for way in ways.values():
                way()  # the helper starts, the host's key is remembered
            taken = {name: [] for name in ways}  # type: dict[str, list[float]]
            for _ in range(rounds):
                for name, way in ways.items():
                    taken[name].append(way())
        finally:
            lab.down()
    rows = [f"{'':16}{'best ms':>10}{'median ms':>11}{'of an ssh':>11}"]
    yardstick = statistics.median(taken["ssh host true"])
    for name, times in taken.items():
        middle = statistics.median(times)
        rows.append(f"{name:16}{min(times):10.1f}{middle:11.1f}{middle / yardstick:11.2f}")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
