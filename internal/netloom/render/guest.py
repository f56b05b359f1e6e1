"""The tables of the guest process: leases, metadata and passwords of a scope's networks."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from netloom.guestwire import GuestNetwork, GuestNic, option_bytes
from netloom.netobjects import ETHERNET_MTU
from netloom.render.plain_network import classless_static_routes, range_of
from netloom.secret import enc_hook
from netloom.state import Network, Nic, Scope

# The tables are sorted when they are built, because msgspec does not sort numeric keys.
_canonical = msgspec.msgpack.Encoder(enc_hook=enc_hook)


def tables(scope: Scope, mtus: Mapping[str, int] = MappingProxyType({})) -> tuple[GuestNetwork, ...]:
    """One table for each active network, by ascending id.

    ``mtus``: the MTU of each network's segment, by network id. Guests assume Ethernet's 1500, so only a smaller MTU is
    announced (RFC 2132 section 5.1, option 26).

    The ``revision`` of a table is its digest, so the same state gives the same number on every agent.
    """
    return tuple(
        _numbered(_table(scope.scope_id, network, mtus.get(network.network_id, 0)))
        for _, network in sorted(scope.networks.items(), key=lambda item: int(item[0]))
        if network.is_active
    )


def _table(scope_id: str, network: Network, mtu: int) -> GuestNetwork:
    device = network.device_ip
    # First the network's own resolver, if it has one, then the upstream resolvers in case that one is down.
    dns = ((device,) if network.dns else ()) + network.resolvers
    return GuestNetwork(
        scope_id=scope_id,
        network_id=network.network_id,
        revision=0,
        server_ip=device,
        dns=dns,
        domain=network.domain,
        search=(network.domain,) if network.domain else (),
        mtu=mtu if mtu < ETHERNET_MTU else 0,
        nics=tuple(_nic(network, nic) for _, nic in sorted(network.nics.items()) if nic.ip),
    )


def _nic(network: Network, nic: Nic) -> GuestNic:
    home = range_of(network, nic.ip)
    masks = [nic.netmask] if nic.netmask else []
    # The netmask of an isolated network's NIC may be too long, if CloudStack took it from an IP reservation.
    if home is not None and (network.guest_type == "isolated" or not masks):
        masks.append(str(ipaddress.IPv4Network(home.cidr).netmask))
    prefix_len = min((ipaddress.IPv4Network((0, mask)).prefixlen for mask in masks), default=None)
    route = classless_static_routes(network, nic)
    options = ({"121": route} if route else {}) | network.dhcp_options.get(nic.nic_id, {})
    return GuestNic(
        nic=nic.key,
        mac=nic.mac,
        ip=nic.ip,
        prefix_len=32 if prefix_len is None else prefix_len,
        gateway=nic.gateway or (home.gateway if home is not None else ""),
        hostname=nic.hostname,
        default_nic=nic.default,
        # Without a known netmask there is no lease: a wrong one would cut off a running VM. The next start of a VM
        # brings the netmask.
        dhcp=network.dhcp and nic.leased and prefix_len is not None,
        options={
            code: option_bytes(code, text) for code, text in sorted((int(it), text) for it, text in options.items())
        },
        user_data=nic.user_data,
        metadata=dict(sorted(nic.metadata.items())),
        password=nic.password,
        password_id=str(nic.password_serial) if nic.password is not None else "",
    )


def _numbered(table: GuestNetwork) -> GuestNetwork:
    digest = hashlib.sha256(_canonical.encode(table)).digest()
    return replace(table, revision=int.from_bytes(digest[:7], "big"))
