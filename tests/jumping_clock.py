"""Run netloom with a wall clock that jumps: ``jumping_clock.py FILE ARGUMENT...``.

The file has the difference to the real time in seconds (``write``), and may change at any moment. Only what Python's
``time.time`` and ``time.time_ns`` return is changed; the machine's own clock belongs to all its users. The processes
that the program starts as copies of itself have the same clock. They map the file, because some may open none later.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from pathlib import Path

MAIN = Path(__file__).resolve().parents[1] / "cmd" / "netloom" / "main.py"
_SECONDS = struct.Struct("d")


def write(file: Path, jump_s: float) -> None:
    """Let the clocks of this file differ by so many seconds from now on."""
    with file.open("r+b" if file.exists() else "wb") as opened:
        opened.write(_SECONDS.pack(jump_s))


def main() -> None:
    with open(sys.argv[1], "rb") as file:
        jumped = mmap.mmap(file.fileno(), _SECONDS.size, prot=mmap.PROT_READ)
    real, real_ns = time.time, time.time_ns

    def jump_s() -> float:
        return float(_SECONDS.unpack_from(jumped)[0])

    time.time = lambda: real() + jump_s()
    time.time_ns = lambda: real_ns() + int(jump_s() * 1e9)
    # netloom.program takes what comes before its arguments for the command that starts it again.
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    sys.path.insert(0, str(MAIN.parent))
    runpy.run_path(str(MAIN), run_name="__main__")


if __name__ == "__main__":
    main()
