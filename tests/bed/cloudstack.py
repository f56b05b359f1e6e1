"""A fake CloudStack that calls the executable exactly as the real client does.

It keeps networks, addresses, rules and VMs as CloudStack's database does. It sends the same commands in the same order,
as read from the source of the client and of the orchestrator: a payload file in a temporary directory, the command line
``<path> <command> <file> 60``, and merged output read to end of file. It applies the client's ``status`` rule. It keeps
the details that ensure-network-device printed, passes them back, and deletes them when the client does.

    cloud = FakeCloudStack.on(bed.management)
    cloud.register(hosts=bed.hosts, **bed.login("root", by="key"))
    network = cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24", source_nat="203.0.113.20")
    web = network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
    address = network.associate("203.0.113.21")
    network.add_port_forward(address, "2222", web, "22")
    network.restart(cleanup=True)
    network.garbage_collect()
    network.delete()
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bed import payloads
from bed.machines import Execution
from bed.payloads import (
    ALL_SERVICES as ALL_SERVICES,
)
from bed.payloads import (
    GUEST_SERVICES,
    Backend,
    Fields,
    FirewallRule,
    LoadBalancerRule,
    NetworkFacts,
    Nic,
    PortForwardRule,
    PublicAddress,
    State,
    VirtualMachine,
)
from bed.payloads import (
    NAT_SERVICES as NAT_SERVICES,
)
from bed.payloads import (
    Offering as Offering,
)

if TYPE_CHECKING:
    from bed.lab import Host, Management

TIMEOUT_S = 60
CLOUD_UID = 1600
DETAILS_LENGTH_MAX = 1024

Run = Callable[[str, str, int], Execution]
"""Takes command, text of the payload file and timeout in seconds; returns the execution."""


class Failed(Exception):
    """CloudStack would report an error to its caller. ``execution`` is the failed execution."""

    def __init__(self, what: str, execution: Execution) -> None:
        super().__init__(f"{what}: exit status {execution.status}: {execution.output.strip()}")
        self.execution = execution


class UnreadableDetails(Exception):
    """The stored output of ensure-network-device is invalid JSON. Every later command of the network fails."""


def stored_details(whose: str, stored: str) -> dict[str, Any]:
    """``extension.details`` of a network or VPC as the client parses them; empty if unset. Raises UnreadableDetails."""
    if not stored:
        return {}
    try:
        parsed = json.loads(stored)
    except ValueError as error:
        raise UnreadableDetails(f"{whose}: {stored!r}") from error
    return parsed if isinstance(parsed, dict) else {}


class Hung(Exception):
    """The executable did not end, or a process kept its output open. The real client would lose a thread."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """One execution. ``ok`` follows the client's rule: exit status 0, and no ``status`` but success in the output."""

    command: str
    text: str
    execution: Execution
    ok: bool

    @property
    def payload(self) -> Fields:
        document: Fields = json.loads(self.text)
        return dict(document.get("payload", document))

    @property
    def output(self) -> str:
        return self.execution.output.strip()


class FakeCloudStack:
    """One CloudStack with one registration of the extension. ``history`` lists all executions in order.

    ``carried_out`` is the set of commands that have succeeded in any instance. ``timeout_s`` is the timeout argument of
    the executable, by default that of CloudStack. Tests with silent hosts set less.
    """

    carried_out: ClassVar[set[str]] = set()

    def __init__(self, run: Run) -> None:
        self._run = run
        self.timeout_s = TIMEOUT_S
        self.registration: dict[str, str] = {}
        self.history: list[Sent] = []
        self._ids = itertools.count(9000)

    @classmethod
    def on(
        cls,
        management: Management,
        *,
        program: Sequence[str] | Path | None = None,
        extension: str = "netloom",
        agent: str | None = None,
        home: Literal["set", "unset"] = "unset",
        patience_s: float = 100.0,
    ) -> FakeCloudStack:
        """A CloudStack that runs ``program`` on the bed's management server.

        The default program is the file named by NETLOOM_ONE_FILE, or else the sources. ``agent`` is the command of
        the agent on hosts: by default from source, and the program's own default when empty. Every call raises Hung
        when its program does not end within ``patience_s`` seconds.
        """
        from bed.lab import agent_command, program_from_source

        if program is None and agent is None and os.environ.get("NETLOOM_ONE_FILE"):
            program, agent = Path(os.environ["NETLOOM_ONE_FILE"]), ""  # it uploads itself to the hosts
        path = management.install(extension, program_from_source() if program is None else program)
        agent = agent_command() if agent is None else agent
        more = {"NETLOOM_AGENT": agent} if agent else {}
        environment = management.environment(home=home, **more)
        names = itertools.count(1)

        def run(command: str, text: str, timeout_s: int) -> Execution:
            # As by File.createTempFile with the default umask: every local user can read it.
            file = f"/tmp/cs-extnet-{command}-{id(names):x}{next(names):06d}.payload"
            management.write(file, text, mode=0o644, uid=CLOUD_UID)
            try:
                return management.execute(
                    [path, command, file, str(timeout_s)], environment=environment, patience_s=patience_s
                )
            finally:
                management.remove(file)

        return cls(run)

    # --- the extension's registration

    def register(
        self,
        *,
        hosts: Iterable[Host | str],
        physical_network: str = "Physical Network 1",
        guest_nic: str = "eth1",
        public_nic: str = "eth2",
        **details: str,
    ) -> FakeCloudStack:
        """registerExtension or updateRegisteredExtension: the details replace the previous ones.

        Without a standby, unless the details say so: a test of something else is shorter without one.

        Details with a dot in their name (``guest.isolation``) go through ``**{"guest.isolation": "vxlan"}``.
        """
        names = ",".join(host if isinstance(host, str) else host.address for host in hosts)
        nics = {"guest.network.device": guest_nic, "public.network.device": public_nic}
        chosen = {"hosts": names, "standby": "off", **{name: nic for name, nic in nics.items() if nic}, **details}
        self.registration = {**chosen, "physicalnetworkname": physical_network}
        return self

    def new_id(self) -> int:
        return next(self._ids)

    # --- executions

    def execute(self, command: str, details: Mapping[str, Any], payload: Fields) -> Sent:
        """Write the payload, run the executable and evaluate the result as the client does. Raises Hung."""
        return self.execute_text(command, payloads.envelope(self.registration, details, payload))

    def execute_text(self, command: str, text: str) -> Sent:
        """The same with a given text as payload file, also one that the client would not write."""
        execution = self._run(command, text, self.timeout_s)
        sent = Sent(command, text, execution, succeeded(execution))
        self.history.append(sent)
        if sent.ok:
            self.carried_out.add(command)
        if execution.hung:
            raise Hung(f"{command}: still {execution.hung} after {execution.seconds:.0f} s: {execution.output!r}")
        return sent

    def commands(self, since: int = 0) -> list[str]:
        """The commands sent, without the first ``since``."""
        return [sent.command for sent in self.history[since:]]

    # --- networks

    def isolated_network(
        self,
        network_id: int | str,
        *,
        vlan: int | str,
        cidr: str,
        source_nat: PublicAddress | str = "",
        offering: Offering = ALL_SERVICES,
        gateway: str = "",
        public_vlan: int | str = 101,
        reserved_ip: str = "",
    ) -> IsolatedNetwork:
        """createNetwork, which sends nothing. ``vlan`` is assigned by the zone at the next implement.

        A ``source_nat`` given as text is an address of ``public_vlan`` in a /24 whose first address is the gateway.
        """
        facts = NetworkFacts(
            str(network_id),
            cidr,
            gateway or payloads.first_address(cidr),
            offering=offering,
            reserved_ip=reserved_ip,
        )
        network = IsolatedNetwork(self, facts, str(vlan), public_vlan)
        if source_nat:
            network.source_nat = network.associate(source_nat)
            network.source_nat.source_nat = True
        return network


def succeeded(execution: Execution) -> bool:
    """The client's rule for every command: exit status 0, and no JSON object with a ``status`` other than success."""
    if execution.status != 0:
        return False
    try:
        document = json.loads(execution.output)
    except ValueError:
        return True
    if not isinstance(document, dict):
        return True
    status = document.get("status")
    return status is None or str(status).strip() == "" or str(status).strip().lower() == "success"


class IsolatedNetwork:
    """An isolated network in CloudStack's database, and the events of its life cycle."""

    rounds_before_forwards = False  # whether a restart of a living network has a round before its port forwards

    def __init__(self, cloud: FakeCloudStack, facts: NetworkFacts, vlan: str, public_vlan: int | str) -> None:
        self.cloud = cloud
        self.facts = facts
        self.whole_cidr = facts.cidr
        self.next_vlan = vlan
        self.public_vlan = public_vlan
        self.stored = ""  # extension.details as text; empty without a row
        self.source_nat: PublicAddress | None = None
        self.addresses: list[PublicAddress] = []
        self.nics: list[Nic] = []
        self.static_nats: list[tuple[PublicAddress, str]] = []
        self.port_forwards: list[PortForwardRule] = []
        self.firewall: list[FirewallRule] = []
        self.lb_rules: list[LoadBalancerRule] = []
        self.failures: list[Sent] = []
        # The client sends ensure-network-device before every command. Tests that do not check the sequence may send it
        # only while no details are stored. That halves the executions and has the same effect on the host.
        self.ensures_always = True

    # --- properties

    @property
    def offering(self) -> Offering:
        return self.facts.offering

    @property
    def details(self) -> dict[str, Any]:
        """The stored details as the client parses them. Raises UnreadableDetails."""
        return stored_details(f"network {self.facts.network_id}", self.stored)

    @property
    def host(self) -> str:
        """The host that ensure-network-device named last."""
        return str(self.details.get("host", ""))

    @property
    def namespace(self) -> str:
        return f"cs-net-{self.facts.network_id}"

    def _provides(self, *services: str) -> bool:
        return bool(self.offering.services & set(services))

    def _in_state(self, state: State) -> None:
        self.facts.state = state

    # --- changes of the network

    def reserve(self, cidr: str) -> None:
        """updateNetwork with ``guestvmcidr``, which sends nothing. The whole subnet takes a reservation back."""
        self.facts.cidr = cidr

    def change_source_nat(self, address: PublicAddress, *, shut_down: bool = True) -> None:
        """updateNetwork with ``sourcenatipaddress``: everything is removed and implemented again.

        Without ``shut_down`` as the client alone sends it, if the managers of CloudStack implement a living network.
        No command names the former address.
        """
        if shut_down:
            self._tear_down_rules()
            sent = self.send("shutdown-network", payloads.bare(self.facts))
            if not sent.ok:
                raise Failed("shutdown-network", sent.execution)
            self.stored = ""
        if self.source_nat is not None:
            self.source_nat.source_nat = False
        address.source_nat = True
        self.source_nat = address
        self._implement_elements()

    # --- single executions

    def custom_action(self, action: str, **params: str) -> str:
        """runCustomAction, without an ensure before it; returns ``details`` of the API's answer. Raises Failed.

        ``table_id="100"`` is the parameter ``table-id``.
        """
        told = {name.replace("_", "-"): value for name, value in params.items()}
        about = payloads.network(self.facts)
        text = payloads.custom_action(self.cloud.registration, self.details, about, action, told)
        sent = self.cloud.execute_text("custom-action", text)
        if not sent.ok:
            raise Failed("custom-action", sent.execution)
        return sent.output or "OK"

    def ensure(self) -> Sent:
        """ensure-network-device. On failure the client logs a warning and keeps the stored details."""
        details = self.details
        payload = payloads.ensure_network_device(self.facts, self.stored or "{}")
        sent = self.cloud.execute("ensure-network-device", details, payload)
        if not sent.ok:
            self.failures.append(sent)
            self.stored = self.stored or "{}"
        elif sent.output and sent.output != self.stored and len(sent.output) <= DETAILS_LENGTH_MAX:
            self.stored = sent.output
        return sent

    def send(self, command: str, payload: Fields) -> Sent:
        """Send ensure-network-device, then the command."""
        if self.ensures_always or not self.details:
            self.ensure()
        sent = self.cloud.execute(command, self.details, payload)
        if not sent.ok:
            self.failures.append(sent)
        return sent

    def send_or_fail(self, command: str, payload: Fields) -> Sent:
        """Like ``send``, where a failure is an error for the caller of CloudStack. Raises Failed."""
        sent = self.send(command, payload)
        if not sent.ok:
            raise Failed(command, sent.execution)
        return sent

    # --- implement, restart, shutdown, delete

    def implement(self) -> None:
        """Implement the network: allocated → implementing → implemented. On failure shut it down and raise Failed."""
        self.facts.vlan = self.next_vlan
        self._in_state("implementing")
        try:
            self._implement_elements()
        except Failed:
            # Some resources may exist, so CloudStack removes all of them and shuts the network down.
            self._in_state("shutdown")
            self._tear_down_rules()
            self._shut_down()
            raise
        self._in_state("implemented")

    def _implement_elements(self) -> None:
        self.ensure()
        self.send_or_fail("implement-network", payloads.implement_network(self.facts))
        if self.source_nat and self._provides("SourceNat"):
            self.send("assign-ip", payloads.public_ip(self.facts, self.source_nat))
        self._reprogram_rules()
        if self.nics and self._provides(*GUEST_SERVICES):
            by_guest = {ip: address.ip for address, ip in self.static_nats}
            self.send_or_fail("restore-network", payloads.restore_network(self.facts, self.nics, by_guest))

    def _reprogram_rules(self) -> None:
        """All rules. On a living network only load balancing brings rounds, so other rules precede their addresses."""
        implementing = self.facts.state == "implementing"
        ingress = [rule for rule in self.firewall if rule.address]
        if self._provides("Firewall"):
            self._send_firewall()
            if len(ingress) < len(self.firewall):
                self._send_firewall()
        if not all(self._has_firewall_rule(address) for address, _ in self.static_nats):
            for address, _ in self.static_nats:
                self.send_or_fail("assign-ip", payloads.public_ip(self.facts, address))
        for address, private_ip in self.static_nats:
            self.send_or_fail("add-static-nat", payloads.static_nat(self.facts, address, private_ip))
        if ingress and self._provides("Firewall"):
            self._assign_all(when=implementing)
            self._send_firewall()
            self._assign_all(when=implementing)
        if self.port_forwards:
            self._assign_all(when=implementing or self.rounds_before_forwards)
            for rule in self.port_forwards:
                self.send_or_fail("add-port-forward", payloads.port_forward(self.facts, rule))
            self._assign_all(when=implementing)
        if self.lb_rules:
            self._send_lb_rules(self.lb_rules)

    def restart(self, *, cleanup: bool = False, rolling: bool = True) -> None:
        """restartNetwork. With ``rolling`` (CloudStack's default) nothing is shut down, even with cleanup."""
        if cleanup and rolling:
            self.ensure()
            self.send_or_fail("implement-network", payloads.implement_network(self.facts))
            if self.source_nat and self._provides("SourceNat"):
                self.send("assign-ip", payloads.public_ip(self.facts, self.source_nat))
        elif cleanup:
            self._tear_down_rules()
            sent = self.send("shutdown-network", payloads.bare(self.facts))
            if not sent.ok:
                raise Failed("shutdown-network", sent.execution)
            self.stored = ""
        self._implement_elements()

    def garbage_collect(self) -> bool:
        """Shut the network down, as after some time without VMs. False when that failed and it stays implemented."""
        self._in_state("shutdown")
        self._tear_down_rules()
        return self._shut_down()

    def _shut_down(self) -> bool:
        sent = self.send("shutdown-network", payloads.bare(self.facts))
        if not sent.ok:
            self._in_state("implemented")
            return False
        self.stored = ""
        self.facts.vlan = ""
        self._in_state("allocated")
        return True

    def _tear_down_rules(self) -> None:
        """All rules are revoked, but only in memory. The database, and so the firewall list, keeps them."""
        self._tear_down_forwards()
        if self._provides("Firewall"):
            ingress = any(rule.address for rule in self.firewall)
            egress = any(not rule.address for rule in self.firewall)
            for _ in range(1 + ingress + egress):
                self.send("apply-fw-rules", payloads.fw_rules(self.facts, self.firewall))
        self._tear_down_addresses()

    def _tear_down_forwards(self) -> None:
        for rule in self.port_forwards:
            self.send("delete-port-forward", payloads.port_forward(self.facts, rule))
        if self.lb_rules:
            revoked = [dataclasses.replace(rule, revoke=True) for rule in self.lb_rules]
            self._send_lb_rules(revoked, send=self.send)

    def _tear_down_addresses(self) -> None:
        for address, private_ip in self.static_nats:
            self.send("delete-static-nat", payloads.static_nat(self.facts, address, private_ip))
            if self._has_firewall_rule(address):
                self.send("assign-ip", payloads.public_ip(self.facts, address))
        for address in self._in_use():
            self.send("release-ip", payloads.public_ip(self.facts, address))

    def delete(self) -> None:
        """deleteNetwork. Raises Failed when the device refused. It can be repeated."""
        if self.facts.state == "implemented":
            self.garbage_collect()
        self.static_nats, self.port_forwards, self.firewall, self.lb_rules = [], [], [], []
        self.send_or_fail("destroy-network", payloads.bare(self.facts))
        self.stored = ""

    # --- VMs

    def deploy_vm(
        self,
        name: str,
        *,
        ip: str,
        mac: str,
        password: str = "",
        vm: VirtualMachine | None = None,
        nic_id: int | None = None,
        device_id: int = 0,
    ) -> Nic:
        """Deploy a VM with a NIC in this network, and implement the network first if needed. Raises Failed."""
        nic = Nic(
            str(nic_id or self.cloud.new_id()),
            str(uuid.uuid4()),
            mac,
            ip,
            vm or VirtualMachine(name, str(uuid.uuid4())),
            netmask=payloads.netmask(self.whole_cidr),
            device_id=device_id,
            default=device_id == 0,
        )
        return self.add_nic(nic, password=password)

    def add_nic(self, nic: Nic, *, password: str = "") -> Nic:
        """The same with a given NIC."""
        self.nics.append(nic)
        return self.start_vm(nic, password=password)

    def start_vm(self, nic: Nic, *, password: str = "") -> Nic:
        """Start a VM, for the first time or again. Raises Failed."""
        if self.facts.state == "allocated":
            self.implement()
        self.send("prepare-nic", payloads.prepare_nic(self.facts, nic))
        if self._provides("Dhcp"):
            if self.offering.subnets:
                self.send_or_fail("config-dhcp-subnet", payloads.config_subnet(self.facts, nic))
            self.send_or_fail("add-dhcp-entry", payloads.add_dhcp_entry(self.facts, nic))
        if self._provides("Dns"):
            if not nic.ip6_address:
                self.send_or_fail("config-dns-subnet", payloads.config_subnet(self.facts, nic))
            self.send_or_fail("add-dns-entry", payloads.add_dns_entry(self.facts, nic))
        if self._provides("UserData"):
            public = next((address.ip for address, ip in self.static_nats if ip == nic.ip), "")
            self.send_or_fail(
                "save-vm-data", payloads.save_vm_data(self.facts, nic, static_nat_ip=public, password=password)
            )
        return nic

    def stop_vm(self, nic: Nic) -> None:
        self.send("release-nic", payloads.release_nic(self.facts, nic))

    def expunge_vm(self, nic: Nic) -> None:
        """Expunge the VM. The client never sends remove-dns-entry for it."""
        self.nics.remove(nic)
        if self._provides("Dhcp"):
            self.send("remove-dhcp-entry", payloads.remove_dhcp_entry(self.facts, nic))

    def reset_password(self, nic: Nic, password: str) -> None:
        self.send_or_fail("save-password", payloads.save_item(self.facts, nic, "password", password))

    def reset_ssh_key(self, nic: Nic, key: str) -> None:
        self.send_or_fail("save-sshkey", payloads.save_item(self.facts, nic, "sshkey", key))

    def reset_user_data(self, nic: Nic, user_data: str) -> None:
        self.send_or_fail("save-userdata", payloads.save_item(self.facts, nic, "userdata", user_data))

    # --- addresses and rules

    def associate(self, address: PublicAddress | str, *, vlan: int | str | None = None) -> PublicAddress:
        """associateIpAddress, which sends nothing."""
        if isinstance(address, str):
            net = address.rpartition(".")[0]
            tag = self.public_vlan if vlan is None else vlan
            address = PublicAddress(address, f"vlan://{tag}", f"{net}.1", f"{net}.0/24")
        self.addresses.append(address)
        return address

    def _is_implemented(self) -> bool:
        return self.facts.state == "implemented"

    def _rules_of(self, address: PublicAddress) -> int:
        rules: list[PublicAddress | None] = [each for each, _ in self.static_nats]
        rules += [rule.address for rule in self.port_forwards]
        rules += [rule.address for rule in self.firewall]
        rules += [rule.address for rule in self.lb_rules]
        return sum(each is address for each in rules)

    def _has_firewall_rule(self, address: PublicAddress) -> bool:
        return any(rule.address is address for rule in self.firewall)

    def _in_use(self) -> list[PublicAddress]:
        """The network's addresses with rules, and its source-NAT address."""
        return [address for address in self.addresses if address.source_nat or self._rules_of(address)]

    def _assign_all(self, *, when: bool = True, send: Callable[[str, Fields], Sent] | None = None) -> None:
        """A round: send assign-ip again for every address in use."""
        for address in self._in_use() if when else ():
            (send or self.send_or_fail)("assign-ip", payloads.public_ip(self.facts, address))

    def _first_rule(self, address: PublicAddress) -> None:
        """The round before the first port forward or firewall rule of an address."""
        if self._rules_of(address) == 1 and not address.source_nat:
            self._assign_all()

    def _last_rule(self, address: PublicAddress | None) -> None:
        """An address is released with its last rule, in the middle of a round over all others."""
        if address is None or address.source_nat or self._rules_of(address):
            return
        for each in self.addresses:
            if each is address:
                self.send_or_fail("release-ip", payloads.public_ip(self.facts, each))
            elif each in self._in_use():
                self.send_or_fail("assign-ip", payloads.public_ip(self.facts, each))

    def _send_lb_rules(
        self, rules: Sequence[LoadBalancerRule], *, send: Callable[[str, Fields], Sent] | None = None
    ) -> None:
        """All public rules of the network, changed or not, between two rounds."""
        self._assign_all(send=send)
        (send or self.send_or_fail)("apply-lb-rules", payloads.lb_rules(self.facts, rules))
        self._assign_all(send=send)

    def _send_firewall(self) -> None:
        self.send_or_fail("apply-fw-rules", payloads.fw_rules(self.facts, self.firewall))

    def add_port_forward(
        self,
        address: PublicAddress,
        public_ports: str | int,
        guest: Nic | str,
        private_ports: str | int = "",
        *,
        protocol: str = "tcp",
        open_firewall: bool = False,
    ) -> PortForwardRule:
        """createPortForwardingRule. Ports are ``22`` or ``8080-8090``; private ports default to the public ones."""
        ip = guest if isinstance(guest, str) else guest.ip
        private = str(private_ports or public_ports)
        rule = PortForwardRule(self.cloud.new_id(), address, str(public_ports), ip, private, protocol)
        self.port_forwards.append(rule)
        if self._is_implemented():
            self._first_rule(address)
            self.send_or_fail("add-port-forward", payloads.port_forward(self.facts, rule))
        if open_firewall:
            first, _, last = str(public_ports).partition("-")
            self.add_firewall_rule(address, protocol, int(first), int(last or first))
        return rule

    def delete_port_forward(self, rule: PortForwardRule) -> None:
        self.port_forwards.remove(rule)
        if self._is_implemented():
            self.send_or_fail("delete-port-forward", payloads.port_forward(self.facts, rule))
            self._last_rule(rule.address)

    def enable_static_nat(self, address: PublicAddress, guest: Nic | str) -> None:
        ip = guest if isinstance(guest, str) else guest.ip
        self.static_nats.append((address, ip))
        if self._is_implemented():
            if not self._has_firewall_rule(address):
                self.send_or_fail("assign-ip", payloads.public_ip(self.facts, address))
            self.send_or_fail("add-static-nat", payloads.static_nat(self.facts, address, ip))

    def disable_static_nat(self, address: PublicAddress) -> None:
        (ip,) = [guest for each, guest in self.static_nats if each is address]
        self.static_nats.remove((address, ip))
        if self._is_implemented():
            self.send_or_fail("delete-static-nat", payloads.static_nat(self.facts, address, ip))
            if not address.source_nat and not self._rules_of(address):
                self.send_or_fail("release-ip", payloads.public_ip(self.facts, address))

    def add_firewall_rule(
        self,
        address: PublicAddress,
        protocol: str,
        first_port: int | None = None,
        last_port: int | None = None,
        *,
        sources: Sequence[str] = ("0.0.0.0/0",),
        icmp_type: int | None = None,
        icmp_code: int | None = None,
    ) -> FirewallRule:
        """createFirewallRule (ingress)."""
        rule = FirewallRule(
            self.cloud.new_id(),
            protocol,
            address,
            first_port,
            last_port if last_port is not None else first_port,
            icmp_type,
            icmp_code,
            tuple(sources),
        )
        self.firewall.append(rule)
        if self._is_implemented():
            self._first_rule(address)
            self._send_firewall()
        return rule

    def add_egress_rule(
        self,
        protocol: str,
        first_port: int | None = None,
        last_port: int | None = None,
        *,
        sources: Sequence[str] = (),
        destinations: Sequence[str] = ("0.0.0.0/0",),
        icmp_type: int | None = None,
        icmp_code: int | None = None,
    ) -> FirewallRule:
        """createEgressFirewallRule. It denies when the offering allows egress by default, and allows otherwise."""
        rule = FirewallRule(
            self.cloud.new_id(),
            protocol,
            None,
            first_port,
            last_port if last_port is not None else first_port,
            icmp_type,
            icmp_code,
            tuple(sources) or (self.facts.cidr,),
            tuple(destinations),
        )
        self.firewall.append(rule)
        if self._is_implemented():
            self._send_firewall()
        return rule

    def delete_firewall_rule(self, rule: FirewallRule) -> None:
        self.firewall.remove(rule)
        if self._is_implemented():
            self._send_firewall()
            self._last_rule(rule.address)

    def add_lb_rule(
        self, address: PublicAddress, name: str, public_port: int, private_port: int, guests: Sequence[Nic]
    ) -> LoadBalancerRule:
        """createLoadBalancerRule and assignToLoadBalancerRule."""
        backends = [Backend(nic.ip, private_port) for nic in guests]
        rule = LoadBalancerRule(self.cloud.new_id(), name, address, public_port, private_port, backends=backends)
        self.lb_rules.append(rule)
        if self._is_implemented():
            self._send_lb_rules(self.lb_rules)
        return rule

    def delete_lb_rule(self, rule: LoadBalancerRule) -> None:
        self.lb_rules.remove(rule)
        if self._is_implemented():
            backends = [dataclasses.replace(each, revoked=True) for each in rule.backends]
            revoked = dataclasses.replace(rule, revoke=True, backends=backends)
            self._send_lb_rules([*self.lb_rules, revoked])
            self._last_rule(rule.address)

    def disassociate(self, address: PublicAddress) -> None:
        """disassociateIpAddress: revoke the rules of the address one by one, which ends in its release.

        Without rules nothing is sent.
        """
        for forward in [rule for rule in self.port_forwards if rule.address is address]:
            self.delete_port_forward(forward)
        for balanced in [rule for rule in self.lb_rules if rule.address is address]:
            self.delete_lb_rule(balanced)
        for rule in [rule for rule in self.firewall if rule.address is address]:
            self.delete_firewall_rule(rule)
        if any(each is address for each, _ in self.static_nats):
            self.disable_static_nat(address)
        self.addresses.remove(address)
