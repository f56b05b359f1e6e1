"""The payload file as a whole: registration details, stored details, and the command's own fields.

CloudStack writes one such JSON file per call (docs/protocol.md, section 2).
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

import msgspec

from netloom.errors import BadRequest
from netloom.names import CONNTRACK_HELPERS, namespace, scope_of
from netloom.protocol.reader import convert, load_object
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
    ServicePort,
    Text,
    UserName,
    quoted,
    string,
)
from netloom.secret import Secret
from netloom.standbywire import PORT as STANDBY_PORT

CUSTOM_ACTION = "custom-action"

_LINE_END = re.compile(r"\r\n|\r|\n")

# CloudStack's client sends both names with dashes; its documentation has underscores.
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
    """A private key in PEM or OpenSSH format, with Unix line ends and a final newline.

    ``$(cat file)`` in a shell drops the final newline, Windows editors write CR LF, and some scripts write a newline
    as the two characters ``\\n``. All three are repaired, because the parsers of keys refuse them.
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


class FirewallDetail(Choice[Literal["present", "absent"]]):
    """Whether the network offering has the Firewall service. ``absent``: it has not, so ingress is open by default."""


class SegmentKind(Choice[Literal["vlan", "vxlan"]]):
    """How guest networks are separated on the physical network."""


class StandbyPolicy(Choice[Literal["auto", "off", "required"]]):
    """Whether networks get a standby host. ``auto``: where enough hosts are registered and answer: three, or two with
    ``standby.alone=gateway``.
    ``required``: without one, the call fails."""


class StandbyAlone(Choice[Literal["stop", "gateway"]]):
    """What two hosts without a witness do when they do not hear each other. ``stop``: there is no such group.
    ``gateway``: the one that a gateway answers serves, and both if one answers both."""


class IdleTimeout(Number):
    """Seconds without data after which a balanced connection is closed."""

    LOW = 5
    HIGH = 7 * 86400
    WHAT = "a time in seconds"


class MaxConnections(Number):
    """Balanced connections of one network or VPC at the same time. haproxy needs two descriptors for each."""

    LOW = 100
    HIGH = 30_000
    WHAT = "a number of connections"


class ConnectionShare(Number):
    """Connections that conntrack holds for one VM; 0: as many as the kernel has."""

    HIGH = 1_000_000
    WHAT = "a number of connections, or 0 for no maximum,"

    @classmethod
    def parse(cls, value: object) -> Self:
        share = super().parse(value)
        if 0 < share < 1000:  # guard: a-share-of-connections-can-be-sampled
            raise ValueError(f"{quoted(value)} is too small: at least 1000 connections, or 0 for no maximum")
        return share


class HelperList(tuple[str, ...]):
    """Comma-separated names of conntrack helpers, in any case; sorted, and without duplicates."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        given = {it.strip().lower() for it in string(value, limit=1000).split(",") if it.strip()}
        for name in sorted(given.difference(CONNTRACK_HELPERS)):  # guard: a-conntrack-helper-is-known
            raise ValueError(f"{quoted(name)} is none of {', '.join(CONNTRACK_HELPERS)}")
        return cls(sorted(given))


class PhysicalDetails(msgspec.Struct, frozen=True, kw_only=True):
    """The registration details. CloudStack sends every value as a string; JSON numbers are accepted too."""

    hosts: HostList = HostList()
    host: HostList = HostList()
    port: ServicePort = ServicePort(22)
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
    lb_idle_timeout: IdleTimeout = msgspec.field(name="loadbalancer.idle.timeout", default=IdleTimeout(600))
    lb_max_conn: MaxConnections = msgspec.field(name="loadbalancer.max.conn", default=MaxConnections(8000))
    conntrack_helpers: HelperList = msgspec.field(name="conntrack.helpers", default=HelperList())
    conntrack_max_per_vm: ConnectionShare = msgspec.field(name="conntrack.max.per.vm", default=ConnectionShare(32_000))
    standby: StandbyPolicy = StandbyPolicy("auto")
    standby_alone: StandbyAlone = msgspec.field(name="standby.alone", default=StandbyAlone("stop"))
    standby_port: ServicePort = msgspec.field(name="standby.port", default=ServicePort(STANDBY_PORT))
    # Reserved: nothing reads it yet. It is checked, so that no registration gets an invalid value meanwhile.
    metrics_listen: Text = msgspec.field(name="metrics.listen", default=Text(""))

    def __post_init__(self) -> None:
        if bool(self.public_ip6_gateway) != bool(self.public_ip6_address):
            raise ValueError("public.ip6.gateway and public.ip6.address go together, and one of them is missing")
        if self.standby_port == self.port:  # guard: the-hosts-do-not-meet-at-the-port-of-ssh
            raise ValueError(f"standby.port and port are both {self.port}, and SSH listens there")

    @property
    def candidates(self) -> tuple[str, ...]:
        """The hosts to choose from: ``hosts``, else ``host``."""
        return tuple(map(str, self.hosts or self.host))


class StoredDetails(msgspec.Struct, frozen=True, kw_only=True):
    """The details that ensure-network-device printed last. All empty: unknown; the scope may exist nevertheless.

    ``epoch`` grows with each move and take-over of the scope. ``previous``: hosts that the scope left and that were not
    yet told to delete it. ``standby``: the host that stood by for it.
    """

    host: str = ""
    namespace: str = ""
    epoch: int = 0
    standby: str = ""
    previous: tuple[str, ...] = ()


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    host: HostList = HostList()
    namespace: Text = Text("")
    epoch: Number = Number(0)
    standby: HostList = HostList()
    previous: HostList = HostList()


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed payload file.

    ``payload``: the command's own fields, decoded and without null and empty ones. For custom-action these are the
    fields of the file itself, without the two details.
    """

    details: PhysicalDetails
    network_details: StoredDetails
    payload: dict[str, Any]


class _ScopeIds(msgspec.Struct, frozen=True, kw_only=True):
    network_id: Id = Id("")
    vpc_id: Id = Id("")


def read_envelope(data: bytes, command: str) -> Envelope:
    """Parses the payload file of ``command`` and checks its details.

    Raises BadRequest when the file is not JSON, names no host, or has a wrong detail. The message names the detail and
    never quotes a key or a password. Wrong stored details raise nothing: they count as unknown.
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
    return Envelope(details=details, network_details=_stored(stored), payload=payload)


def parse_current_details(text: str, scope_id: str = "") -> StoredDetails:
    """Parses the field ``current_details`` of ensure-network-device, which is a JSON text.

    Details that cannot be parsed count as unknown; so do those that name the namespace of another scope than
    ``scope_id``.
    """
    try:
        found = _stored(load_object(text.encode("utf-8", "replace"), root="current_details"))
    except BadRequest:
        return StoredDetails()
    if scope_id and found.namespace and found.namespace != namespace(scope_id):
        return StoredDetails()
    return found


def scope_id_of(command: str, payload: dict[str, Any]) -> str:
    """The scope of a command: ``net-204``, or ``vpc-7`` for a VPC and for each of its tiers.

    Raises BadRequest when the payload names neither a network nor a VPC.
    """
    ids = convert(payload, _ScopeIds, root="payload")
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
        standby=str(found.standby[0]) if len(found.standby) == 1 else "",
        previous=tuple(map(str, found.previous)),
    )
