"""How netloom talks to Linux: namespaces, netlink, nftables, conntrack, sysctls, ARP. Knows nothing of networks.

Everything here blocks, so none of it runs on an event loop. A parameter ``namespace`` is the name of a network
namespace under ``/run/netns``; ``None`` or ``""`` is the namespace that the calling thread is in.
"""
