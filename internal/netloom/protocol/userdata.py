"""Metadata, user data, keys and passwords of a VM."""

from __future__ import annotations

from typing import Self

import msgspec

from netloom.protocol.nic import KnownNic
from netloom.protocol.scalars import Content, ItemName, Password, Text, is_item_name, quoted

# CloudStack's names on the left as its client sends them; the documentation's names for the same directories.
_DIRECTORIES = {
    "userdata": "userdata",
    "user-data": "userdata",
    "metadata": "metadata",
    "meta-data": "metadata",
    "password": "password",
}


class Directory(str):
    """``userdata``, ``metadata`` or ``password``; the documentation's ``user-data`` and ``meta-data`` mean the same."""

    @classmethod
    def parse(cls, value: object) -> Self:
        directory = _DIRECTORIES.get(value.lower()) if isinstance(value, str) else None
        if directory is None:  # guard: a-metadata-directory-is-known
            raise ValueError(f"{quoted(value)} is none of userdata, metadata, password")
        return cls(directory)


class VmDataItem(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a VM's metadata. The content is a secret: it may be a password, and user data often holds some."""

    dir: Directory
    file: ItemName
    content: Content = Content()


class SaveVmData(KnownNic, frozen=True, kw_only=True):
    """save-vm-data: the complete set of the VM, but for a password that is there and not listed."""

    vm_data: tuple[VmDataItem, ...]


class RestoredItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item as restore-network lists it: its name is looked at later.

    A tenant chooses names of items, and one tenant's ``../x`` must not keep a whole network down.
    """

    dir: Content = Content()
    file: Content = Content()
    content: Content = Content()

    def valid_item(self) -> VmDataItem | None:
        """The item, or None when its name or directory is not one that is served."""
        place, name = self.dir.reveal().lower(), self.file.reveal()
        if place not in _DIRECTORIES or not is_item_name(name):
            return None
        return VmDataItem(dir=Directory.parse(place), file=ItemName(name), content=self.content)


class SavePassword(KnownNic, frozen=True, kw_only=True):
    """save-password."""

    password: Password


class SaveUserdata(KnownNic, frozen=True, kw_only=True):
    """save-userdata; empty means that there is none any more."""

    userdata: Content = Content()


class SaveSshkey(KnownNic, frozen=True, kw_only=True):
    """save-sshkey: public keys, several lines possible."""

    sshkey: Content = Content()


class SaveHypervisorHostname(KnownNic, frozen=True, kw_only=True):
    """save-hypervisor-hostname."""

    hypervisor_hostname: Text = Text("")
