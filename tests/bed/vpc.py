"""A VPC in CloudStack's database, its tiers, and the executions of their events (tests/payloads/2*)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bed import payloads
from bed.cloudstack import DETAILS_LENGTH_MAX, Failed, FakeCloudStack, IsolatedNetwork, Sent, stored_details
from bed.payloads import AclItem, Fields, NetworkFacts, Offering, PublicAddress, VpcFacts

TIER_SERVICES = Offering.of(
    "SourceNat", "StaticNat", "PortForwarding", "NetworkACL", "Lb", "Dhcp", "Dns", "UserData", "CustomAction"
)


class Vpc:
    """``source_nat`` is chosen at the creation of the VPC, or allocated when the first tier is implemented."""

    def __init__(self, cloud: FakeCloudStack, facts: VpcFacts, public_vlan: int | str = 101) -> None:
        self.cloud = cloud
        self.facts = facts
        self.public_vlan = public_vlan
        self.stored = ""  # extension.details of vpc_details as text; empty without a row
        self.source_nat: PublicAddress | None = None
        self.tiers: list[Tier] = []
        self.failures: list[Sent] = []

    @property
    def details(self) -> dict[str, Any]:
        """The stored details as the client parses them. Raises UnreadableDetails."""
        return stored_details(f"VPC {self.facts.vpc_id}", self.stored)

    @property
    def host(self) -> str:
        return str(self.details.get("host", ""))

    @property
    def namespace(self) -> str:
        return f"cs-vpc-{self.facts.vpc_id}"

    # --- single executions

    def ensure(self) -> Sent:
        """ensure-network-device for the VPC. Its tiers send none of their own."""
        payload = payloads.ensure_vpc_device(self.facts, self.stored or "{}")
        sent = self.cloud.execute("ensure-network-device", self.details, payload)
        if not sent.ok:
            self.failures.append(sent)
            self.stored = self.stored or "{}"
        elif sent.output and sent.output != self.stored and len(sent.output) <= DETAILS_LENGTH_MAX:
            self.stored = sent.output
        return sent

    def send_or_fail(self, command: str, payload: Fields) -> Sent:
        """Send the command without an ensure before it. Raises Failed."""
        sent = self.cloud.execute(command, self.details, payload)
        if not sent.ok:
            self.failures.append(sent)
            raise Failed(command, sent.execution)
        return sent

    def custom_action(self, action: str, **params: str) -> str:
        """runCustomAction on the VPC. Raises Failed."""
        told = {name.replace("_", "-"): value for name, value in params.items()}
        text = payloads.custom_action(self.cloud.registration, self.details, payloads.vpc(self.facts), action, told)
        sent = self.cloud.execute_text("custom-action", text)
        if not sent.ok:
            raise Failed("custom-action", sent.execution)
        return sent.output or "OK"

    # --- events

    def implement(self) -> None:
        """createVPC with start; also the last step of every restart. Raises Failed."""
        self.ensure()
        self.send_or_fail("implement-vpc", payloads.vpc(self.facts, self.source_nat))

    def restart(self, *, cleanup: bool = False, rolling: bool = True) -> None:
        """restartVPC. Tiers are not implemented again. A non-rolling cleanup destroys implemented tiers."""
        if cleanup and not rolling:
            for tier in self.tiers:
                tier.send_or_fail("destroy-network", payloads.bare(tier.facts))
            self.send_or_fail("shutdown-vpc", payloads.vpc(self.facts))
            self.stored = ""
        self.implement()

    def change_source_nat(self, address: PublicAddress, *, restart: bool = True) -> None:
        """updateVPC with another source-NAT address. The old one becomes an ordinary address, and the VPC restarts."""
        if self.source_nat is not None:
            self.source_nat.source_nat = False
        address.source_nat = True
        self.source_nat = address
        self.send_or_fail("update-vpc-source-nat-ip", payloads.vpc(self.facts, address))
        if restart:
            self.implement()

    def delete(self) -> None:
        """deleteVPC, after its tiers. Its addresses get no release-ip. Raises Failed; then it can be repeated."""
        self.facts.state = "inactive"
        for tier in self.tiers:
            tier.send("destroy-network", payloads.bare(tier.facts))
        self.send_or_fail("shutdown-vpc", payloads.vpc(self.facts))
        self.stored = ""

    def add_tier(
        self, network_id: int | str, *, vlan: int | str, cidr: str, offering: Offering = TIER_SERVICES
    ) -> Tier:
        """createNetwork in the VPC, which sends nothing."""
        facts = NetworkFacts(
            str(network_id), cidr, payloads.first_address(cidr), vpc_id=self.facts.vpc_id, offering=offering
        )
        tier = Tier(self, facts, str(vlan))
        self.tiers.append(tier)
        return tier

    def associate(self, ip: str) -> PublicAddress:
        """Associate an address with the VPC. No tier uses it yet."""
        net = ip.rpartition(".")[0]
        return PublicAddress(ip, f"vlan://{self.public_vlan}", f"{net}.1", f"{net}.0/24")


class Tier(IsolatedNetwork):
    """A tier: an isolated network on the device of its VPC. ``acl`` is None until an ACL is chosen."""

    rounds_before_forwards = True

    def __init__(self, vpc: Vpc, facts: NetworkFacts, vlan: str) -> None:
        super().__init__(vpc.cloud, facts, vlan, vpc.public_vlan)
        self.vpc = vpc
        self.acl: list[AclItem] | None = None

    @property
    def details(self) -> dict[str, Any]:
        return self.vpc.details

    @property
    def namespace(self) -> str:
        return self.vpc.namespace

    def ensure(self) -> Sent:
        return self.vpc.ensure()

    def _implement_elements(self) -> None:
        self.ensure()
        self.send_or_fail("implement-network", payloads.implement_network(self.facts))
        if self.vpc.source_nat is not None:
            # The address belongs to the VPC and is sent with each tier.
            self.send("assign-ip", payloads.public_ip(self.facts, self.vpc.source_nat))
        self._reprogram_rules()
        if self.acl is not None:
            self.send_or_fail("apply-network-acl", payloads.acl_rules(self.facts, self.acl))
        if self.nics and self._provides(*payloads.GUEST_SERVICES):
            by_guest = {ip: address.ip for address, ip in self.static_nats}
            self.send_or_fail("restore-network", payloads.restore_network(self.facts, self.nics, by_guest))

    def _shut_down(self) -> bool:
        shut = super()._shut_down()
        self.stored = ""
        return shut

    def _tear_down_rules(self) -> None:
        """As for an isolated network, and with an empty ACL. The VPC's own address is not released with a tier."""
        if self.port_forwards:
            self._assign_all(send=self.send)
        self._tear_down_forwards()
        if self.acl is not None:
            self.send("apply-network-acl", payloads.acl_rules(self.facts, []))
        self._tear_down_addresses()

    def _in_use(self) -> list[PublicAddress]:
        return [address for address in super()._in_use() if address is not self.vpc.source_nat]

    def replace_acl(self, items: Sequence[AclItem]) -> None:
        """replaceNetworkACLList, or a change of an item: send the complete new ACL. Raises Failed."""
        self.acl = list(items)
        if self.facts.state == "implemented":
            self.send_or_fail("apply-network-acl", payloads.acl_rules(self.facts, self.acl))

    def delete(self) -> None:
        """deleteNetwork of a tier. The VPC's details are kept."""
        super().delete()
        self.vpc.tiers.remove(self)
