"""The tables that the guest process answers from: leases, metadata, passwords of a scope's networks."""

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

# Every table below is sorted where it is made: msgspec itself sorts no keys that are numbers.
_canonical = msgspec.msgpack.Encoder(enc_hook=enc_hook)


def tables(scope: Scope, mtus: Mapping[str, int] = MappingProxyType({})) -> tuple[GuestNetwork, ...]:
    """One table for each network that stands, in the order of their ids.

    ``mtus``: network to the MTU of its segment. Guests are told of one that is smaller than the Ethernet's 1500 that
    they assume (RFC 2132 section 5.1, option 26).

    A table's ``revision`` is a digest of it: the same wish has the same number, whichever agent made it.
    """
    return tuple(
        _numbered(_table(scope.scope_id, network, mtus.get(network.network_id, 0)))
        for _, network in sorted(scope.networks.items(), key=lambda item: int(item[0]))
        if network.is_active
    )


def _table(scope_id: str, network: Network, mtu: int) -> GuestNetwork:
    device = network.device_ip
    # The resolver of the network first, where there is one; then those it asks itself, for the day it is down.
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
    mask = nic.netmask or (str(ipaddress.IPv4Network(home.cidr).netmask) if home is not None else "")
    route = classless_static_routes(network, nic)
    options = ({"121": route} if route else {}) | network.dhcp_options.get(nic.nic_id, {})
    return GuestNic(
        nic=nic.key,
        mac=nic.mac,
        ip=nic.ip,
        prefix_len=ipaddress.IPv4Network((0, mask)).prefixlen if mask else 32,
        gateway=nic.gateway or (home.gateway if home is not None else ""),
        hostname=nic.hostname,
        default_nic=nic.default,
        # A lease with a guessed mask would cut off a VM that has the right one; the next start of a VM tells it.
        dhcp=network.dhcp and nic.leased and bool(mask),
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
