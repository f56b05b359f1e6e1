"""The names of a network's VMs as hosts files for dnsmasq: its own VMs, and those of the other tiers of its VPC."""

from __future__ import annotations

from collections.abc import Iterable

from netloom.state import Network, Nic

# The name that cloud-init's CloudStack data source looks up first; CloudStack's virtual router resolves it, too. A VM
# never gets this name: it could serve user data to its neighbours.
DATA_SERVER = "data-server"

# Names that programs look up without being told to. A VM with such a name could answer in place of what they look for:
# proxy settings (wpad), tunnels (isatap), metadata of other clouds (instance-data, metadata), the machine itself.
RESERVED = frozenset(
    {
        DATA_SERVER, "wpad", "isatap", "teredo", "instance-data", "metadata", "gateway", "broadcasthost", "local",
        "localdomain", "localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback", "ip6-localnet",
        "ip6-mcastprefix", "ip6-allnodes", "ip6-allrouters", "ip6-allhosts",
    }
)  # fmt: skip


def hosts_files(network: Network, other_tiers: Iterable[Network]) -> dict[str, str]:
    """File names and texts: one file for each NIC. They are sorted, so that the same state gives the same text.

    A NIC's long name comes first, because it answers the reverse question. A name that is also one of the network's own
    VMs belongs to the own VM.
    """
    files = {"device": _line(network.device_ip, _names(DATA_SERVER, network))}
    own: dict[str, set[bool]] = {}  # name in lower case -> whether it has an IPv6 address, an IPv4 address
    for key, nic in sorted(network.nics.items()):
        names = _names_of(nic, network)
        if names:
            files[f"nic-{key}"] = "".join(_line(address, names) for address in _addresses(nic))
            for name in names:
                own.setdefault(name.lower(), set()).update(":" in it for it in _addresses(nic))
    for tier in sorted(other_tiers, key=lambda it: int(it.network_id)):
        for key, nic in sorted(tier.nics.items()):
            names = _names_of(nic, tier)
            lines = [_line(it, _of_other_tier(names, it, own, network)) for it in _addresses(nic)]
            if names and any(lines):
                files[f"tier-{tier.network_id}-nic-{key}"] = "".join(lines)
    return files


def reserved(network: Network) -> dict[str, str]:
    """The NICs of a network that have no name in DNS because it is reserved: NIC to name."""
    return {key: nic.hostname for key, nic in network.nics.items() if nic.named and nic.hostname.lower() in RESERVED}


def _names_of(nic: Nic, network: Network) -> list[str]:
    if not nic.named or not nic.hostname or nic.hostname.lower() in RESERVED:  # guard: reserved-names-are-no-vms
        return []
    return _names(nic.hostname, network)


def _of_other_tier(names: list[str], address: str, own: dict[str, set[bool]], network: Network) -> list[str]:
    """The names that the resolver of ``network`` gives to an address of another tier.

    An own VM's name is left out. But with an IPv4 address of the own tier it may stay, for the reverse question: over
    IPv4 dnsmasq answers only with addresses of the tier from which it is asked, if there are any (localise-queries).
    """
    by_tier = ":" not in address and not network.has_ip6
    return [
        it for it in names if it.lower() not in own or (by_tier and False in own[it.lower()])
    ]  # guard: own-tier-first


def _names(host: str, network: Network) -> list[str]:
    return [f"{host}.{network.domain}", host] if network.domain else [host]


def _addresses(nic: Nic) -> list[str]:
    return [
        address
        for address in (
            nic.ip,
            nic.ip6,  # guard: names-have-both-addresses
        )
        if address
    ]


def _line(address: str, names: list[str]) -> str:
    return f"{address} {' '.join(names)}\n" if names else ""
