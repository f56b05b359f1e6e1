"""The payloads with metadata, user data, SSH keys and passwords of a VM."""

from __future__ import annotations

from typing import Self

import msgspec

from netloom.protocol.nic import KnownNic
from netloom.protocol.scalars import Content, ItemName, Password, Text, quoted

# The client's names of the directories, and the names in CloudStack's documentation for the same ones.
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
    """One metadata item of a VM. The content is a secret: it may be a password, and user data often contains some."""

    dir: Directory
    file: ItemName
    content: Content = Content()


class GivenItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item as CloudStack sends it; :meth:`valid_item` checks its name.

    A tenant chooses names of items (the parameters of the user data). A name such as ``../x`` must not prevent the
    start of the VM, and not the restore of the network.
    """

    dir: Content = Content()
    file: Content = Content()
    content: Content = Content()

    def valid_item(self) -> VmDataItem | None:
        """The item, or None if its name or directory is invalid."""
        try:
            directory, name = Directory.parse(self.dir.reveal()), ItemName.parse(self.file.reveal())
        except ValueError:
            return None
        return VmDataItem(dir=directory, file=name, content=self.content)


class SaveVmData(KnownNic, frozen=True, kw_only=True):
    """save-vm-data: all items of the VM. A known password stays if none is listed."""

    vm_data: tuple[GivenItem, ...]


class SavePassword(KnownNic, frozen=True, kw_only=True):
    """save-password: a password that the VM can fetch once."""

    password: Password


class SaveUserdata(KnownNic, frozen=True, kw_only=True):
    """save-userdata: the user data, which may be empty."""

    userdata: Content = Content()


class SaveSshkey(KnownNic, frozen=True, kw_only=True):
    """save-sshkey: public keys, one per line."""

    sshkey: Content = Content()


class SaveHypervisorHostname(KnownNic, frozen=True, kw_only=True):
    """save-hypervisor-hostname: the name of the hypervisor that the VM runs on."""

    hypervisor_hostname: Text = Text("")
