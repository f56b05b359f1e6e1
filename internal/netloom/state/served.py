"""What the processes of a network give to its VMs and to clients outside."""

from __future__ import annotations

from typing import Literal

# "advertisements": of routers, by which VMs get their IPv6 addresses.
Served = Literal["dhcp", "metadata", "dns", "advertisements", "balancing"]
