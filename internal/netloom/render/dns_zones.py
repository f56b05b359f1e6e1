"""The reverse zones that a network's resolver answers itself, as dnsmasq's options."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network

# The zones that no server on the internet can answer (RFC 6303 section 4, RFC 7793): questions about them must not
# leave for the internet. fc00::/7 as a whole, of which RFC 6303 lists the half that is in use.
_NOT_PUBLIC = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24",
    "192.168.0.0/16", "198.51.100.0/24", "203.0.113.0/24", "255.255.255.255/32",
    "::/128", "::1/128", "fc00::/7", "fe80::/10", "2001:db8::/32",
)  # fmt: skip

# Resolvers at such addresses belong to the operator, and may know names for private addresses.
_PRIVATE_RESOLVERS = tuple(
    map(
        IPv4Network, ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16")
    )
)


def reverse_options(own: Iterable[str], resolvers: Iterable[str]) -> list[str]:
    """The options for reverse questions (dnsmasq(8), --local and --server).

    ``own``: the prefixes of the network, of any length. Their addresses without a VM are answered with NXDOMAIN, and so
    are all other addresses that are not public. If some of the ``resolvers`` are private, these are asked about the
    latter, and no public resolver is.
    """
    own_zones = dict.fromkeys(zone for prefix in own for zone in zones(prefix))
    private = [it for it in resolvers if any(IPv4Address(it) in prefix for prefix in _PRIVATE_RESOLVERS)]
    lines = [f"local=/{zone}/" for zone in own_zones]
    for zone in (zone for prefix in _NOT_PUBLIC for zone in zones(prefix)):
        if zone not in own_zones:
            lines += [f"server=/{zone}/{it}" for it in private] or [f"local=/{zone}/"]
    return lines


@lru_cache(256)
def zones(prefix: str) -> tuple[str, ...]:
    """The reverse zones that cover exactly a prefix (RFC 1035 section 3.5, RFC 3596 section 2.5); at most 128.

    A zone ends at an octet of an IPv4 address, and at four bits of an IPv6 address.
    """
    network = ip_network(prefix, strict=False)
    if isinstance(network, IPv6Network):
        digits = max(1, -(-network.prefixlen // 4))
        return tuple(
            ".".join(reversed(it.network_address.exploded.replace(":", "")[:digits])) + ".ip6.arpa"
            for it in network.subnets(new_prefix=max(network.prefixlen, digits * 4))
        )
    octets = max(1, -(-network.prefixlen // 8))
    return tuple(
        ".".join(reversed(str(it.network_address).split(".")[:octets])) + ".in-addr.arpa"
        for it in network.subnets(new_prefix=octets * 8)
    )
