"""Network namespaces for one test, and the programs that show what the kernel has in them."""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from kernel.rtnetlink import add_address
from netloom.agent.kernel import links, namespaces

_count = itertools.count()


@contextmanager
def scratch() -> Iterator[str]:
    """Make a namespace with lo up; returns its name, and removes it after the block."""
    name = f"ktest-{os.getpid()}-{next(_count)}"
    namespaces.create(name)
    try:
        links.change(name, [links.set_up("lo")])
        yield name
    finally:
        namespaces.delete(name)


@contextmanager
def joined() -> Iterator[tuple[str, str]]:
    """Make two namespaces with a veth pair: ``left`` 10.9.0.1 and fd09::1, ``right`` 10.9.0.2 and fd09::2."""
    with scratch() as left, scratch() as right:
        with namespaces.descriptor(right) as fd:
            links.change(left, [links.make_veth("left", "", "right", "0a:00:00:00:09:02", 0, fd)])
        for name, link, host in ((left, "left", 1), (right, "right", 2)):
            addresses = [add_address(link, f"10.9.0.{host}/24"), add_address(link, f"fd09::{host}/64")]
            links.change(name, [links.set_up(link), *addresses])
        for name, link in ((left, "left"), (right, "right")):
            carried(name, link)
        yield left, right


def tool(namespace: str, *argv: str) -> str:
    """Run a program in the namespace; returns its standard output, and fails when its exit status is not 0."""
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ip_json(namespace: str, *argv: str) -> list[dict[str, Any]]:
    """The objects that ``ip -d -j`` lists."""
    found: list[dict[str, Any]] = json.loads(tool(namespace, "ip", "-d", "-j", *argv) or "[]")
    return found


def carried(namespace: str, name: str) -> None:
    """Wait until the link has operational state UP. The kernel hears of a carrier later; until then it drops frames."""
    deadline = time.monotonic() + 30
    while "state UP" not in (seen := tool(namespace, "ip", "link", "show", name)):
        assert time.monotonic() < deadline, seen
        time.sleep(0.01)


def settled(namespace: str, *names: str) -> None:
    """Wait until links have operational state UP and their IPv6 link-local address, which the kernel adds later."""
    deadline = time.monotonic() + 30
    while True:
        seen = {it["ifname"]: it for it in ip_json(namespace, "addr") if it["ifname"] in names}
        local = {name for name, it in seen.items() for info in it["addr_info"] if info["local"].startswith("fe80:")}
        up = {name for name, it in seen.items() if it["operstate"] == "UP"}
        if up >= set(names) and local >= set(names) and "tentative" not in tool(namespace, "ip", "-6", "addr"):
            return
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


def descriptors() -> int:
    """The number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


class Watched(Protocol):
    """A socket, or what has one."""

    def fileno(self) -> int: ...


def readable(watch: Watched, within_s: float = 10.0) -> bool:
    """Whether there is something to read within the time. select(2) does not know the numbers of long-lived sockets."""
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    return bool(poll.poll(within_s * 1000))
