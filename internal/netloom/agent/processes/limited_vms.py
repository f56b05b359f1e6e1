"""The VMs whose requests to the device's services, or whose connections, are limited now.

nftables has noted them (``render.senders``, ``render.connections``), or the guest process has
said so (``guest.limits``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from netloom.agent.kernel import kept
from netloom.agent.kernel.nft import NftError
from netloom.guestwire import Notice
from netloom.render.connections import NOTED_OTHERS, NOTED_SENDERS, NOTED_TARGETS, REACHED_TIMES
from netloom.render.nft import FAMILY, TABLE
from netloom.render.senders import DNS_CONNECTIONS, DNS_QUERIES_PER_S, limited_set
from netloom.state import Network, Nic, Scope

_SHOWN = 20  # per network
_LIMITED = "are limited to {} at the same time (conntrack.max.per.vm)"

_WHAT = {
    ("udp", 53): f"DNS questions of {{}} are limited to {DNS_QUERIES_PER_S} per second",
    ("tcp", 53): f"DNS connections of {{}} are limited to {DNS_CONNECTIONS} at the same time",
    ("udp", 67): "DHCP requests of {} are limited",
    ("tcp", 80): "metadata connections of {} are limited",
    ("tcp", 8080): "password connections of {} are limited",
}


def limited(scope: Scope, namespace: str) -> list[str]:
    """A sentence for each VM and service that exceeded its limit within the last minute.

    Empty as well if the ruleset is missing: then ``check`` names the ruleset.
    """
    found: list[str] = []
    for _, network in sorted(scope.networks.items()):
        if network.is_active:
            noted = _elements(namespace, limited_set(network.network_id))
            lines = sorted(_sentence(network, *it["concat"]) for it in noted)
            more = [f"and {len(lines) - _SHOWN} more in network {network.network_id}"] if len(lines) > _SHOWN else []
            found += lines[:_SHOWN] + more
    return found


def connected(scope: Scope, namespace: str) -> list[str]:
    """A sentence for each VM or public address whose new connections were dropped within the last minute."""
    share = scope.connections_max
    nics = [nic for network in scope.networks.values() for nic in network.nics.values()]
    by_address = {address: _vm(nic) for nic in nics for address in (nic.mac, nic.ip, nic.ip6) if address}
    kinds = [(NOTED_SENDERS, "from", share), *((it, "to", share * REACHED_TIMES) for it in NOTED_TARGETS)]
    found = set()
    for name, direction, most in kinds if share else ():
        for address in _elements(namespace, name):
            found.add(f"connections {direction} {by_address.get(address, address)} {_LIMITED.format(most)}")
    for link in _elements(namespace, NOTED_OTHERS) if share else ():
        found.add(f"connections of addresses without a NIC, through {link}, {_LIMITED.format(share)}")
    lines = sorted(found)
    return lines[:_SHOWN] + ([f"and connections of {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])


def _elements(namespace: str, name: str) -> list[Any]:
    """The elements of a set that packets add to; none as well if it does not exist."""
    try:
        with kept.nft(namespace) as nft:
            listed = nft.list_json(f"list set {FAMILY} {TABLE} {name}")["nftables"]
    except NftError:
        return []
    found: list[Any] = next((it["set"].get("elem", []) for it in listed if "set" in it), [])
    return [it["elem"]["val"] for it in found]


def noticed(scope: Scope, notices: Iterable[Notice]) -> list[str]:
    """The same for notices of the guest process. A repeated notice is one sentence."""
    found = set()
    for it in notices:
        network = scope.networks.get(it.network_id)
        nic = network.nics.get(it.nic) if network is not None else None
        if nic is not None:
            found.add(f"network {it.network_id}: {_vm(nic)}: {it.text}")
    return sorted(found)[:_SHOWN]


def _vm(nic: Nic) -> str:
    return f"VM {nic.hostname or nic.mac} ({nic.ip or nic.mac})"


def _sentence(network: Network, mac: str, protocol: str, port: int) -> str:
    nic = next((it for it in network.nics.values() if it.mac == mac), None)
    who = _vm(nic) if nic is not None else "MAC addresses without a NIC"
    return f"network {network.network_id}: " + _WHAT.get((protocol, port), "requests of {} are limited").format(who)
