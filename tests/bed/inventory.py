"""An inventory of everything on a host that a network could leave behind, by name.

It uses the tools of an operator and no code of netloom. The processes of the bed, sessions of sshd, link-local IPv6
addresses and neighbour entries are left out, because they exist without any network. So are the elements of dynamic
sets: packets add them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any

from bed.probes import Control

FILES = ("/var/lib/netloom", "/run/netloom", "/etc/netloom", "/run/netns", "/etc/netns")


def objects(stop: Control, *, files: list[str] | None = None) -> dict[str, list[str]]:
    """Sorted names by category. Names of objects in a named namespace begin with its name and a slash."""
    found: dict[str, list[str]] = {
        "processes": _processes(),
        "namespaces": sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else [],
        "mounts": _mounts(),
        "files": sorted(path for top in (*FILES, *(files or [])) for path in _files(top)),
        "links": [],
        "addresses": [],
        "routes": [],
        "rules": [],
        "nftables": [],
        "conntrack": [],
    }
    for namespace in ["", *found["namespaces"]]:
        for category, names in _network(namespace).items():
            found[category] += [f"{namespace}/{name}" if namespace else name for name in names]
    return {category: sorted(names) for category, names in found.items()}


def _files(top: str) -> list[str]:
    found = []
    for folder, folders, names in os.walk(top):
        found += [os.path.join(folder, name) for name in names]
        if not folders and not names:
            found.append(folder + "/")
    return found


def _mounts() -> list[str]:
    with open("/proc/self/mounts") as file:
        return sorted(line.split()[1] for line in file)


def _processes() -> list[str]:
    """Command lines of the host's processes, without those of the bed and of sshd's sessions and their descendants.

    Without the process that starts services, too: it ends some seconds after the last start.
    """
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            with open(f"/proc/{name}/cmdline", "rb") as raw:
                line = raw.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except OSError:
            continue
        if fields[0] != "Z" and line:
            parents[int(name)], lines[int(name)] = int(fields[1]), line

    def is_bed(pid: int) -> bool:
        while pid > 1:
            line = lines.get(pid, "")
            if "/bed/child.py" in line or line.startswith(("sshd:", "/usr/sbin/sshd", "sshd-session:")):
                return True
            pid = parents.get(pid, 0)
        return False

    others = (line for pid, line in lines.items() if pid != 1 and not is_bed(pid))
    return sorted(line for line in others if not re.search(r"\bconfine\b.* serve [0-9.]+$", line))


def _ip(namespace: str, *arguments: str) -> Any:
    name = ["-n", namespace] if namespace else []
    done = subprocess.run(["ip", "-j", "-d", *name, *arguments], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return []
    return json.loads(done.stdout)


def _inside(namespace: str, *argv: str) -> str:
    prefix = ["ip", "netns", "exec", namespace] if namespace else []
    done = subprocess.run([*prefix, *argv], capture_output=True, text=True, check=False)
    return done.stdout


def _network(namespace: str) -> dict[str, list[str]]:
    links, addresses = [], []
    for link in _ip(namespace, "address"):
        master = f" in {link['master']}" if "master" in link else ""
        alias = f" '{link['ifalias']}'" if "ifalias" in link else ""
        links.append(f"{link['ifname']}{master}{alias}")
        addresses += [
            f"{each['local']}/{each['prefixlen']} on {link['ifname']}"
            for each in link.get("addr_info", [])
            if each.get("scope") != "link"
        ]
    routes = []
    for family in ("-4", "-6"):
        for route in _ip(namespace, family, "route", "show", "table", "all"):
            destination = str(route.get("dst", ""))
            if destination.startswith(("fe80:", "ff00:", "multicast")) or route.get("table") == "local":
                continue
            table = route.get("table", "main")
            routes.append(f"{destination} via {route.get('gateway', '-')} on {route.get('dev', '-')} in {table}")
    rules = [
        f"{rule['priority']}: {rule.get('fwmark', '')}/{rule.get('fwmask', '')} {rule.get('src', '')} {rule['table']}"
        for rule in _ip(namespace, "rule")
        if rule.get("priority") not in (0, 32766, 32767)
    ]
    return {
        "links": links,
        "addresses": addresses,
        "routes": routes,
        "rules": rules,
        "nftables": _nftables(_inside(namespace, "nft", "-j", "list", "ruleset")),
        "conntrack": _conntrack(_inside(namespace, "conntrack", "-L")),
    }


def _nftables(text: str) -> list[str]:
    names = []
    for entry in json.loads(text or "{}").get("nftables", []):
        (kind, thing), *_ = entry.items()
        if kind == "metainfo":
            continue
        table = f"{thing['family']} {thing.get('table', thing.get('name'))}"
        if kind == "rule":
            comment = f" '{thing['comment']}'" if "comment" in thing else ""
            expression = json.dumps(
                [part for part in thing["expr"] if "counter" not in part], sort_keys=True, separators=(",", ":")
            )
            names.append(f"{table} chain {thing['chain']} rule {expression}{comment}")
        else:
            names.append(f"{table} {kind} {thing['name']}")
        # Packets add the elements of dynamic sets, some of them by chance, and time removes them. They have a size:
        # nft 1.0.6 does not print the flag.
        lasting = kind in ("set", "map") and "size" not in thing
        elements = thing.get("elem", []) if lasting else []
        names += [f"{table} {kind} {thing['name']} element {_element(element)}" for element in elements]
    return names


def _element(element: Any) -> str:
    if isinstance(element, dict) and set(element) == {"elem"}:
        element = {key: value for key, value in element["elem"].items() if key not in ("counter", "expires")}
    return json.dumps(element, sort_keys=True, separators=(",", ":"))


def _conntrack(text: str) -> list[str]:
    """Conntrack entries without the fields that change by themselves: remaining time and counters."""
    return [
        " ".join(word for number, word in enumerate(line.split()) if number != 2 and not word.startswith("use="))
        for line in text.splitlines()
        if line
    ]
