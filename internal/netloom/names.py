"""Names that netloom gives to objects on a host, and the ids they are made from. Pure functions.

Names that other programs rely on do not change (protocol section 4): the namespaces ``cs-net-<id>`` and
``cs-vpc-<id>``, the bridges ``br<nic>-<vlan>`` and their ports ``<nic>.<vlan>``. The name of a kernel link has at most
15 bytes (IFNAMSIZ, linux/if.h).
"""

from __future__ import annotations

import hashlib
import re

LINK_NAME_MAX = 15

# A CloudStack id: a database key, in decimal without leading zeros. Ids may grow to a Java long; link names have room
# for ten digits.
ID = re.compile(r"(?:0|[1-9][0-9]{0,9})\Z")

# Without x: for a port whose name contains "vxlan", CloudStack's KVM agent runs another deletion script.
_DIGITS = "0123456789abcdefghijklmnopqrstuvwyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Conntrack helpers that a registration may name. The kernel has others: netbios-ns and snmp work for broadcasts of the
# host itself only. With h323 (call forwarding) the far end may announce a connection to a third machine.
CONNTRACK_HELPERS = ("amanda", "ftp", "irc", "pptp", "sane", "sip", "tftp")

UNTAGGED = "untagged"
VXLAN = "vx"  # before the number of a VXLAN, where a VLAN could stand too: "vx1000"
VLAN_TAG_MAX = 4094  # IEEE 802.1Q: 0 and 4095 are reserved


def scope_of(network_id: str, vpc_id: str) -> str:
    """The scope of a network: all that shares one namespace. ``vpc-7`` if the network is a tier, else ``net-204``."""
    return f"vpc-{vpc_id}" if vpc_id else f"net-{network_id}"


def namespace(scope_id: str) -> str:
    """The network namespace of a scope: ``cs-net-204``, ``cs-vpc-7``."""
    return f"cs-{scope_id}"


def bridge(nic: str, vlan: str) -> str:
    """The bridge that carries ``vlan`` of ``nic``, named as CloudStack's KVM agent names it: ``breth1-1204``.

    ``untagged`` becomes tag 0, which no VLAN has. A name that is too long is replaced by a digest. The KVM agent cannot
    create a bridge with such a name either, so no other program looks for it.
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


def carrier_of(bridge_name: str) -> str:
    """The VLAN link or tunnel below a bridge with the name that the KVM agent gives it; empty for another name.

    It is empty, too, where the names contain a digest.
    """
    nic, _, number = bridge_name.removeprefix("br").rpartition("-")
    if not number.isdecimal() or not bridge_name.startswith("br"):
        return ""
    if bridge_name == vxlan_bridge(number):
        return vxlan_link(number)
    return vlan_link(nic, number) if bridge_name == bridge(nic, number) else ""


def vxlan_group(vni: int) -> str:
    """The multicast group of a VXLAN segment, as in CloudStack: 239, and the 24 bits of the VNI."""
    return ".".join(str(octet) for octet in (239, *vni.to_bytes(3, "big")))


HOST_PORTS = ("vnetg", "vnetp", "vnetx")  # how the names of guest_port and public_port begin


def guest_port(network_id: str) -> str:
    """The host end of a network's guest link: ``vnetg204``.

    CloudStack's KVM agent does not delete a bridge that has a port with ``vnet`` in its name. The letter after it
    avoids a clash with libvirt's ``vnet<N>``. An id of ten digits fits, so no two networks share a name.
    """
    return f"vnetg{network_id}"


def public_port(scope_id: str, vlan: str) -> str:
    """The host end of a scope's link to a public VLAN: ``vnetpn204.101``, one per scope and VLAN.

    That of a public VXLAN is ``vnetxn204.1000``.

    If that is too long, the kind, id and tag are packed into one number in base 61. It is unique for all ids of ten
    digits and all tags up to 2**24, and differs from every readable name, because those contain a dot.
    """
    kind, _, number = scope_id.partition("-")
    tag = 0 if vlan == UNTAGGED else int(vlan.removeprefix(VXLAN))
    prefix = "vnetx" if vlan.startswith(VXLAN) else "vnetp"
    readable = f"{prefix}{kind[0]}{number}.{tag}"
    if len(readable) <= LINK_NAME_MAX:
        return readable
    packed = (int(number) << 25) | (tag << 1) | (kind == "vpc")
    digits = ""
    while packed:
        packed, digit = divmod(packed, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return f"{prefix}{digits}"  # guard: a-host-port-has-every-digit


def guest_link(network_id: str) -> str:
    """The namespace end of a network's guest link: ``gst-204``."""
    return f"gst-{network_id}"


def public_link(vlan: str) -> str:
    """The namespace end of a scope's link to a public VLAN: ``pub-101``, ``pub-untagged``, ``pub-vx1000``."""
    return f"pub-{vlan}"


def mac(owner: str, scope_id: str, link: str) -> str:
    """The MAC address of one of our links inside a scope's namespace.

    It is derived, so that it is the same on every host and neighbours keep their ARP entries when the scope moves. The
    first octet is 0x0a: locally administered, unicast, and not one of CloudStack's (02, 06, 1e).
    """
    digest = hashlib.sha256(f"{owner}\n{scope_id}\n{link}".encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (0x0A, *digest[:5]))


def _fit(name: str, prefix: str) -> str:
    if len(name) <= LINK_NAME_MAX:  # guard: a-long-link-name-is-hashed
        return name
    return prefix + hashlib.sha256(name.encode()).hexdigest()[: LINK_NAME_MAX - len(prefix)]
