"""custom-action, for a network or a VPC. Its fields are in the file itself, not in an object ``payload``."""

from __future__ import annotations

from typing import ClassVar, Self

import msgspec

from netloom.protocol.scalars import ActionName, Id, IPv4PrefixList, ParamName, ParamValue, Vlan, Word, quoted


class Params(dict[str, str]):
    """Parameters by name. CloudStack sends strings; a parameter that was not given is the empty string."""

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, dict):
            return cls({str(ParamName.parse(name)): str(ParamValue.parse(it)) for name, it in value.items()})
        raise ValueError(f"{quoted(value)}, where an object of parameters is expected")


class CustomAction(msgspec.Struct, frozen=True, kw_only=True):
    """One action. The caller of CloudStack's API chooses ``params``, so the code that uses one has to check it."""

    ALIASES: ClassVar[dict[str, str]] = {"action_params": "action-params"}

    action: ActionName
    network_id: Id = Id("")
    vpc_id: Id = Id("")
    zone_id: Id = Id("")
    vlan: Vlan = Vlan("")
    network_state: Word = Word("")
    vpc_state: Word = Word("")
    cidr: IPv4PrefixList = IPv4PrefixList()
    vpc_cidr: IPv4PrefixList = IPv4PrefixList()
    params: Params = msgspec.field(name="action-params", default_factory=Params)

    def __post_init__(self) -> None:
        if not self.network_id and not self.vpc_id:
            raise ValueError("neither network_id nor vpc_id is given")
