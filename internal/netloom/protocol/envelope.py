"""The payload file as a whole: the operator's details, what we stored last, and the command's own fields."""

from __future__ import annotations

import re
from typing import Any, Self

import msgspec

from netloom.errors import BadRequest
from netloom.names import namespace, scope_of
from netloom.protocol.reader import convert, dump, load_object, read
from netloom.protocol.scalars import (
    SECRET_CHARACTERS_MAX,
    Choice,
    Document,
    HostList,
    Id,
    IPv6,
    IPv6Interface,
    LinkName,
    Number,
    Port,
    Text,
    UserName,
    quoted,
    string,
)
from netloom.secret import Secret

CUSTOM_ACTION = "custom-action"

_LINE_END = re.compile(r"\r\n|\r|\n")

# The documentation spells both with underscores, the client with dashes.
_PHYSICAL = "physical-network-extension-details"
_STORED = "network-extension-details"


class LoginPassword(Secret):
    """The password of the host's user: any character but NUL, at most 4,096."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        text = string(value, limit=SECRET_CHARACTERS_MAX, secret=True)
        if "\0" in text:
            raise ValueError("the value contains a NUL character")
        return cls(text)  # guard: a-password-keeps-every-character


class PrivateKey(Secret):
    """A private key in PEM or OpenSSH's format, with the line ends and the last newline that its readers want.

    A key registered through a shell's ``$(cat file)`` arrives without its last newline, one from a Windows desk with
    CR LF, and one that went through a careless script with the two characters ``\\n``.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        text = string(value, limit=4 * SECRET_CHARACTERS_MAX, secret=True).strip()
        if "\0" in text:
            raise ValueError("the value contains a NUL character")
        if "\n" not in text and "\r" not in text:
            text = text.replace("\\n", "\n")  # guard: a-key-gets-its-lines-back
        return cls("\n".join(line.rstrip() for line in _LINE_END.split(text)) + "\n")


class FirewallDetail(Choice):
    """``absent``: the offering has no Firewall service, so no rule will ever open ingress."""

    WORDS = ("present", "absent")


class SegmentKind(Choice):
    """How guest segments are told apart on the wire."""

    WORDS = ("vlan", "vxlan")


class PhysicalDetails(msgspec.Struct, frozen=True, kw_only=True):
    """The registration details. Every value is a string in CloudStack; numbers are accepted too."""

    hosts: HostList = HostList()
    host: HostList = HostList()
    port: Port = Port(22)
    username: UserName = UserName("root")
    sshkey: PrivateKey | None = None
    password: LoginPassword | None = None
    guest_nic: LinkName = msgspec.field(name="guest.network.device", default=LinkName("eth1"))
    public_nic: LinkName = msgspec.field(name="public.network.device", default=LinkName("eth1"))
    physicalnetworkname: Text = Text("")
    hostkeys: Document = Document("")
    owner: Text = Text("")
    firewall: FirewallDetail = FirewallDetail("present")
    isolation: SegmentKind = msgspec.field(name="guest.isolation", default=SegmentKind("vlan"))
    broadcast: SegmentKind | None = msgspec.field(name="network.broadcast", default=None)
    public_ip6_gateway: IPv6 = msgspec.field(name="public.ip6.gateway", default=IPv6(""))
    public_ip6_address: IPv6Interface = msgspec.field(name="public.ip6.address", default=IPv6Interface(""))
    metrics_listen: Text = msgspec.field(name="metrics.listen", default=Text(""))

    def __post_init__(self) -> None:
        if bool(self.public_ip6_gateway) != bool(self.public_ip6_address):
            raise ValueError("public.ip6.gateway and public.ip6.address go together, and one of them is missing")

    @property
    def candidates(self) -> tuple[str, ...]:
        """The hosts to choose from: ``hosts``, else ``host``."""
        return tuple(map(str, self.hosts or self.host))


class StoredDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What ensure-network-device printed last. All empty means unknown, which is not the same as new.

    ``epoch`` grows by one whenever the scope moves; ``previous``: hosts that were left and not told yet.
    """

    host: str = ""
    namespace: str = ""
    epoch: int = 0
    previous: tuple[str, ...] = ()


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    host: HostList = HostList()
    namespace: Text = Text("")
    epoch: Number = Number(0)
    previous: HostList = HostList()


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A payload file, taken apart.

    ``payload`` is the JSON text of the command's own fields; for custom-action, of the flat object without the details.
    """

    details: PhysicalDetails
    network_details: StoredDetails
    payload: bytes


class _ScopeIds(msgspec.Struct, frozen=True, kw_only=True):
    network_id: Id = Id("")
    vpc_id: Id = Id("")


def read_envelope(data: bytes, command: str) -> Envelope:
    """The payload file of ``command``, checked.

    Raises BadRequest when it is not JSON, names no host, or a detail is wrong; the message tells the detail and
    never quotes a key or a password. What was stored by ensure-network-device cannot make it fail.
    """
    file = load_object(data, root="payload file")
    physical = _pop(file, _PHYSICAL)
    stored = _pop(file, _STORED)
    if not isinstance(physical, dict):
        raise BadRequest(
            f"{_PHYSICAL}: {'missing' if physical is None else quoted(physical)}, where an object is expected",
            hint="is the extension registered with the physical network?",
        )
    details = convert(physical, PhysicalDetails, root=_PHYSICAL)
    if not details.candidates:  # guard: a-registration-names-hosts
        raise BadRequest(f"{_PHYSICAL}.hosts is missing", hint="register the extension with details[0].hosts=...")
    payload = file if command == CUSTOM_ACTION else file.get("payload")
    if not isinstance(payload, dict):
        raise BadRequest(f"payload: {'missing' if payload is None else quoted(payload)}, where an object is expected")
    return Envelope(
        details=details,
        network_details=_stored(stored),
        payload=dump(payload),  # guard: registration-does-not-cross-the-wire
    )


def parse_current_details(text: str, scope_id: str = "") -> StoredDetails:
    """The ``current_details`` of ensure-network-device, a JSON string.

    What cannot be read is unknown, and so is what names the namespace of another scope than ``scope_id``.
    """
    try:
        found = _stored(load_object(text.encode("utf-8", "replace"), root="current_details"))
    except BadRequest:
        return StoredDetails()
    if scope_id and found.namespace and found.namespace != namespace(scope_id):
        return StoredDetails()
    return found


def scope_id_of(command: str, payload: bytes) -> str:
    """The scope that a command is about: ``net-204``, or ``vpc-7`` for a VPC and for each of its tiers.

    Raises BadRequest when the payload names neither.
    """
    ids = read(payload, _ScopeIds)
    if not ids.network_id and not ids.vpc_id:  # guard: a-payload-names-its-scope
        raise BadRequest(f"payload.network_id is missing ({command})")
    return scope_of(ids.network_id, ids.vpc_id)


def _pop(file: dict[str, Any], key: str) -> Any:
    older = file.pop(key.replace("-", "_"), None)
    return file.pop(key, older)


def _stored(value: object) -> StoredDetails:
    if not isinstance(value, dict):
        return StoredDetails()
    try:
        found = convert(value, _Stored, root=_STORED)
    except BadRequest:
        return StoredDetails()
    return StoredDetails(
        host=str(found.host[0]) if len(found.host) == 1 else "",
        namespace=str(found.namespace),
        epoch=int(found.epoch),
        previous=tuple(map(str, found.previous)),
    )
