"""Time one call through the one file and its resident helper, against a bare interpreter, in turns.

PYTHONPATH=internal:tests python tests/bench/bench_start.py [rounds]; needs dist/netloom (`make build`).

The helper refuses the call because of its payload, so only the way there and back is measured.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONE_FILE = ROOT / "dist" / "netloom"


def timed_ms(argv: list[str], environ: dict[str, str], status: int) -> float:
    started = time.perf_counter()
    null = subprocess.DEVNULL
    done = subprocess.run(argv, env=environ, stdin=null, stdout=null, stderr=null, check=False)
    taken = (time.perf_counter() - started) * 1000
    if done.returncode != status:
        raise SystemExit(f"{argv}: status {done.returncode}, and {status} was expected")
    return taken


def main(rounds: int) -> None:
    """Print the best and median time of each, and its ratio to a bare interpreter."""
    if not ONE_FILE.exists():
        sys.stdout.write("no dist/netloom: make build\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        environ = {"PATH": "/usr/bin:/bin", "HOME": folder, "NETLOOM_HELPER": "30"}
        payload = Path(folder, "payload")
        payload.write_text("{}")
        call = [str(ONE_FILE), "ensure-network-device", str(payload), "60"]
        ways = {
            "python3 -I -S -c pass": (["/usr/bin/python3", "-I", "-S", "-c", "pass"], 0),
            "call": (call, 1),
            "netloom version": ([str(ONE_FILE), "version"], 0),
        }
        for argv, status in ways.values():
            timed_ms(argv, environ, status)  # first unpack the program and start its helper
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (argv, status) in ways.items():
                taken[name].append(timed_ms(argv, environ, status))
    bare = taken["python3 -I -S -c pass"]
    sys.stdout.write(f"{'':24}{'best ms':>9}{'median ms':>11}{'best / bare':>13}{'median / bare':>15}\n")
    for name, those in taken.items():
        best, median = min(those), statistics.median(those)
        ratios = f"{best / min(bare):13.2f}{median / statistics.median(bare):15.2f}"
        sys.stdout.write(f"{name:24}{best:9.1f}{median:11.1f}{ratios}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
