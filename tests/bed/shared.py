"""A shared network in CloudStack's database with DHCP, DNS and user data (tests/payloads/3*)."""

from __future__ import annotations

from bed import payloads
from bed.cloudstack import FakeCloudStack, IsolatedNetwork
from bed.payloads import NetworkFacts, Nic, Offering

SHARED_SERVICES = Offering.of("Dhcp", "Dns", "UserData")


class SharedNetwork(IsolatedNetwork):
    """``device_ip`` is the address that CloudStack reserves for the device. The gateway is an external router."""

    def __init__(
        self, cloud: FakeCloudStack, network_id: int | str, *, vlan: int | str, cidr: str, device_ip: str
    ) -> None:
        facts = NetworkFacts(
            str(network_id),
            cidr,
            payloads.first_address(cidr),
            vlan=str(vlan),
            state="setup",
            guest_type="shared",
            domain="shared.example.internal",
            offering=SHARED_SERVICES,
            reserved_ip=device_ip,
        )
        super().__init__(cloud, facts, str(vlan), "untagged")

    def start_vm(self, nic: Nic, *, password: str = "") -> Nic:
        """Start a VM. The first VM causes the first command of the network. Raises Failed."""
        if not self.details:
            self.ensure()
        return super().start_vm(nic, password=password)

    def expunge_vm(self, nic: Nic) -> None:
        """Expunge the VM. The last one of its range also removes the names of the range."""
        super().expunge_vm(nic)
        self.send("release-nic", payloads.release_nic(self.facts, nic))
        if not self.nics:
            self.send("remove-dns-subnet", payloads.subnet(self.facts))

    def restart(self, *, cleanup: bool = False, rolling: bool = True) -> None:
        """restartNetwork, the only event that sends implement-network for a shared network."""
        self.ensure()
        self.send_or_fail("implement-network", payloads.implement_network(self.facts))
        self.send_or_fail("restore-network", payloads.restore_network(self.facts, self.nics, {}))

    def delete(self) -> None:
        """deleteNetwork. A shared network was not implemented, so it is not shut down. Raises Failed."""
        self.send_or_fail("destroy-network", payloads.bare(self.facts))
        self.stored = ""
