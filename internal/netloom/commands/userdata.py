"""What a VM may read about itself: metadata, user data, keys, its password once."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from netloom.commands.nic import put_nic, with_nic
from netloom.protocol.userdata import (
    SaveHypervisorHostname,
    SavePassword,
    SaveSshkey,
    SaveUserdata,
    SaveVmData,
    VmDataItem,
)
from netloom.secret import Secret
from netloom.state import Network, Nic

# CloudStack's client writes the names on the right; its documentation those on the left.
_FILES = {"user-data": "user_data", "public-keys/0/openssh-key": "public-keys"}

_USER_DATA = ("userdata", "user_data")
_PASSWORD = ("password", "vm_password")


def save_vm_data(network: Network, payload: SaveVmData) -> Network:
    """The whole set of the VM is this. A password stays when none is listed: later starts bring none."""
    known, nic = with_nic(network, payload)
    return put_nic(known, with_items(nic, payload.vm_data), nic)


def save_password(network: Network, payload: SavePassword) -> Network:
    """The VM may fetch this password, once."""
    known, nic = with_nic(network, payload)
    return put_nic(known, _with_password(nic, payload.password.reveal()), nic)


def save_userdata(network: Network, payload: SaveUserdata) -> Network:
    """The user data is this, byte for byte; empty is a value too."""
    known, nic = with_nic(network, payload)
    return put_nic(known, replace(nic, user_data=Secret(payload.userdata.reveal())), nic)


def save_sshkey(network: Network, payload: SaveSshkey) -> Network:
    """``public-keys`` is this text."""
    return _with_item(network, payload, "public-keys", payload.sshkey.reveal())


def save_hypervisor_hostname(network: Network, payload: SaveHypervisorHostname) -> Network:
    """``hypervisor-host-name`` is this."""
    return _with_item(network, payload, "hypervisor-host-name", str(payload.hypervisor_hostname))


def with_items(nic: Nic, items: Iterable[VmDataItem]) -> Nic:
    """``nic`` with exactly these items, and with the password when one is among them.

    The checksum of a password is as secret as the password and served by no protocol: it is not kept.
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
    """The VM has fetched that password and acknowledged it: it is nowhere any more. A newer one stays."""
    nic = network.nics.get(key)
    if nic is None or nic.password_serial != serial or nic.password is None:
        return network
    return put_nic(network, replace(nic, password=None), nic)


def _with_password(nic: Nic, password: str) -> Nic:
    """Told twice, the same password is the same setting, until the VM has taken it."""
    if nic.password == Secret(password):
        return nic
    return replace(nic, password=Secret(password), password_serial=nic.password_serial + 1)


def _with_item(network: Network, payload: SaveSshkey | SaveHypervisorHostname, name: str, content: str) -> Network:
    known, nic = with_nic(network, payload)
    return put_nic(known, replace(nic, metadata=dict(sorted({**nic.metadata, name: content}.items()))), nic)
