"""Who is at the other end of a TCP connection: the VM that owns the source address, or somebody who only says so.

On a guest segment every VM can send any source address and answer ARP for any address. Three things together make an
address prove the VM, as far as a MAC address does:

* The connection's first packet came from the owner's MAC. The kernel keeps that packet with its Ethernet header when
  the listener asks for it (TCP_SAVE_SYN = 2, Linux 5.10), and gives it to a process without any privilege.
* What we send goes to the owner's MAC and nowhere else: the agent keeps a permanent neighbour entry for every address
  of the table, which no ARP message changes. Otherwise a neighbour who answers ARP for the address would be sent the
  answer to a request that the owner himself made.
* The handshake ends only with what we sent: its sequence number cannot be guessed.

The second alone is not enough: for a VM that is switched off the bridge floods frames to all ports, and a neighbour who
listens there could complete the handshake. The first alone is not enough, see above. Who can also send from the owner's
MAC is, on a plain bridge, the owner; only the hypervisor's port filter can tell them apart.

Where the namespace's own rules compare ``ether saddr . ip saddr`` with the table (``Listener.macs_checked``) the first
need not be asked for. A socket with neither, on an older kernel, is not served.
"""

from __future__ import annotations

import socket

# linux/tcp.h
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28
_FROM_ETHERNET_HEADER = 2

_IPV4 = b"\x08\x00"
_SYN_BYTES_MAX = 256


def keep_first_packet(listener: socket.socket) -> bool:
    """Ask for the first packet of every connection, Ethernet header included; False when the kernel cannot."""
    try:
        listener.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, _FROM_ETHERNET_HEADER)
    except OSError:
        return False
    return True


def first_mac(connection: socket.socket) -> bytes | None:
    """The MAC address that a connection's first packet came from; None when it was not kept (SYN cookies) or not IPv4.

    The kernel gives it out once.
    """
    try:
        packet = connection.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, _SYN_BYTES_MAX)
    except OSError:
        return None
    if len(packet) < 14 + 20 or packet[12:14] != _IPV4:
        return None
    return packet[6:12]
