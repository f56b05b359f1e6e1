"""A VM's NIC and all that hangs on it: lease, names, metadata, password.

State hangs on the NIC; an address is an attribute of it. Whoever takes an address takes nothing else of its
former owner.
"""

from __future__ import annotations

import msgspec

from netloom.secret import Secret


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """One NIC of a VM on one network.

    ``leased``: add-dhcp-entry or a restore came, so DHCP answers it. ``named``: the same for DNS. Both outlive the
    VM's stop and end with remove-dhcp-entry. ``metadata`` holds the items as CloudStack names them (``instance-id``).
    ``user_data`` None: none was ever given; empty: it was given and is empty. ``password`` None: none was set, or
    the VM has fetched it.
    """

    mac: str
    nic_uuid: str = ""
    nic_id: str = ""
    ip: str = ""  # IPv4; empty on IPv6-only NICs
    ip6: str = ""
    netmask: str = ""
    gateway: str = ""
    hostname: str = ""
    device_id: str = ""
    default: bool = True
    leased: bool = False
    named: bool = False
    metadata: dict[str, str] = {}
    user_data: Secret | None = None
    password: Secret | None = None
    password_serial: int = 0  # grows with every password that was set; names a setting without telling it

    @property
    def key(self) -> str:
        """What makes a NIC the same NIC: its uuid, else its MAC address."""
        return self.nic_uuid or self.mac
