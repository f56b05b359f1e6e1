"""Two hosts of a bed as routers of one network with keepalived and conntrackd, for a comparison.

The network is that of bed/standby.py: source NAT, static NAT and a forwarded port, and the same two VMs. keepalived has
the usual advertisement each second; conntrackd (FTFW) copies the connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bed.flows import FlowKind
from bed.lab import Bed, Host, Internet, Vm
from bed.machines import until
from bed.observer import Observer, Question
from bed.standby import (
    FORWARDED,
    GATEWAY,
    MAC,
    OUTSIDE,
    PUBLIC_VLAN,
    SECOND_IP,
    SECOND_MAC,
    SOURCE_NAT,
    STATIC_NAT,
    VLAN,
    VM_IP,
    tcp_kinds,
)

_KEEPALIVED = """vrrp_sync_group network {{
  group {{ guests; outside }}
  notify_master "/bin/sh /etc/keepalived/master"
  notify_backup "/usr/sbin/conntrackd -n"
}}
global_defs {{ script_user root }}
vrrp_instance guests {{
  state BACKUP
  interface eth1.{vlan}
  virtual_router_id 51
  priority {priority}
  advert_int 1
  nopreempt
  virtual_ipaddress {{ {gateway}/24 }}
}}
vrrp_instance outside {{
  state BACKUP
  interface eth2.{public_vlan}
  virtual_router_id 52
  priority {priority}
  advert_int 1
  nopreempt
  virtual_ipaddress {{ {source_nat}/24; {static_nat}/24; {forwarded}/24 }}
}}
""".replace("; ", "\n    ")

# As the example script of conntrackd: commit the copied entries, flush the cache, ask the other one, send a bulk.
_MASTER = "for it in -c -f -R -B; do /usr/sbin/conntrackd $it; done\n"

_CONNTRACKD = """Sync {{
  Mode FTFW {{ }}
  UDP {{
    IPv4_address {mine}
    IPv4_Destination_Address {theirs}
    Port 3780
    Interface eth0
    Checksum on
  }}
}}
General {{
  HashSize 32768
  HashLimit 131072
  LogFile on
  LockFile /run/lock/conntrackd.lock
  UNIX {{ Path /run/conntrackd.ctl }}
  NetlinkBufferSize 2097152
  NetlinkBufferSizeMaxGrowth 8388608
  Filter From Kernelspace {{ Protocol Accept {{ TCP }} }}
}}
"""

_NAT = f"""table ip nat {{
  chain prerouting {{
    type nat hook prerouting priority dstnat
    ip daddr {STATIC_NAT} dnat to {VM_IP}
    ip daddr {FORWARDED} tcp dport 2222 dnat to {VM_IP}:22
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat
    oifname "eth2.{PUBLIC_VLAN}" ip saddr {VM_IP} snat to {STATIC_NAT}
    oifname "eth2.{PUBLIC_VLAN}" ip saddr 10.10.1.0/24 snat to {SOURCE_NAT}
  }}
}}
"""


@dataclass
class KeepalivedBed:
    """What ``keepalived_bed`` makes. ``routers``: the one with the higher priority comes first."""

    bed: Bed
    routers: list[Host]
    internet: Internet
    vm: Vm
    second_vm: Vm

    def observer(self) -> Observer:
        asked = [Question("eth2", PUBLIC_VLAN, it) for it in (SOURCE_NAT, STATIC_NAT)]
        return Observer(self.bed, [Question("eth1", VLAN, GATEWAY), *asked], hosts=self.routers)

    def kinds(self, each: int, *, every_s: float = 0.25) -> list[FlowKind]:
        return tcp_kinds(self.vm, self.second_vm, self.internet, each, every_s=every_s)


@contextmanager
def keepalived_bed() -> Iterator[KeepalivedBed]:
    """Two routers, and a host with the VMs. One router serves when the block begins."""
    with Bed(hosts=3, vlans=[VLAN], public_vlans=[PUBLIC_VLAN]) as bed:
        internet = bed.internet(vlan=PUBLIC_VLAN, address="203.0.113.1/24", also=[f"{OUTSIDE}/32"])
        vm, second_vm = [
            bed.hosts[2].vm(name, vlan=VLAN, mac=mac, ip=f"{ip}/24", gateway=GATEWAY)
            for name, mac, ip in (("web-1", MAC, VM_IP), ("db-1", SECOND_MAC, SECOND_IP))
        ]
        routers = bed.hosts[:2]
        for router, other in (routers, routers[::-1]):
            _start(router, other)
        it = KeepalivedBed(bed, routers, internet, vm, second_vm)
        if not until(lambda: vm.ping(GATEWAY, timeout_s=0.3).ok and vm.ping(OUTSIDE, timeout_s=0.3).ok):
            raise TimeoutError(f"no router serves: {routers[0].read('/var/log/keepalived.log')}")
        yield it


def _start(router: Host, other: Host) -> None:
    n = router.number
    router.links(
        f"address add 10.10.1.{1 + n}/24 dev eth1.{VLAN}",
        f"address add 203.0.113.{1 + n}/24 dev eth2.{PUBLIC_VLAN}",
        "route add default via 203.0.113.1",
    )
    router.sysctl("net.ipv4.ip_forward", "1")
    router.sysctl("net.netfilter.nf_conntrack_events", "1")
    router.run("nft", "-f", "-", input=_NAT)
    names = {"gateway": GATEWAY, "source_nat": SOURCE_NAT, "static_nat": STATIC_NAT, "forwarded": FORWARDED}
    config = _KEEPALIVED.format(vlan=VLAN, public_vlan=PUBLIC_VLAN, priority=110 - 10 * n, **names)
    router.write("/etc/keepalived/keepalived.conf", config)
    router.write("/etc/keepalived/master", _MASTER)
    router.write("/etc/conntrackd/conntrackd.conf", _CONNTRACKD.format(mine=router.address, theirs=other.address))
    router.run("conntrackd", "-C", "/etc/conntrackd/conntrackd.conf", "-d")
    router.sh("keepalived -n -l -D </dev/null >/var/log/keepalived.log 2>&1 &")
