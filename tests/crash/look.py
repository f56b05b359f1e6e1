"""Print what a host has: every object that a network consists of. Run in the namespaces of the host.

It is the inventory of ``bed.inventory``, without processes, and with the contents of files and the settings of links.
The process answers each line of its input by one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # as a program it is alone in sys.path
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "internal")]

from bed.inventory import objects
from bed.probes import Control
from netns import NAMED, inside

# They have process ids and times.
VOLATILE = {"running.json", "draining.json", "guest.json", "guest.former.json", "agent.lock", "start.lock"}
EMPTY = re.compile("/run/netloom/services/[^/]*/?")
CLIENT = "198.51.100.9"  # the end outside of the flows that tests make
_GENERATION = 10 << 8 | 16  # NFT_MSG_GETGEN


def look() -> dict[str, list[str]]:
    """Sorted names by category. Those that belong to a network contain its number."""
    found = objects(Control())
    del found["processes"]
    # The directory of a scope's services may outlive the last of them until the scope ends.
    found["files"] = [it for it in found["files"] if not it.endswith((".log", "/log")) and not EMPTY.fullmatch(it)]
    # The mounts of other hosts of this machine come and go.
    found["mounts"] = [it for it in found["mounts"] if not it.startswith(f"{NAMED}/") or "/cs-" in it]
    # Liveness probes and the guests' own packets open flows at any time.
    found["conntrack"] = [it for it in found["conntrack"] if CLIENT in it]
    found["contents"] = [f"{path} {_digest(path)}" for path in found["files"] if os.path.isfile(path)]
    found["settings"] = _settings("") + [it for name in found["namespaces"] for it in _settings(name)]
    found["generations"] = [f"{name} {_generation(name)}" for name in found["namespaces"]]
    return {kind: sorted(entries) for kind, entries in found.items()}


def _digest(path: str) -> str:
    if os.path.basename(path) in VOLATILE or path.startswith(NAMED):
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def _settings(namespace: str) -> list[str]:
    where = ["-n", namespace] if namespace else []
    listed = subprocess.run(["ip", "-j", *where, "link"], capture_output=True, text=True, check=False).stdout
    # Links of the host have random addresses.
    return [
        f"{namespace}/{it['ifname']} mtu {it['mtu']} {'up' if 'UP' in it['flags'] else 'down'}"
        + (f" {it.get('address')}" if namespace else "")
        for it in json.loads(listed or "[]")
    ]


def _generation(namespace: str) -> int:
    """The kernel's count of nftables transactions in the namespace."""
    with inside(namespace), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netfilter:
        netfilter.send(struct.pack("=IHHIIBBH", 20, _GENERATION, 1, 1, 0, 0, 0, 0))
        answer = netfilter.recv(4096)
    return int.from_bytes(answer[24:28], "big")  # the first attribute is NFTA_GEN_ID


if __name__ == "__main__":
    for _ in sys.stdin:
        sys.stdout.write(f"{json.dumps(look())}\n")
        sys.stdout.flush()
