"""The part of the registration that is sent to agents, and the owner of its scopes."""

from __future__ import annotations

import os

from netloom.errors import one_line
from netloom.protocol.envelope import PhysicalDetails
from netloom.wire import Registration


def owner(details: PhysicalDetails, executable: str) -> str:
    """The owner of the scopes: the detail ``owner``, else ``<directory of the executable>/<physical network>``.

    CloudStack creates that directory for the extension, so the default differs between two extensions and usually
    between two CloudStacks, and neither uses the other's namespaces on a host. Symbolic links in the path are not
    resolved, because the name that CloudStack uses counts.
    """
    if details.owner:
        return str(details.owner)
    directory = os.path.basename(os.path.dirname(os.path.abspath(executable)))
    return one_line(f"{directory}/{details.physicalnetworkname}", 200)


def registration(details: PhysicalDetails, executable: str) -> Registration:
    """The registration as it is sent to agents: no hosts, no user name, no secret."""
    return Registration(
        owner=owner(details, executable),
        guest_nic=str(details.guest_nic),
        public_nic=str(details.public_nic),
        ingress_open=details.firewall == "absent",
        broadcast=str(details.broadcast or ""),
        isolation=str(details.isolation),
        ip6_gateway=str(details.public_ip6_gateway),
        ip6_address=str(details.public_ip6_address),
        lb_idle_s=int(details.lb_idle_timeout),
        lb_connections_max=int(details.lb_max_conn),
        conntrack_helpers=tuple(details.conntrack_helpers),
        conntrack_max_per_vm=int(details.conntrack_max_per_vm),
    )
