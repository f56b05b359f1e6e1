"""The resolver of a network: one dnsmasq, fed through a directory of hosts files that it watches.

dnsmasq serves DNS here and nothing else. It is never signalled: up to 2.90 a SIGHUP may end it, and the files of
its ``hostsdir`` are read, changed and forgotten by inotify (dnsmasq(8), --hostsdir). So a VM that comes or goes is a
file that comes or goes, and the process restarts only when its own configuration changes.
"""

from __future__ import annotations

from netloom import names
from netloom.render.service import Service, directory_of
from netloom.state import Network, Nic

HOSTS = "hosts"

# One name that cloud-init asks for first (its CloudStack data source); CloudStack's virtual router answers it too.
DATA_SERVER = "data-server"


def service(scope_id: str, network: Network) -> Service:
    """The dnsmasq of ``network``, whose device address is ``extension_ip``, else the gateway."""
    name = f"dns-{network.network_id}"
    directory = directory_of(scope_id, name)
    return Service(
        name=name,
        directory=directory,
        argv=("dnsmasq", "--keep-in-foreground", f"--conf-file={directory}/dnsmasq.conf"),
        config={"dnsmasq.conf": _configuration(directory, network)},
        live_directory=HOSTS,
        live=_hosts(network),
        listens=(("udp", 53), ("tcp", 53)),
    )


def _configuration(directory: str, network: Network) -> str:
    address = network.extension_ip or network.gateway
    lines = [
        f"# netloom: the resolver of network {network.network_id}",
        "user=nobody",
        "group=nogroup",
        f"interface={names.guest_link(network.network_id)}",
        f"listen-address={address}",
        "except-interface=lo",
        "bind-interfaces",
        # Nothing of the host: neither its names nor its resolvers.
        "no-hosts",
        "no-resolv",
        "no-poll",
        f"hostsdir={directory}/{HOSTS}",
        "domain-needed",
        "cache-size=1000",
        "pid-file=",
        # The names are ours to change at any moment; a guest that cached one would keep it for this long.
        "local-ttl=10",
    ]
    if network.domain:
        lines += [f"domain={network.domain}", "expand-hosts", f"local=/{network.domain}/"]
    lines += [f"server={resolver}" for resolver in network.resolvers]
    return "\n".join(lines) + "\n"


def _hosts(network: Network) -> dict[str, str]:
    """File name to text. One file a NIC, so that a VM is one file; sorted, so that the same wish is the same text."""
    device = network.extension_ip or network.gateway
    files = {"device": _entry(device, [DATA_SERVER])}
    for key, nic in sorted(network.nics.items()):
        if nic.named and nic.hostname:
            files[f"nic-{key}"] = "".join(_entry(address, [nic.hostname]) for address in _addresses(nic))
    return files


def _addresses(nic: Nic) -> list[str]:
    return [address for address in (nic.ip, nic.ip6) if address]


def _entry(address: str, hosts: list[str]) -> str:
    return f"{address} {' '.join(hosts)}\n"
