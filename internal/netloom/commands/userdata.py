"""The data that a VM can read about itself: metadata, user data, SSH keys, and its password once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from netloom.commands.nic import put_nic, with_name_of, with_nic
from netloom.protocol.userdata import (
    GivenItem,
    SaveHypervisorHostname,
    SavePassword,
    SaveSshkey,
    SaveUserdata,
    SaveVmData,
    VmDataItem,
)
from netloom.secret import Secret
from netloom.state import Network, Nic

# Names in CloudStack's documentation, and the names that its client sends.
_FILES = {"user-data": "user_data", "public-keys/0/openssh-key": "public-keys"}

_USER_DATA = ("userdata", "user_data")
_PASSWORD = ("password", "vm_password")


def save_vm_data(network: Network, payload: SaveVmData) -> Network:
    """Replace all items of the VM. If no password is listed, the known one stays: later starts of the VM send none."""
    known, nic = with_nic(network, payload)
    known = put_nic(known, with_known_items(nic, payload.vm_data), nic)
    return with_name_of(known, known.nics[nic.key], known.nics) if nic.named else known


def save_password(network: Network, payload: SavePassword) -> Network:
    """Set the password that the VM can fetch once."""
    known, nic = with_nic(network, payload)
    return put_nic(known, _with_password(nic, payload.password.reveal()), nic)


def save_userdata(network: Network, payload: SaveUserdata) -> Network:
    """Set the user data, byte for byte; empty user data is a value."""
    known, nic = with_nic(network, payload)
    return put_nic(known, replace(nic, user_data=Secret(payload.userdata.reveal())), nic)


def save_sshkey(network: Network, payload: SaveSshkey) -> Network:
    """Set the item ``public-keys``."""
    return _with_item(network, payload, "public-keys", payload.sshkey.reveal())


def save_hypervisor_hostname(network: Network, payload: SaveHypervisorHostname) -> Network:
    """Set the item ``hypervisor-host-name``."""
    return _with_item(network, payload, "hypervisor-host-name", str(payload.hypervisor_hostname))


def valid_items(items: Iterable[GivenItem]) -> list[VmDataItem]:
    """The items without those that have an invalid name: a tenant chooses names, and the VM must start all the same."""
    return [valid for item in items if (valid := item.valid_item()) is not None]


def with_known_items(nic: Nic, items: Sequence[GivenItem]) -> Nic:
    """``nic`` with exactly the valid ones of these items. An empty list means that CloudStack could not make it.

    A list that CloudStack made has at least the metadata of every VM.
    """
    return with_items(nic, valid_items(items)) if items else nic  # guard: an-empty-list-of-items-is-unknown


def with_items(nic: Nic, items: Iterable[VmDataItem]) -> Nic:
    """``nic`` with exactly these items, and with the password if it is one of them.

    The checksum of a password is not stored: it is as secret as the password, and no protocol serves it.
    """
    metadata: dict[str, str] = {}
    user_data: Secret | None = None
    for item in items:
        name = _FILES.get(str(item.file), str(item.file))
        if item.dir == "metadata":
            metadata[name] = item.content.reveal()
        elif (item.dir, name) == _USER_DATA:
            user_data = Secret(item.content.reveal())
        elif (item.dir, name) == _PASSWORD and item.content:
            nic = _with_password(nic, item.content.reveal())
    return replace(nic, metadata=dict(sorted(metadata.items())), user_data=user_data)


def password_taken(network: Network, key: str, serial: int) -> Network:
    """Remove the password that the VM has fetched and acknowledged. A newer one stays."""
    nic = network.nics.get(key)
    if nic is None or nic.password_serial != serial or nic.password is None:
        return network
    return put_nic(network, replace(nic, password=None), nic)


def _with_password(nic: Nic, password: str) -> Nic:
    """Setting the same password again changes nothing while the VM has not fetched it."""
    if nic.password == Secret(password):
        return nic
    return replace(nic, password=Secret(password), password_serial=nic.password_serial + 1)


def _with_item(network: Network, payload: SaveSshkey | SaveHypervisorHostname, name: str, content: str) -> Network:
    known, nic = with_nic(network, payload)
    return put_nic(known, replace(nic, metadata=dict(sorted({**nic.metadata, name: content}.items()))), nic)
