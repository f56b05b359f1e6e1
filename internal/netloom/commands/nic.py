"""prepare-nic and release-nic, and how all commands about VMs find, add and remove NICs.

CloudStack names a NIC by its uuid, its MAC address or its number, not always by all three. Within a network an IP
address or a MAC address belongs to one NIC. A call with the address of another NIC removes that NIC, with its lease,
names, options, metadata and password.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from msgspec.structs import replace

from netloom.commands.network_facts import gateway_in
from netloom.errors import BadRequest
from netloom.protocol.nic import NicPayload, PrepareNic, ReleaseNic, VmNic
from netloom.state import Network, Nic


def prepare_nic(network: Network, payload: PrepareNic) -> Network:
    """Add the NIC, or update it; its lease, names and metadata stay."""
    return with_nic(network, payload)[0]


def release_nic(network: Network, payload: ReleaseNic) -> Network:
    """Keep everything: the VM has stopped and may start again (docs/protocol.md, section 3, release-nic)."""
    nic = find_nic(network, payload)
    return network if nic is None else put_nic(network, replace(nic, fresh=True), nic)


class Nics:
    """The NICs of a network while a command changes them. Each NIC is found without a search."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._listed = _Table(network.nics)
        self._unlisted = _Table(network.unlisted)
        self._numbers: set[str] = set()  # of NICs that are gone

    @property
    def network(self) -> Network:
        """The network with these NICs, and without the options of those that are gone."""
        network = _without_options(self._network, self._numbers)
        return replace(network, nics=self._listed.nics, unlisted=self._unlisted.nics)

    def find(self, payload: NicPayload | VmNic) -> Nic | None:
        """The NIC that ``payload`` names by uuid, MAC or number. Never by IP address: another may have it by now."""
        return self._listed.find(payload)

    def take(self, payload: NicPayload | VmNic) -> Nic:
        """Put the NIC as ``payload`` describes it, and return it. Fields that are absent from it stay as they are.

        A NIC that the last restore did not list has its lease and its name again. Raises BadRequest if the MAC address
        is not known.
        """
        previous = self.find(payload)
        unlisted = self._unlisted.find(payload) if previous is None else None  # guard: an-unlisted-nic-comes-back
        nic = replace(previous or unlisted or Nic(mac=str(payload.mac)), **_given_fields(payload))
        if not nic.mac:
            raise BadRequest("payload.mac is missing, and the NIC is not known")
        self.put(nic, previous)
        return nic

    def put(self, nic: Nic, previous: Nic | None = None) -> None:
        """Put ``nic`` instead of ``previous``, and remove other NICs that have its IP or MAC address."""
        gone = self._listed.having("mac", nic.mac) | self._listed.having("ip6", nic.ip6) | {nic.key}
        gone |= self._listed.having("ip", nic.ip)  # guard: an-address-has-one-vm
        if previous is not None:
            gone.add(previous.key)
        self._numbers |= {it.nic_id for it in self._listed.drop(gone)} - {nic.nic_id}
        self._listed.put(nic)
        self._unlisted.drop({nic.key} | self._unlisted.having("mac", nic.mac) | self._unlisted.having("ip", nic.ip))

    def update(self, nic: Nic) -> None:
        """Replace the NIC with this key in its place, whoever else has its addresses."""
        self._listed.put(nic)


class _Table:
    """NICs by key, and the keys of those that have a certain address or number."""

    def __init__(self, nics: dict[str, Nic]) -> None:
        self.nics: dict[str, Nic] = {}
        self._keys: dict[tuple[str, str], dict[str, None]] = {}  # by a field and its value, in the order of the NICs
        for nic in nics.values():
            self.put(nic)

    def find(self, payload: NicPayload | VmNic) -> Nic | None:
        if payload.nic_uuid:
            if payload.nic_uuid in self.nics:
                return self.nics[payload.nic_uuid]
            found = self._first("mac", payload.mac)
            return None if found is not None and found.nic_uuid else found
        if payload.mac:
            return self._first("mac", payload.mac)
        return self._first("nic_id", getattr(payload, "nic_id", ""))

    def having(self, field: str, value: str) -> set[str]:
        return set(self._keys.get((field, value), ()))

    def put(self, nic: Nic) -> None:
        key = nic.key
        if key in self.nics:
            self._forget(self.nics[key])
        self.nics[key] = nic
        for field in _fields(nic):
            self._keys.setdefault(field, {})[key] = None

    def drop(self, keys: Iterable[str]) -> list[Nic]:
        """Remove these NICs; returns those that were there."""
        dropped = [self.nics.pop(key) for key in keys if key in self.nics]
        for nic in dropped:
            self._forget(nic)
        return dropped

    def _first(self, field: str, value: str) -> Nic | None:
        return next((self.nics[key] for key in self._keys.get((field, value), ())), None)

    def _forget(self, nic: Nic) -> None:
        for field in _fields(nic):
            del self._keys[field][nic.key]


def _fields(nic: Nic) -> list[tuple[str, str]]:
    found = (("mac", nic.mac), ("ip", nic.ip), ("ip6", nic.ip6), ("nic_id", nic.nic_id))
    return [field for field in found if field[1]]


def find_nic(network: Network, payload: NicPayload | VmNic) -> Nic | None:
    """The NIC that ``payload`` names (``Nics.find``)."""
    return _Table(network.nics).find(payload)


def with_nic(network: Network, payload: NicPayload | VmNic) -> tuple[Network, Nic]:
    """``network`` with the NIC as ``payload`` describes it, and that NIC (``Nics.take``)."""
    nics = Nics(network)
    nic = nics.take(payload)
    return nics.network, nic


def put_nic(network: Network, nic: Nic, previous: Nic | None = None) -> Network:
    """``network`` with ``nic`` instead of ``previous`` (``Nics.put``)."""
    nics = Nics(network)
    nics.put(nic, previous)
    return nics.network


def without_unlisted(network: Network, listed: Collection[str]) -> Network:
    """``network`` without the NICs that are not in ``listed``, a complete list of keys, except fresh ones.

    The VMs are expunged: the remove-dhcp-entry of such a NIC failed, and CloudStack does not repeat it. Secrets are
    removed. The rest stays in ``unlisted`` until the next implement-network, because the list may be older than the
    first commands about a VM that is just starting. CloudStack lists no NICs without an IPv4 address.
    """
    gone = {
        key: nic
        for key, nic in network.nics.items()
        if key not in listed and nic.ip and not nic.fresh  # guard: fresh-nics-are-kept
    }
    if not gone:
        return network
    kept = {key: nic for key, nic in network.nics.items() if key not in gone}
    bare = {key: replace(nic, password=None, user_data=None, metadata={}) for key, nic in gone.items()}
    return replace(network, nics=kept, unlisted={**network.unlisted, **bare})


def settled(network: Network) -> Network:
    """``network`` as an implement-network begins: unlisted NICs are removed, and no NIC is fresh."""
    numbers = {nic.nic_id for nic in network.unlisted.values()}
    nics = {key: replace(nic, fresh=False) for key, nic in network.nics.items()}
    return replace(_without_options(network, numbers), nics=nics, unlisted={})


def with_name_of(network: Network, nic: Nic, others: Collection[str]) -> Network:
    """``network`` where ``nic`` alone has its name: of the NICs ``others``, those of another VM lose it.

    Names are unique in a network, so the other VM is expunged. Another NIC of the same VM keeps the name.
    """
    unnamed = {key: replace(network.nics[key], named=False) for key in others if _has_name_of(network.nics[key], nic)}
    return replace(network, nics={**network.nics, **unnamed}) if unnamed else network


def _has_name_of(other: Nic, nic: Nic) -> bool:
    """Whether the NIC of another VM has the same name. Without metadata, NICs of one VM have different numbers."""
    if other.key == nic.key or not nic.hostname or other.hostname.lower() != nic.hostname.lower():
        return False
    vms = {it.metadata.get("instance-id", "") for it in (nic, other)}
    return len(vms) > 1 if "" not in vms else other.device_id == nic.device_id


def without_nic(network: Network, payload: NicPayload) -> Network:
    """``network`` without every NIC that the payload names, by uuid, MAC or number, and without their options."""
    numbers = {str(payload.nic_id)}
    while (unlisted := _Table(network.unlisted).find(payload)) is not None:
        numbers.add(unlisted.nic_id)
        network = replace(network, unlisted={key: it for key, it in network.unlisted.items() if key != unlisted.key})
    while (nic := find_nic(network, payload)) is not None:
        numbers.add(nic.nic_id)
        network = replace(network, nics={key: other for key, other in network.nics.items() if key != nic.key})
    return _without_options(network, numbers)


def _without_options(network: Network, numbers: Collection[str]) -> Network:
    kept = {nic_id: options for nic_id, options in network.dhcp_options.items() if nic_id not in numbers}
    return network if len(kept) == len(network.dhcp_options) else replace(network, dhcp_options=kept)


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
        fields["fresh"] = True
    return {name: value for name, value in fields.items() if value != ""}
