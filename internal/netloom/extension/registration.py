"""What the agent may know of the operator's registration, and whose the scopes are."""

from __future__ import annotations

import os

from netloom.errors import one_line
from netloom.protocol.envelope import PhysicalDetails
from netloom.wire import Registration


def owner(details: PhysicalDetails, executable: str) -> str:
    """Whose scopes these are: the detail ``owner``, else ``<directory of the executable>/<physical network>``.

    The directory is the one that CloudStack made for the extension, so that two extensions, and two CloudStacks that
    name them differently, do not take each other's namespaces on a host for their own. The path is not resolved: what
    the operator linked is still named as CloudStack named it.
    """
    if details.owner:
        return str(details.owner)
    directory = os.path.basename(os.path.dirname(os.path.abspath(executable)))
    return one_line(f"{directory}/{details.physicalnetworkname}", 200)


def registration(details: PhysicalDetails, executable: str) -> Registration:
    """The registration as it crosses the wire: no host, no user, no secret."""
    return Registration(
        owner=owner(details, executable),
        guest_nic=str(details.guest_nic),
        public_nic=str(details.public_nic),
        ingress_open=details.firewall == "absent",
        broadcast=str(details.broadcast or ""),
        isolation=str(details.isolation),
        ip6_gateway=str(details.public_ip6_gateway),
        ip6_address=str(details.public_ip6_address),
    )
