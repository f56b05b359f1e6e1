"""The agent returns memory that it does not use, and its threads share one arena."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from fakehost import FakeClock
from netloom.agent import heap

INTERNAL = Path(__file__).parents[2] / "internal"

# Sixteen threads allocate at the same time. Prints the reservations of arenas (64 MiB, arena.c of glibc).
_THREADS = """
import ctypes, re, sys, threading
sys.path.insert(0, sys.argv[1])
from netloom.agent import heap
if sys.argv[2] == "one":
    heap.share_one_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
barrier = threading.Barrier(17)
def work():
    libc.malloc(5000)
    barrier.wait()
    barrier.wait()
for _ in range(16):
    threading.Thread(target=work, daemon=True).start()
barrier.wait()
found = re.findall("^([0-9a-f]+)-([0-9a-f]+) ---p 00000000 00:00", open("/proc/self/maps").read(), re.M)
print(len([1 for first, end in found if 32 << 20 < int(end, 16) - int(first, 16) < 65 << 20]))
barrier.wait()
"""

# Frees memory below a block that stays. Prints how many KiB of anonymous memory trim() returns.
_TRIMMED = """
import ctypes, re, sys
sys.path.insert(0, sys.argv[1])
from netloom.agent import heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def kib():
    return int(re.search("Anonymous: +([0-9]+)", open("/proc/self/smaps_rollup").read())[1])
blocks = [libc.malloc(9000) for _ in range(4000)]
for it in blocks:
    ctypes.memset(it, 1, 9000)
for it in blocks[:-1]:
    libc.free(it)
before = kib()
heap.trim()
print(before - kib())
"""


def _printed(program: str, *words: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-I", "-c", program, str(INTERNAL), *words], capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


@pytest.mark.mutation("threads-share-their-memory")
def test_threads_share_one_arena() -> None:
    assert _printed(_THREADS, "many") > 1
    assert _printed(_THREADS, "one") == 0


@pytest.mark.mutation("unused-memory-is-returned")
def test_unused_memory_is_returned_to_the_host() -> None:
    assert _printed(_TRIMMED) > 20_000


async def test_memory_is_trimmed_after_work_only() -> None:
    clock, done, trims = FakeClock(), 0, []

    async def trimmed() -> None:
        trims.append(clock.time())

    task = asyncio.ensure_future(heap.keep_trimmed(clock, lambda: done, trimmed))
    began = clock.time()
    for works, expected in ((0, 0), (3, 1), (3, 1), (4, 2)):
        done = works
        await clock.advance(heap.TRIM_EVERY_S)
        assert (len(trims), clock.time() > began) == (expected, True)
    task.cancel()
