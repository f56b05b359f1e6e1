"""A NIC of a VM, with its lease, DNS names, metadata and password.

All of these belong to the NIC, and so does its address. A NIC that takes over the address of another NIC takes over
nothing else from it.
"""

from __future__ import annotations

import msgspec

from netloom.secret import Secret


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """One NIC of a VM on one network.

    Identity: ``mac``, ``nic_uuid``, ``nic_id``. CloudStack does not send all three in every call.

    Addresses: ``ip`` to ``gateway``. The gateway and the netmask are those of the NIC's own range.

    DHCP and DNS: ``leased`` is set by add-dhcp-entry and by a restore, ``named`` by add-dns-entry and by a restore. A
    stop of the VM keeps both; remove-dhcp-entry removes the NIC. ``default``: the VM's default route uses this NIC.

    ``fresh``: a command about the NIC came since the last implement-network. If a restore does not list such a NIC, its
    VM is not gone: CloudStack leaves out VMs that are starting or stopping at that moment.

    Metadata: ``metadata`` has CloudStack's names as keys (``instance-id``). ``user_data`` is None until it is given;
    empty user data is a value. ``password`` is None if none was set or if the VM has fetched it.
    """

    mac: str
    nic_uuid: str = ""
    nic_id: str = ""
    ip: str = ""  # IPv4; empty on IPv6-only NICs
    ip6: str = ""
    netmask: str = ""
    gateway: str = ""
    hostname: str = ""
    device_id: str = ""  # the number of the NIC in its VM; nothing reads it, but state files and golden files have it
    default: bool = True
    leased: bool = False
    named: bool = False
    fresh: bool = False
    metadata: dict[str, str] = {}
    user_data: Secret | None = None
    password: Secret | None = None
    password_serial: int = 0  # increases with each new password; identifies a password without revealing it

    @property
    def key(self) -> str:
        """The identity of the NIC in ``Network.nics``: its uuid, else its MAC address."""
        return self.nic_uuid or self.mac
