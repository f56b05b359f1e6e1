"""Who may send requests to the device's services, by MAC and IP address, and how often.

A VM can send frames from any MAC and IP address. The services know their VMs by both. So a request from other
addresses is dropped before it reaches a socket: connection requests from made-up addresses would fill the queue of
the listener, and the kernel then answers with SYN cookies and forgets the packet that has the MAC address
(``guest.peer``). One VM alone is limited by rate, so that its half-open connections leave room in this queue.

On a shared network the VMs belong to different tenants, so the resolver is protected as well. It still answers
addresses that are no NIC's, within one narrow limit for all of them: secondary addresses, VMs whose entry CloudStack
has not sent yet, VMs that reach the device through their router.

On every network each VM has a share of the resolver. A VM is told by its MAC address, because it may have many IPv6
addresses. MAC addresses that are no NIC's have one share together. A TCP connection that the VM resets ends for
connection tracking, which counts it, but not for dnsmasq: its process notices nothing while it waits for another
resolver. So resets have a rate (``resets``). What exceeds it is dropped before connection tracking sees it, and the
connection counts until dnsmasq ends it.

What exceeds a limit is noted for a minute in the set ``limited_<network>``, for the custom actions check and show.
"""

from __future__ import annotations

from collections.abc import Iterable

from netloom import names
from netloom.render.device import DHCP_PORT, DNS_PORT, HTTP_PORTS
from netloom.render.ruleset import Chain, NftSet
from netloom.state import Network

# Half-open connections are kept for 3 seconds (tcp_synack_retries = 1), so one VM has at most 200 + 3 * 25 of them.
# The queue of a listener has 4,096 places. The guest process answers 20 requests a second, with a burst of 200.
_CONNECTIONS = "25/second burst 200 packets"
_DHCP_REQUESTS = "10/second burst 50 packets"
# dnsmasq keeps a question that nobody answers for ten seconds. So all addresses that are no NIC's use together up to
# 100 of the places that dnsmasq has (``dnsmasq.FORWARDS_MAX``).
_DNS_OF_OTHERS = "5/second burst 50 packets"

# One VM uses up to 1,500 of these places.
DNS_QUERIES_PER_S = 100
_DNS_QUERIES = f"{DNS_QUERIES_PER_S}/second burst 500 packets"
# dnsmasq starts a process for each TCP connection, and ends it after 150 seconds. Versions before 2.90 allow 20.
DNS_CONNECTIONS = 4
# Each reset may leave a process for 150 seconds. So one VM has up to 4 + 8 + 2.5 * 2 of them.
_DNS_RESETS = "2/minute burst 8 packets"
_DNS_RESETS_TIMEOUT = "5m"  # longer than the burst needs to be full again

_NO_MAC = "00:00:00:00:00:00"  # stands for all MAC addresses that are no NIC's
_RATE_TIMEOUT = "1m"


def sets(network: Network) -> tuple[NftSet, ...]:
    """The known senders of a network, and the rate of each of them."""
    nics = network.nics.values()
    pairs = {f"{nic.mac} . {nic.ip}": "" for nic in nics if nic.ip}
    macs = {nic.mac: "" for nic in nics}
    addresses = {nic.ip: "" for nic in nics if nic.ip}
    size = set_size(len(macs))
    return (
        NftSet(name=_pairs(network), kind="set", type="ether_addr . ipv4_addr", elements=pairs),
        NftSet(name=macs_set(network), kind="set", type="ether_addr", elements=macs),
        *(
            [NftSet(name=_addresses(network), kind="set", type="ipv4_addr", elements=addresses)]
            if _is_shared(network)
            else []
        ),
        _rates(_http_rate(network), "ipv4_addr", size),
        _rates(_dhcp_rate(network), "ether_addr", size),
        _rates(_dns_rate(network), "ether_addr", size),
        _rates(_dns_resets(network), "ether_addr", size, _DNS_RESETS_TIMEOUT),
        # Without a timeout: the kernel counts connections in such sets only, and removes elements without connections.
        NftSet(
            name=_dns_connections(network),
            kind="set",
            type="ether_addr . inet_service",
            flags="dynamic",
            size=size,
        ),
        _rates(limited_set(network.network_id), "ether_addr . inet_proto . inet_service", size),
    )


def set_size(vms: int) -> int:
    """The size of a dynamic set whose keys are VMs, with a few services each: it is never full.

    The kernel allocates 11 to 32 bytes for each place at once. A power of two, because a set is made anew if its size
    changes.
    """
    return 1 << (8 * (vms + 8) - 1).bit_length()  # guard: sets-are-as-large-as-their-network


def limited_set(network_id: str) -> str:
    """The name of the set of senders that have exceeded a limit: MAC address, protocol and port of the service."""
    return f"limited_{network_id}"


def _noted(network: Network, mac: str = "ether saddr") -> str:
    return f"update @{limited_set(network.network_id)} {{ {mac} . meta l4proto . th dport }}"


def guards(network: Network) -> tuple[str, ...]:
    """The rules that drop requests of unknown senders, and what exceeds the rate of a known one.

    They come before the rule that accepts established connections: with one source port all questions of a sender are
    one connection. The metadata and DHCP servers answer no unknown sender anyway.
    """
    link = f'iifname "{names.guest_link(network.network_id)}"'
    # A DHCP client may have no IP address, or one of its last network.
    dhcp = f"{link} udp dport {DHCP_PORT}"
    http = f"{link} ip daddr {network.device_ip} tcp dport {{ {', '.join(map(str, HTTP_PORTS))} }}"
    requests = f"update @{_dhcp_rate(network)} {{ ether saddr limit rate over {_DHCP_REQUESTS} }}"
    connections = f"update @{_http_rate(network)} {{ ip saddr limit rate over {_CONNECTIONS} }}"
    return (
        f"{dhcp} ether saddr != @{macs_set(network)} drop",  # guard: dhcp-is-for-nics
        f"{dhcp} {requests} {_noted(network)} drop",  # guard: a-vm-has-its-rate-of-dhcp-requests
        f"{http} ether saddr . ip saddr != @{_pairs(network)} drop",  # guard: metadata-is-for-nics
        f"{http} ct state new {connections} {_noted(network)} drop",  # guard: a-vm-has-its-rate-of-connections
        *(_dns_guards(network, link) if _is_shared(network) else ()),
        *_dns_shares(network, link),
    )


def resets(networks: Iterable[Network]) -> Chain:
    """Drop what exceeds the rate of resets that a VM sends to the resolver (see above)."""
    rules = [rule for network in networks for rule in _dns_reset_rates(network)]
    return Chain(name="resets", hook="type filter hook prerouting priority raw; policy accept;", rules=tuple(rules))


def _dns_reset_rates(network: Network) -> list[str]:
    link = f'iifname "{names.guest_link(network.network_id)}"'
    known, unknown = f"ether saddr @{macs_set(network)}", f"ether saddr != @{macs_set(network)}"
    over = f"limit rate over {_DNS_RESETS}"
    rules = []
    for target in _resolver(network):
        reset = f"{link} {target} tcp dport {DNS_PORT} tcp flags rst"
        rules += [
            f"{reset} {known} update @{_dns_resets(network)} {{ ether saddr {over} }} drop",
            f"{reset} {unknown} {over} drop",
        ]
    return rules


def _dns_shares(network: Network, link: str) -> list[str]:
    """The share of each VM of the resolver: questions over UDP by rate, TCP connections by number."""
    unknown, known = f"ether saddr != @{macs_set(network)}", f"ether saddr @{macs_set(network)}"
    over = f"limit rate over {_DNS_QUERIES}"
    by_rate = f"{known} update @{_dns_rate(network)} {{ ether saddr {over} }} {_noted(network)} drop"
    by_rate_together = f"{unknown} {over} {_noted(network, _NO_MAC)} drop"
    by_number = f"{known} {_counted(network)} {_noted(network)} reject with tcp reset"
    by_number_together = f"{unknown} {_counted(network, _NO_MAC)} {_noted(network, _NO_MAC)} reject with tcp reset"
    rules = []
    for target in _resolver(network):
        udp = f"{link} {target} udp dport {DNS_PORT}"
        tcp = f"{link} {target} tcp dport {DNS_PORT} ct state new"
        rules += [
            f"{udp} {by_rate}",  # guard: a-vm-has-its-share-of-the-resolver
            f"{udp} {by_rate_together}",  # guard: forged-addresses-share-the-resolver
            f"{tcp} {by_number}",  # guard: a-vm-has-its-share-of-dns-connections
            f"{tcp} {by_number_together}",
        ]
    return rules


def _resolver(network: Network) -> list[str]:
    return [f"ip daddr {network.device_ip}", *([f"ip6 daddr {network.ip6_gateway}"] if network.has_ip6 else [])]


def _counted(network: Network, mac: str = "ether saddr") -> str:
    return f"add @{_dns_connections(network)} {{ {mac} . th dport ct count over {DNS_CONNECTIONS} }}"


def _dns_guards(network: Network, link: str) -> list[str]:
    """The guards of the resolver.

    A TCP connection needs the address of a NIC, but not its MAC address: the device's packets go to the NIC in any
    case, so another machine cannot complete the connection. Over IPv6 the MAC address alone identifies a VM, because it
    may have any number of addresses (RFC 8981).
    """
    over_limit = f"limit rate over {_DNS_OF_OTHERS} drop"
    to_resolver = f"{link} ip daddr {network.device_ip}"
    no_nic = f"ether saddr . ip saddr != @{_pairs(network)}"
    rules = [
        f"{to_resolver} udp dport {DNS_PORT} {no_nic} {over_limit}",  # guard: strangers-share-the-resolver
        f"{to_resolver} tcp dport {DNS_PORT} ip saddr != @{_addresses(network)} drop",
    ]
    if network.has_ip6:
        unknown = f"ether saddr != @{macs_set(network)}"
        to_resolver = f"{link} ip6 daddr {network.ip6_gateway}"
        rules += [
            f"{to_resolver} udp dport {DNS_PORT} {unknown} {over_limit}",
            f"{to_resolver} tcp dport {DNS_PORT} {unknown} drop",  # guard: dns-over-ip6-is-for-nics
        ]
    return rules


def _is_shared(network: Network) -> bool:
    return network.guest_type == "shared"


def _pairs(network: Network) -> str:
    return f"senders_{network.network_id}"


def macs_set(network: Network) -> str:
    """The name of the set of the MAC addresses of a network's NICs."""
    return f"macs_{network.network_id}"


def _addresses(network: Network) -> str:
    return f"addresses_{network.network_id}"


def _http_rate(network: Network) -> str:
    return f"http_rate_{network.network_id}"


def _dhcp_rate(network: Network) -> str:
    return f"dhcp_rate_{network.network_id}"


def _dns_rate(network: Network) -> str:
    return f"dns_rate_{network.network_id}"


def _dns_connections(network: Network) -> str:
    return f"dns_connections_{network.network_id}"


def _dns_resets(network: Network) -> str:
    return f"dns_resets_{network.network_id}"


def _rates(name: str, key: str, size: int, timeout: str = _RATE_TIMEOUT) -> NftSet:
    return NftSet(name=name, kind="set", type=key, flags="dynamic,timeout", size=size, timeout=timeout)
