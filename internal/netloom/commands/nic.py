"""prepare-nic and release-nic, and how all commands about VMs find, add and remove NICs.

CloudStack names a NIC by its uuid, its MAC address or its number, not always by all three. Within a network an IP
address or a MAC address belongs to one NIC. A call with the address of another NIC removes that NIC, with its lease,
names, options, metadata and password.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from netloom.commands.network_facts import gateway_in
from netloom.errors import BadRequest
from netloom.protocol.nic import NicPayload, PrepareNic, ReleaseNic, VmNic
from netloom.state import Network, Nic


def prepare_nic(network: Network, payload: PrepareNic) -> Network:
    """Add the NIC, or update it; its lease, names and metadata stay."""
    return with_nic(network, payload)[0]


def release_nic(network: Network, payload: ReleaseNic) -> Network:
    """Change nothing: the VM has stopped and may start again (docs/protocol.md, section 3, release-nic)."""
    return network


def find_nic(network: Network, payload: NicPayload | VmNic) -> Nic | None:
    """The NIC that ``payload`` names by uuid, MAC or number. Never by IP address: another NIC may have it by now."""
    if payload.nic_uuid:
        return network.nics.get(payload.nic_uuid) or _by_mac(network, payload.mac, without_uuid=True)
    if payload.mac:
        return _by_mac(network, payload.mac)
    nic_id = getattr(payload, "nic_id", "")
    return next((nic for nic in network.nics.values() if nic_id and nic.nic_id == nic_id), None)


def with_nic(network: Network, payload: NicPayload | VmNic) -> tuple[Network, Nic]:
    """``network`` with the NIC as ``payload`` describes it, and that NIC.

    Fields that are absent from the payload stay as they are. Raises BadRequest if the MAC address is not known.
    """
    previous = find_nic(network, payload)
    nic = replace(previous or Nic(mac=str(payload.mac)), **_given_fields(payload))
    if not nic.mac:
        raise BadRequest("payload.mac is missing, and the NIC is not known")
    return put_nic(network, nic, previous), nic


def put_nic(network: Network, nic: Nic, previous: Nic | None = None) -> Network:
    """``network`` with ``nic`` instead of ``previous``, and without other NICs that have its IP or MAC address."""
    gone = {
        key
        for key, other in network.nics.items()
        if other.mac == nic.mac
        or (nic.ip and other.ip == nic.ip)  # guard: an-address-has-one-vm
        or (nic.ip6 and other.ip6 == nic.ip6)
    }
    if previous is not None:
        gone.add(previous.key)
    kept = {key: other for key, other in network.nics.items() if key not in gone}
    numbers = {network.nics[key].nic_id for key in gone & network.nics.keys()} - {nic.nic_id}
    return replace(_without_options(network, numbers), nics={**kept, nic.key: nic})


def without_nic(network: Network, payload: NicPayload) -> Network:
    """``network`` without every NIC that the payload names, by uuid, MAC or number, and without their options."""
    numbers = {str(payload.nic_id)}
    while (nic := find_nic(network, payload)) is not None:
        numbers.add(nic.nic_id)
        network = replace(network, nics={key: other for key, other in network.nics.items() if key != nic.key})
    return _without_options(network, numbers)


def _without_options(network: Network, numbers: Collection[str]) -> Network:
    kept = {nic_id: options for nic_id, options in network.dhcp_options.items() if nic_id not in numbers}
    return network if len(kept) == len(network.dhcp_options) else replace(network, dhcp_options=kept)


def _by_mac(network: Network, mac: str, *, without_uuid: bool = False) -> Nic | None:
    found = next((nic for nic in network.nics.values() if mac and nic.mac == mac), None)
    return None if found is not None and without_uuid and found.nic_uuid else found


def _gateway(payload: NicPayload) -> str:
    """The NIC's gateway: in calls about a NIC ``gateway`` is the one in the NIC's subnet (docs/protocol.md, section 2).

    If the NIC's range has no gateway, the field names that of another range. It is not used then; the gateway that the
    network has for the NIC's range is.
    """
    if subnet := payload.subnet:
        return gateway_in(subnet, payload.gateway)
    return str(payload.gateway[0]) if payload.gateway else ""


def _given_fields(payload: NicPayload | VmNic) -> dict[str, str | bool]:
    """The fields of :class:`Nic` that the payload has, without absent ones."""
    fields: dict[str, str | bool] = {
        "nic_uuid": str(payload.nic_uuid),
        "mac": str(payload.mac),
        "ip": str(payload.ip),
        "ip6": str(payload.ip6_address),
        "hostname": str(payload.hostname),
        "device_id": str(int(payload.device_id)),
    }
    if payload.default_nic is not None:  # guard: an-absent-default-nic-changes-nothing
        fields["default"] = bool(payload.default_nic)
    if isinstance(payload, NicPayload):
        fields["nic_id"] = str(payload.nic_id)
        fields["netmask"] = str(payload.netmask)
        fields["gateway"] = _gateway(payload)
    return {name: value for name, value in fields.items() if value != ""}
