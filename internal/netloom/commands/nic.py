"""NICs of VMs: known, stopped, gone.

State hangs on the NIC, which CloudStack names by uuid, by MAC or by number, not always by all three. An address or a
MAC belongs to one NIC of a network: the call that names another NIC for it takes it, and what the former owner had
goes with the former owner (lease, names, options, metadata, password).
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from netloom.commands.network_facts import gateway_in
from netloom.errors import BadRequest
from netloom.protocol.nic import NicPayload, PrepareNic, ReleaseNic, VmNic
from netloom.protocol.scalars import IPv4Prefix
from netloom.state import Network, Nic


def prepare_nic(network: Network, asked: PrepareNic) -> Network:
    """The NIC is known; what it had before stays."""
    return with_nic(network, asked)[0]


def release_nic(network: Network, asked: ReleaseNic) -> Network:
    """The VM has stopped and will come back: nothing of it goes (protocol section 3, release-nic)."""
    return network


def find(network: Network, asked: NicPayload | VmNic) -> Nic | None:
    """The NIC that ``asked`` names: by uuid, MAC or number. Never by address: that may be another's by now."""
    if asked.nic_uuid:
        return network.nics.get(asked.nic_uuid) or _by_mac(network, asked.mac, without_uuid=True)
    if asked.mac:
        return _by_mac(network, asked.mac)
    nic_id = getattr(asked, "nic_id", "")
    return next((nic for nic in network.nics.values() if nic_id and nic.nic_id == nic_id), None)


def with_nic(network: Network, asked: NicPayload | VmNic) -> tuple[Network, Nic]:
    """``network`` with the NIC as ``asked`` describes it, and that NIC.

    What the call does not say stays as it was. Raises BadRequest for a NIC that nobody told the MAC address of.
    """
    had = find(network, asked)
    nic = replace(had or Nic(mac=str(asked.mac)), **_told(asked))
    if not nic.mac:
        raise BadRequest("payload.mac is missing, and the NIC is not known")
    return put(network, nic, had), nic


def put(network: Network, nic: Nic, had: Nic | None = None) -> Network:
    """``network`` with ``nic`` in the place of ``had``; whoever held its address or its MAC has gone."""
    gone = {
        key
        for key, other in network.nics.items()
        if other.mac == nic.mac
        or (nic.ip and other.ip == nic.ip)  # guard: an-address-has-one-vm
        or (nic.ip6 and other.ip6 == nic.ip6)
    }
    if had is not None:
        gone.add(had.key)
    kept = {key: other for key, other in network.nics.items() if key not in gone}
    numbers = {network.nics[key].nic_id for key in gone & network.nics.keys()} - {nic.nic_id}
    return replace(_without_options(network, numbers), nics={**kept, nic.key: nic})


def without_nic(network: Network, asked: NicPayload) -> Network:
    """``network`` without the NIC, its options and all that hung on it; under every name that the call has for it."""
    numbers = {str(asked.nic_id)}
    while (nic := find(network, asked)) is not None:
        numbers.add(nic.nic_id)
        network = replace(network, nics={key: other for key, other in network.nics.items() if key != nic.key})
    return _without_options(network, numbers)


def _without_options(network: Network, numbers: Collection[str]) -> Network:
    kept = {nic_id: options for nic_id, options in network.dhcp_options.items() if nic_id not in numbers}
    return network if len(kept) == len(network.dhcp_options) else replace(network, dhcp_options=kept)


def _by_mac(network: Network, mac: str, *, without_uuid: bool = False) -> Nic | None:
    found = next((nic for nic in network.nics.values() if mac and nic.mac == mac), None)
    return None if found is not None and without_uuid and found.nic_uuid else found


def _gateway(asked: NicPayload) -> str:
    """In calls about a NIC the network's gateway is the NIC's (protocol section 2): the one in the NIC's own subnet.

    Where the NIC has none, it is that of another range: what the network knows of the NIC's range counts then.
    """
    if asked.ip and asked.netmask:
        return gateway_in(str(IPv4Prefix.parse(f"{asked.ip}/{asked.netmask.length}")), asked.gateway)
    return str(asked.gateway[0]) if asked.gateway else ""


def _told(asked: NicPayload | VmNic) -> dict[str, str | bool]:
    """What the call says of the NIC, in our words. An absent field says nothing."""
    told: dict[str, str | bool] = {
        "nic_uuid": str(asked.nic_uuid),
        "mac": str(asked.mac),
        "ip": str(asked.ip),
        "ip6": str(asked.ip6_address),
        "hostname": str(asked.hostname),
        "device_id": str(int(asked.device_id)),
        "default": bool(asked.default_nic),
    }
    if isinstance(asked, NicPayload):
        told["nic_id"] = str(asked.nic_id)
        told["netmask"] = str(asked.netmask)
        told["gateway"] = _gateway(asked)
    return {name: value for name, value in told.items() if value != ""}
