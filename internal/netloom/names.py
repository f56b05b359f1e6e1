"""Names that netloom gives to things on a host, and the ids they are made from.

Pure functions. What others rely on stays as it is (protocol section 4): the namespaces ``cs-net-<id>`` and
``cs-vpc-<id>``, the bridges ``br<nic>-<vlan>`` with their port ``<nic>.<vlan>``. A kernel link name holds at
most 15 bytes (IFNAMSIZ, linux/if.h).
"""

from __future__ import annotations

import hashlib
import re

LINK_NAME_MAX = 15

# CloudStack's own ids are database keys: decimal, and a Java long at most. Ten digits is what the names hold in full.
_ID = re.compile(r"(?:0|[1-9][0-9]{0,9})\Z")

# No x: a port whose name happened to contain "vxlan" would send CloudStack's KVM agent to another deletion script.
_DIGITS = "0123456789abcdefghijklmnopqrstuvwyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

UNTAGGED = "untagged"
VLAN_TAG_MAX = 4094  # IEEE 802.1Q: 0 and 4095 are reserved


def is_id(text: str) -> bool:
    """Whether ``text`` is a CloudStack id that names can be made from: decimal, no leading zero, ten digits at most."""
    return _ID.match(text) is not None


def scope_of(network_id: str, vpc_id: str) -> str:
    """The scope that a network, or a VPC, lives in: whatever shares a namespace. ``net-204`` or ``vpc-7``."""
    return f"vpc-{vpc_id}" if vpc_id else f"net-{network_id}"


def namespace(scope_id: str) -> str:
    """The network namespace of a scope: ``cs-net-204``, ``cs-vpc-7``."""
    return f"cs-{scope_id}"


def bridge(nic: str, vlan: str) -> str:
    """The bridge that carries ``vlan`` of ``nic``, named as CloudStack's KVM agent names it: ``breth1-1204``.

    ``untagged`` becomes tag 0, which no VLAN has. A name that would not fit is shortened to a digest; the
    KVM agent cannot make such a bridge either, so nobody else looks for it.
    """
    return _fit(f"br{nic}-{0 if vlan == UNTAGGED else vlan}", "br")


def vlan_link(nic: str, vlan: str) -> str:
    """The VLAN sub-interface of ``nic``: ``eth1.1204``."""
    return _fit(f"{nic}.{vlan}", "vl")


def vxlan_bridge(vni: str) -> str:
    """The bridge that carries a VXLAN segment, named as CloudStack's KVM agent names it: ``brvx-5001``."""
    return f"brvx-{vni}"


def vxlan_link(vni: str) -> str:
    """The tunnel of a VXLAN segment, named as CloudStack's KVM agent names it: ``vxlan5001``."""
    return f"vxlan{vni}"


def vxlan_group(vni: int) -> str:
    """The multicast group by which the ends of a VXLAN segment find each other, CloudStack's: 239 and the 24 bits."""
    return ".".join(str(octet) for octet in (239, *vni.to_bytes(3, "big")))


def guest_port(network_id: str) -> str:
    """Host side of a network's guest link: ``vnetg204``.

    ``vnet`` in the name keeps CloudStack's KVM agent from deleting the bridge under us; the letter after it
    keeps the name out of libvirt's own ``vnet<N>``. Ten digits fit in full, so no two networks share a name.
    """
    return f"vnetg{network_id}"


def public_port(scope_id: str, vlan: str) -> str:
    """Host side of a scope's link to a public VLAN: ``vnetpn204.101``, one per scope and VLAN.

    Where that does not fit, the same three facts as one number in base 61: different for all ids of ten
    digits and all tags up to 2**24, and never equal to a readable name, which has a dot.
    """
    kind, _, number = scope_id.partition("-")
    tag = 0 if vlan == UNTAGGED else int(vlan)
    readable = f"vnetp{kind[0]}{number}.{tag}"
    if len(readable) <= LINK_NAME_MAX:
        return readable
    packed = (int(number) << 25) | (tag << 1) | (kind == "vpc")
    digits = ""
    while packed:
        packed, digit = divmod(packed, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return f"vnetp{digits}"  # guard: a-host-port-has-every-digit


def guest_link(network_id: str) -> str:
    """Inside end of a network's guest link: ``gst-204``."""
    return f"gst-{network_id}"


def public_link(vlan: str) -> str:
    """Inside end of a scope's link to a public VLAN: ``pub-101``, ``pub-untagged``."""
    return f"pub-{vlan}"


def mac(owner: str, scope_id: str, link: str) -> str:
    """The MAC address of one of our links inside a scope's namespace.

    Derived, so that it is the same on whichever host the scope lives and a move needs no neighbour to
    relearn. First octet 0x0a: locally administered, unicast, and none of CloudStack's own (02, 06, 1e).
    """
    digest = hashlib.sha256(f"{owner}\n{scope_id}\n{link}".encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (0x0A, *digest[:5]))


def _fit(name: str, prefix: str) -> str:
    if len(name) <= LINK_NAME_MAX:  # guard: a-long-link-name-is-hashed
        return name
    return prefix + hashlib.sha256(name.encode()).hexdigest()[: LINK_NAME_MAX - len(prefix)]
