"""``make demo``: the life cycle of an isolated network with two VMs. Each step is printed and proved with packets.

Two simulated hosts, a management server and an internet are made of namespaces. A fake CloudStack controls netloom over
real SSH. Nothing remains at the end. The exit status is 1 when a statement was false.
"""

from __future__ import annotations

import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable

from bed import Bed, faults
from bed.cloudstack import FakeCloudStack, IsolatedNetwork
from bed.lab import Host, Internet, Vm, agent_command, difference
from bed.machines import until
from bed.observer import Observer, outage
from bed.operator import Operator
from bed.payloads import LoadBalancerRule, Nic
from bed.standby import STATIC_NAT, StandbyBed, standby_bed

OUTSIDE = "198.51.100.1"
SOON = {"timeout_s": 0.5}

EVENT, SENT, PROOF = 34, 25, 52


class Show:
    """Prints the rows of the table and collects failures."""

    def __init__(self, cloud: FakeCloudStack) -> None:
        self._cloud = cloud
        self._colour = sys.stdout.isatty()
        self._seen = 0
        self.proofs = 0
        self.failed: list[str] = []

    def forget(self) -> None:
        """Leave the executions so far out of the table."""
        self._seen = len(self._cloud.history)

    def chapter(self, title: str) -> None:
        print(f"\n{self._bold(title)}")
        print(f"  {'in CloudStack':<{EVENT}}  {'netloom ran':<{SENT}}  {'proved with packets'}")
        print(f"  {'-' * EVENT}  {'-' * SENT}  {'-' * PROOF}")

    def step(self, event: str, *proofs: tuple[str, bool]) -> None:
        """Print a row: the event, the executions since the last row, and the statements with their results."""
        sent = self._cloud.history[self._seen :]
        self._seen = len(self._cloud.history)
        commands = Counter(each.command for each in sent)
        names = [f"{name} x{count}" if count > 1 else name for name, count in commands.items()]
        seconds = sum(each.execution.seconds for each in sent)
        total = [f"({len(sent)} in {seconds:.1f} s)"] if sent else []
        for each in sent:
            if not each.ok:
                self.failed.append(f"{event}: {each.command}: {each.output}")
        told = []
        for text, true in proofs:
            self.proofs += 1
            if not true:
                self.failed.append(f"{event}: {text}")
            lines = textwrap.wrap(text, PROOF - 5)
            told.append((self._mark(true), lines[0]))
            told += [("    ", line) for line in lines[1:]]
        self._rows(textwrap.wrap(event, EVENT), [*names, *total], told)

    def _rows(self, event: list[str], sent: list[str], told: list[tuple[str, str]]) -> None:
        for index in range(max(len(event), len(sent), len(told))):
            left = event[index] if index < len(event) else ""
            middle = sent[index] if index < len(sent) else ""
            mark, right = told[index] if index < len(told) else ("", "")
            print(f"  {left:<{EVENT}}  {middle:<{SENT}}  {mark} {right}".rstrip())
        sys.stdout.flush()

    def _mark(self, true: bool) -> str:
        if not self._colour:
            return "yes " if true else "NO  "
        return "\033[32myes \033[0m" if true else "\033[31mNO  \033[0m"

    def _bold(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self._colour else text


def main() -> int:
    """Run the demo; returns the exit status."""
    started = time.monotonic()
    print("netloom: an isolated network of Apache CloudStack on two simulated KVM hosts")
    with Bed(hosts=2, vlans=[1204], public_vlans=[101]) as bed:
        internet = bed.internet(vlan=101, address="203.0.113.1/24", also=[f"{OUTSIDE}/32"])
        cloud = FakeCloudStack.on(bed.management)
        cloud.register(hosts=bed.hosts, **bed.login("root", by="password"))
        hosts = " and ".join(f"{host.name} ({host.address})" for host in bed.hosts)
        print(f"{hosts} accept SSH after {time.monotonic() - started:.1f} s. netloom is not running there yet.")
        failed, proofs = _life(Show(cloud), bed, cloud, internet)
    print("\nThe same on three hosts that stand by for each other; the VMs run on a fourth one")
    with standby_bed(details={"standby": "auto"}) as it:
        show = Show(it.cloud)
        _take_over(show, it)
        failed += show.failed
        proofs += show.proofs
    print()
    for each in failed:
        print(f"FAILED: {each}")
    verdict = f"{len(failed)} of them failed" if failed else "all of them hold"
    print(f"{proofs} statements proved with packets, {verdict}, in {time.monotonic() - started:.0f} s.")
    return 1 if failed else 0


def _life(show: Show, bed: Bed, cloud: FakeCloudStack, internet: Internet) -> tuple[list[str], int]:
    network = cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24", source_nat="203.0.113.20")
    # This call queries every candidate host, so from here on an agent runs on both hosts.
    network.ensure()
    before = [_objects(host) for host in bed.hosts]
    show.forget()

    show.chapter("First VMs")
    one = network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
    host = next(each for each in bed.hosts if each.address == network.host)
    web = _plug(host, network, one)
    with internet.serve_tcp(80):
        show.step(
            "first VM, web-1 (10.10.1.45)",
            ("web-1 pings its gateway 10.10.1.1", web.ping("10.10.1.1").ok),
            (f"web-1 reaches {OUTSIDE}:80, which sees 203.0.113.20", web.tcp(OUTSIDE, 80).saw == "203.0.113.20"),
            ("203.0.113.20 accepts no new connections", not internet.tcp("203.0.113.20", 22, **SOON).ok),
        )
        two = network.deploy_vm("db-1", ip="10.10.1.162", mac="02:01:00:cc:00:04")
        other = next(each for each in bed.hosts if each is not host)
        database = _plug(other, network, two)
        show.step(
            f"second VM, db-1, on {other.name}",
            ("web-1 and db-1 reach each other across the hosts", web.ping("10.10.1.162").ok),
            (f"db-1 reaches {OUTSIDE}:80 from the other host", database.tcp(OUTSIDE, 80).saw == "203.0.113.20"),
        )

    with web.serve_tcp(22, 8080, 8085, 8090), database.serve_tcp(22, 5432):
        _forwards(show, network, internet, web, one)
        _static_nat(show, network, internet, database, web, two)
        _restart(show, network, internet)
        _services(show, network, web, one, database)
        rule = _balance(show, network, internet, one, two)
        print(_picture(network, host, other))

        _maintenance(show, bed, network, internet, host, other)

    show.chapter("A power cut")
    host.power_cut()
    host.boot()
    host.sh(f"{agent_command()} serve --log /var/log/netloom/agent.log </dev/null >/dev/null 2>&1 &")
    # The agent starts before libvirt starts VMs, as its systemd unit ensures on a real host.
    until(lambda: host.run("ip", "link", "show", "vnetg204", check=False).status == 0, seconds=30)
    web = _plug(host, network, one)
    leased = until(lambda: "obtained" in _lease(web), seconds=30)
    with internet.serve_tcp(80), web.serve_tcp(22, 8080), database.serve_tcp(22):
        spread = until(lambda: _balanced_answers(internet) == {"web-1": 3, "db-1": 3}, seconds=30)
        show.step(
            f"{host.name} loses power and boots",
            ("udhcpc: web-1 gets its lease again without CloudStack", leased),
            (f"dig: db-1.{network.facts.domain} is 10.10.1.162", _dig(web, f"db-1.{network.facts.domain}") == two.ip),
            ("curl: metadata is available", _get(web, "/latest/meta-data/local-hostname") == "web-1"),
            (f"web-1 reaches {OUTSIDE}:80", web.tcp(OUTSIDE, 80).saw == "203.0.113.20"),
            ("203.0.113.21:8080 reaches web-1", internet.tcp("203.0.113.21", 8080).server == "web-1"),
            ("203.0.113.23:2200 is balanced: three and three", spread),
        )
        network.delete_lb_rule(rule)
        show.step(
            "the balancing rule is deleted",
            ("the port is closed", not internet.tcp("203.0.113.23", 2200, **SOON).ok),
        )

    show.chapter("Deletion")
    if other is not host:
        database.destroy()
    web.destroy()
    network.delete()
    nothing_left = until(
        lambda: all(difference(was, _objects(each)) == {} for was, each in zip(before, bed.hosts, strict=True))
    )
    show.step(
        "the network is deleted",
        ("no process, namespace, link, route, rule, file or flow is left", nothing_left),
        ("ARP requests for 203.0.113.20 are not answered", internet.who_has("203.0.113.20") == []),
    )
    return show.failed, show.proofs


def _plug(host: Host, network: IsolatedNetwork, nic: Nic) -> Vm:
    """Start the VM on the bridge of the network's VLAN, as CloudStack's KVM agent does."""
    return host.vm(nic.vm.name, vlan=network.facts.vlan, mac=nic.mac, ip=f"{nic.ip}/24", gateway="10.10.1.1")


def _forwards(show: Show, network: IsolatedNetwork, internet: Internet, web: Vm, nic: Nic) -> None:
    show.chapter("Port forwards and the firewall")
    address = network.associate("203.0.113.21")
    ssh = network.add_port_forward(address, 2222, nic, 22)
    show.step(
        "forward 203.0.113.21:2222 to web-1:22",
        ("closed without a firewall rule", not internet.tcp("203.0.113.21", 2222, **SOON).ok),
    )
    rule = network.add_firewall_rule(address, "tcp", 2222)
    answer = internet.tcp("203.0.113.21", 2222)
    show.step(
        "firewall rule: tcp 2222",
        ("203.0.113.21:2222 is answered by web-1", answer.server == "web-1"),
        ("web-1 sees the client's own address", answer.saw == "203.0.113.1"),
    )
    network.add_port_forward(address, "8080-8090", nic, open_firewall=True)
    ports = [internet.tcp("203.0.113.21", port).port for port in (8080, 8085, 8090)]
    show.step(
        "forward the range 8080-8090 one to one",
        ("8080, 8085 and 8090 reach 8080, 8085 and 8090", ports == [8080, 8085, 8090]),
        ("hairpin: web-1 reaches itself through 203.0.113.21", web.tcp("203.0.113.21", 8080).server == "web-1"),
    )
    with internet.open("203.0.113.21", 8080) as kept, internet.open("203.0.113.21", 2222) as cut:
        network.delete_firewall_rule(rule)
        still, ended = kept.ask(), cut.ask(timeout_s=0.5)
        show.step(
            "the rule for 2222 is deleted",
            ("an open connection to 2222 ends", ended != "answered"),
            ("an open connection to 8080 stays open", still == "answered"),
            ("2222 accepts no new connections", not internet.tcp("203.0.113.21", 2222, **SOON).ok),
        )
    network.delete_port_forward(ssh)


def _static_nat(show: Show, network: IsolatedNetwork, internet: Internet, database: Vm, web: Vm, nic: Nic) -> None:
    show.chapter("Static NAT and egress rules")
    address = network.associate("203.0.113.22")
    network.enable_static_nat(address, nic)
    with internet.serve_tcp(80, 25):
        show.step(
            "static NAT 203.0.113.22 for db-1",
            ("db-1 uses 203.0.113.22 instead of source NAT", database.tcp(OUTSIDE, 80).saw == "203.0.113.22"),
            ("closed without a firewall rule", not internet.tcp("203.0.113.22", 5432, **SOON).ok),
        )
        network.add_firewall_rule(address, "tcp", 5432, sources=["203.0.113.0/24"])
        outside = internet.tcp("203.0.113.22", 5432, source=OUTSIDE, **SOON)
        show.step(
            "firewall rule: tcp 5432 for 203.0.113.0/24",
            ("203.0.113.1 reaches db-1:5432", internet.tcp("203.0.113.22", 5432).server == "db-1"),
            (f"{OUTSIDE} does not: its address is not in the rule", not outside.ok),
        )
        network.add_egress_rule("tcp", 25)
        show.step(
            "egress rule: no mail (tcp 25)",
            ("web-1 cannot send mail", not web.tcp(OUTSIDE, 25, **SOON).ok),
            ("web-1 still reaches port 80", web.tcp(OUTSIDE, 80).ok),
        )


def _restart(show: Show, network: IsolatedNetwork, internet: Internet) -> None:
    show.chapter("A restart with cleanup, under load")
    transfer = internet.transfer("203.0.113.21", 8080, seconds=60)
    network.restart(cleanup=True)
    moved = transfer.stop()
    show.step(
        "the network is restarted with cleanup",
        (f"a transfer continued without loss: {moved.echoed >> 10} KiB", moved.failure == "" and moved.intact),
        ("203.0.113.21:8085 answers", internet.tcp("203.0.113.21", 8085).ok),
    )


def _maintenance(show: Show, bed: Bed, network: IsolatedNetwork, internet: Internet, host: Host, other: Host) -> None:
    """Empty the host of the network while a client downloads, and move the network back."""
    show.chapter("A host is emptied for maintenance, in the middle of a download")
    operator = Operator(bed)
    transfer = internet.transfer("203.0.113.21", 8080, seconds=120)
    drained = operator.run("drain", host.address, check=False)
    time.sleep(1)  # of the download, on the other host
    went = transfer.stop()
    network.ensure()
    gone = not any("cs-net-204" in it for it in host.objects()["namespaces"])
    show.step(
        f"operator: netloom drain {host.name}",
        (f"{other.name} serves the network, and {host.name} has nothing of it", network.host == other.address and gone),
        (
            f"the download went on: {went.echoed >> 10} KiB without loss, longest pause {went.stall_s * 1000:.0f} ms",
            drained.status == 0 and went.failure == "" and went.intact,
        ),
        ("203.0.113.21:8080 reaches web-1, which stayed where it was", internet.tcp("203.0.113.21", 8080).ok),
    )
    print(textwrap.indent(drained.out, "  | "))
    operator.run("undrain", host.address)
    operator.run("move", "net-204", "--to", host.address)
    network.ensure()
    show.step(
        f"operator: netloom undrain {host.name}, move net-204",
        (f"{host.name} serves the network again", network.host == host.address),
        ("203.0.113.21:8080 reaches web-1", internet.tcp("203.0.113.21", 8080).server == "web-1"),
    )


def _take_over(show: Show, it: StandbyBed) -> None:
    """Cut the power of the active host in the middle of a download."""
    ready = until(it.is_ready, seconds=60)
    active, standby = it.active, it.standby
    show.forget()
    show.chapter("The active host loses power, in the middle of a download")
    with it.vm.serve_tcp(8080), it.observer() as observer:
        transfer = it.internet.transfer(STATIC_NAT, 8080, seconds=120)
        time.sleep(2)
        active.power_cut()
        observer.wait_for(standby)
        time.sleep(2)  # of the download, on the other host
        went, outage_s = transfer.stop(), outage(observer)
        never = turns_of(observer) == [active.name, standby.name]
    followed = it.network.ensure().ok and it.active is standby
    show.step(
        f"{active.name} loses power; {standby.name} stood by",
        (f"{standby.name} answers ARP {outage_s:.2f} s after the last answer of {active.name}", ready),
        ("never two hosts answered", never),
        (
            f"the download went on: {went.echoed >> 10} KiB without loss, longest pause {went.stall_s:.2f} s",
            went.failure == "" and went.intact,
        ),
        (f"CloudStack's next command goes to {standby.name}", followed),
    )
    faults.boot(active)
    back = until(lambda: it.is_ready() and it.standby is active, seconds=60)
    show.step(
        f"{active.name} boots",
        (f"it stands by, and {standby.name} serves on", back and it.active is standby),
    )


def turns_of(observer: Observer) -> list[str]:
    """The hosts that answered, one after the other."""
    return [it.host for it in observer.turns()]


def _services(show: Show, network: IsolatedNetwork, web: Vm, nic: Nic, database: Vm) -> None:
    show.chapter("Guest services, tested with real clients in the VMs")
    domain = network.facts.domain
    show.step(
        "(set up at the first start)",
        ("udhcpc: web-1 gets 10.10.1.45 from 10.10.1.1", "lease of 10.10.1.45 obtained from 10.10.1.1" in _lease(web)),
        (f"dig: db-1.{domain} is 10.10.1.162", _dig(web, f"db-1.{domain}") == "10.10.1.162"),
        (f"dig, over TCP: 10.10.1.162 is db-1.{domain}", _dig(web, "+tcp", "-x", "10.10.1.162") == f"db-1.{domain}."),
        ("dig: data-server is 10.10.1.1", _dig(web, f"data-server.{domain}") == "10.10.1.1"),
        ("curl: /latest/meta-data/local-hostname is web-1", _get(web, "/latest/meta-data/local-hostname") == "web-1"),
        ("curl from db-1: the same path gives db-1", _get(database, "/latest/meta-data/local-hostname") == "db-1"),
    )
    network.reset_password(nic, "correct horse")
    mine, theirs = _password(web), _password(database)
    _password(web, "saved_password")
    show.step(
        "web-1's password is reset",
        ("curl, port 8080: web-1 fetches it", mine == "correct horse"),
        ("db-1 cannot fetch it", theirs == "saved_password"),
        ("it is erased after the acknowledgement", _password(web) == "saved_password"),
    )


def _balance(show: Show, network: IsolatedNetwork, internet: Internet, one: Nic, two: Nic) -> LoadBalancerRule:
    show.chapter("Load balancing")
    address = network.associate("203.0.113.23")
    rule = network.add_lb_rule(address, "ssh", 2200, 22, [one, two])
    closed = not internet.tcp("203.0.113.23", 2200, **SOON).ok
    network.add_firewall_rule(address, "tcp", 2200)
    told = _balanced_answers(internet)
    show.step(
        "203.0.113.23:2200 over both VMs",
        ("closed without a firewall rule", closed),
        ("six connections: three to web-1, three to db-1", told == {"web-1": 3, "db-1": 3}),
    )
    return rule


def _balanced_answers(internet: Internet) -> Counter[str]:
    """The VMs that answer six connections to the balanced port."""
    return Counter(internet.tcp("203.0.113.23", 2200).server for _ in range(6))


def _objects(host: Host) -> dict[str, list[str]]:
    """The objects on the host after the relays of the last call have ended, which the client does not wait for.

    The agent's start lock and the descriptor number in its command line are left out.
    """
    until(lambda: not any("agent connect" in each for each in host.objects()["processes"]))
    found = host.objects()
    found["files"] = [each for each in found["files"] if not each.endswith("/start.lock")]
    found["processes"] = [re.sub(r"--control [0-9]+", "--control", each) for each in found["processes"]]
    return found


def _lease(vm: Vm) -> str:
    words = ["udhcpc", "-f", "-q", "-n", "-t", "20", "-T", "1", "-i", "eth0", "-s", "/bin/true"]
    done = vm.run("busybox", *words, check=False)
    return done.out + done.err


def _dig(vm: Vm, *words: str) -> str:
    return vm.run("dig", "@10.10.1.1", "+short", "+time=5", "+tries=4", *words, check=False).out.strip()


def _get(vm: Vm, path: str) -> str:
    return vm.run("curl", "-s", "-m", "20", f"http://10.10.1.1{path}", check=False).out


def _password(vm: Vm, word: str = "send_my_password") -> str:
    done = vm.run("curl", "-s", "-m", "20", "-H", f"DomU_Request: {word}", "http://10.10.1.1:8080/", check=False)
    return done.out.strip()


def _picture(network: IsolatedNetwork, host: Host, other: Host) -> str:
    """The network as text, with the names that the kernel of the host shows."""
    links = _names(host.objects()["links"])
    guest = next(name for name in links if name.startswith("vnetg"))
    public = next(name for name in links if name.startswith("vnetpn"))
    outward = f"   [ eth2.101 ]-- breth2-101 --[ {public} ]"
    return f"""
The network now, on {host.name}

      internet  {OUTSIDE}
          |
      203.0.113.1                                     203.0.113.20  source NAT
          |  public VLAN 101                          203.0.113.21  8080-8090 -> web-1
{outward:<54}203.0.113.22  static NAT <-> db-1
                                     |                203.0.113.23  2200 -> web-1 and db-1
                                  pub-101
                      +-----------------------------+
                      |  namespace {network.namespace:<16} |
                      |  nftables  inet netloom     |
                      |  10.10.1.1                  |
                      +-----------------------------+
                                  gst-204
                                     |
   [ eth1.1204 ]-- breth1-1204 --[ {guest} ]
          |            |
          |          web-1  10.10.1.45
          |  guest VLAN 1204
          +-- {other.name}: breth1-1204 -- db-1  10.10.1.162"""


def _names(rows: Iterable[str]) -> list[str]:
    return [row.split()[0] for row in rows]


if __name__ == "__main__":
    sys.exit(main())
