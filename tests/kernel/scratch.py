"""Namespaces for one test, and the tools that tell the truth about them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from netloom.agent.kernel import links, namespaces

_count = itertools.count()


@contextmanager
def scratch() -> Iterator[str]:
    """The name of a fresh namespace with lo up, gone after the block."""
    name = f"ktest-{os.getpid()}-{next(_count)}"
    namespaces.create(name)
    try:
        links.change(name, [links.set_up("lo")])
        yield name
    finally:
        namespaces.delete(name)


@contextmanager
def joined() -> Iterator[tuple[str, str]]:
    """Two fresh namespaces with a veth pair: ``left`` 10.9.0.1 and fd09::1, ``right`` 10.9.0.2 and fd09::2."""
    with scratch() as left, scratch() as right:
        with namespaces.descriptor(right) as fd:
            links.change(left, [links.make_veth("left", "", "right", "0a:00:00:00:09:02", 0, fd)])
        for name, link, host in ((left, "left", 1), (right, "right", 2)):
            addresses = [links.add_address(link, f"10.9.0.{host}/24"), links.add_address(link, f"fd09::{host}/64")]
            links.change(name, [links.set_up(link), *addresses])
        yield left, right


def tool(namespace: str, *argv: str) -> str:
    """What a program prints inside the namespace; it must succeed."""
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ip_json(namespace: str, *argv: str) -> list[dict[str, Any]]:
    """What ``ip -d -j`` lists."""
    found: list[dict[str, Any]] = json.loads(tool(namespace, "ip", "-d", "-j", *argv) or "[]")
    return found


def settled(namespace: str, *names: str) -> None:
    """Wait until links that are up have come up in every respect, which the kernel sees to a moment later.

    The operational state follows the carrier, and the IPv6 address and route of a link follow that.
    """
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
    """How many descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))
