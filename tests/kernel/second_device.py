"""The device of a ruleset lab on a second host, to move a network there while its connections are open.

Both devices have the same addresses and MAC addresses. The links of the second one are in bridges of their own
(``idle-<vlan>``), until :meth:`SecondDevice.take_over` exchanges them for those of the first one. Their carriers do not
change, so routes and addresses stay as they are.
"""

from __future__ import annotations

import os
from pathlib import Path

from msgspec.structs import replace

from kernel.ruleset_lab import Lab, run
from netloom.render.want import Port, Want
from netns import inside


class SecondDevice(Lab):
    """Use it as a context within that of the lab. :meth:`apply` configures it, as with the lab itself."""

    def __init__(self, first: Lab) -> None:
        super().__init__(tag=first.tag, families=first.families)
        self.first = first
        self._vlans: set[str] = set()
        self._serves = False

    def ns(self, space: str) -> str:
        return super().ns("dev2" if space == "dev" else space)

    @property
    def namespace(self) -> str:
        return self.ns("dev")

    def __enter__(self) -> SecondDevice:
        run("ip", "netns", "add", self.namespace)
        with inside(self.namespace):
            root = Path("/proc/sys/net")
            (root / "netfilter/nf_conntrack_tcp_timeout_close").write_text("120")
            (root / "ipv6/conf/all/disable_ipv6").write_text(str(int("ipv6" not in self.families)))
            for where in ("all", "default"):
                (root / "ipv6/conf" / where / "accept_dad").write_text("0")
                (root / "ipv4/conf" / where / "rp_filter").write_text("0")
        self.ip("dev", "link set lo up")
        return self

    def __exit__(self, *_: object) -> None:
        if self._serves:
            self.give_back()
        run("ip", "netns", "del", self.namespace)
        # The namespace's veth pairs go with it, but later, and the next second device needs their names.
        for port in self.want.ports:
            run("ip", "netns", "exec", self.ns("sw"), "sh", "-c", f"ip link del {port.host_link} 2>/dev/null || true")
        self.ip("sw", *(f"link del idle-{vlan}" for vlan in sorted(self._vlans)))
        self._answering.close()
        for pipe in (self._stop_r, self._stop_w, self._asked_r, self._asked_w):
            os.close(pipe)

    def realise(self, want: Want) -> None:
        vlans = {it.segment.vlan for it in want.ports} - self._vlans
        self.ip("sw", *(line for it in sorted(vlans) for line in (f"link add idle-{it} type bridge",
                                                                  f"link set idle-{it} up")))  # fmt: skip
        self._vlans |= vlans
        super().realise(replace(want, ports=tuple(_on_second_host(it) for it in want.ports)))

    def take_over(self) -> None:
        """Exchange the links of the first device for ours."""
        self._serves = True
        self._exchange(self.first.want, self.want)

    def give_back(self) -> None:
        """Undo :meth:`take_over`."""
        self._serves = False
        self._exchange(self.want, self.first.want)

    def close_first(self) -> None:
        """Take the links of the first device away: from now on it receives and sends nothing."""
        self.ip("sw", *(f"link set {it.host_link} nomaster" for it in self.first.want.ports))

    def _exchange(self, old: Want, new: Want) -> None:
        self.ip(
            "sw",
            *(f"link set {it.host_link} nomaster" for it in old.ports),
            *(f"link set {it.host_link} master breth1-{it.segment.vlan}" for it in new.ports),
        )


def _on_second_host(port: Port) -> Port:
    segment = replace(port.segment, bridge=f"idle-{port.segment.vlan}")
    return replace(port, host_link=f"b-{port.link}"[:15], segment=segment)
