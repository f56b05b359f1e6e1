"""The interfaces of the Linux kernel: namespaces, netlink, nftables, conntrack, sysctls, ARP.

No module here knows what a network of CloudStack is. All functions block, so none may run on an event loop. A parameter
``namespace`` is the name of a network namespace under ``/run/netns``; ``None`` or ``""`` is the namespace that the
calling thread is in.

``netlink.py`` has the codec and the socket. On it stand ``links.py``, ``addresses.py``, ``routes.py``, ``rules.py`` and
``neighbours.py`` (with ``rtnetlink.py`` in common), ``watch.py`` for their events, ``nft_netlink.py`` and
``conntrack.py``.
"""
