"""Check that a TCP connection comes from the VM that owns the source address.

On a guest segment every VM can send from any source address and answer ARP for any address. Three checks together prove
that the owner of the address has opened the connection, as far as a MAC address can prove it:

* The first packet of the connection came from the owner's MAC address. The kernel keeps that packet with its Ethernet
  header if the listener asks for it (TCP_SAVE_SYN = 2, Linux 5.10). A process needs no privilege to read it.
* Our packets go to the owner's MAC address only. The agent keeps a permanent neighbour entry for every address of the
  table, and ARP messages do not change it. Otherwise an attacker who answers ARP for the address would get the answer
  to a request of the owner.
* The client completes the handshake with the sequence number that we sent, which cannot be guessed.

The second check alone is not enough: if the owner's VM is switched off, the bridge floods the frames to all ports, and
an attacker who listens there could complete the handshake. The first alone is not enough either, see above. An attacker
who also sends from the owner's MAC address is the same as the owner on a plain bridge; only the port filter of the
hypervisor can tell them apart.

Where nftables rules of the namespace compare ``ether saddr . ip saddr`` with the table (``Listener.macs_checked``), the
first check is not needed. A socket with neither check, on an older kernel, is not served.
"""

from __future__ import annotations

import socket

# linux/tcp.h
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28
_FROM_ETHERNET_HEADER = 2

_IPV4 = b"\x08\x00"
_SYN_BYTES_MAX = 256


def keep_first_packet(listener: socket.socket) -> bool:
    """Have the kernel keep the first packet of every connection, with its Ethernet header; False: it cannot."""
    try:
        listener.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, _FROM_ETHERNET_HEADER)
    except OSError:
        return False
    return True


def first_mac(connection: socket.socket) -> bytes | None:
    """The source MAC address of the first packet of a connection.

    None if the kernel has not kept the packet (SYN cookies), or it is not IPv4. The packet can be read only once.
    """
    try:
        packet = connection.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, _SYN_BYTES_MAX)
    except OSError:
        return None
    if len(packet) < 14 + 20 or packet[12:14] != _IPV4:
        return None
    return packet[6:12]
