"""Sockets of nftables and conntrack that stay open for a moment after their use.

To close one may take long: the kernel first waits until everything is freed that the transactions of its namespace have
deleted. That takes an RCU grace period, some 10 ms (``nft_rcv_nl_event`` in net/netfilter/nf_tables_api.c). So whoever
changes a namespace gets the socket of the change before it, and a thread closes those that nobody has used for
``KEPT_S`` seconds.

A socket keeps its namespace alive, so whoever deletes a namespace calls :func:`forget` before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, Protocol, TypeVar

from netloom.agent.kernel import namespaces, netlink
from netloom.agent.kernel.netlink import Socket
from netloom.agent.kernel.nft import Nft

KEPT_S = 1.0
_KEPT_MAX = 64  # of each kind; libnftables needs low descriptors


class _Closable(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closable)


class _Kept(NamedTuple, Generic[_T]):
    identity: int  # of the namespace; a later one of the same name has another
    it: _T
    ends: float


class Keeper(Generic[_T]):
    """Lends what ``open_`` opens in a namespace, to one thread at a time."""

    def __init__(self, open_: Callable[[str | None], _T]) -> None:
        self._open = open_
        self._changed = threading.Condition()
        self._kept: dict[str | None, _Kept[_T]] = {}  # the one that was used last is the last one
        self._closing: threading.Thread | None = None

    @contextmanager
    def lent(self, namespace: str | None) -> Iterator[_T]:
        """One for the block. After an exception it is closed: answers may be left in it. Raises what ``open_`` raises.

        Call it outside of ``namespaces.inside``: it may start a thread.
        """
        identity = _identity(namespace)
        with self._changed:
            had = self._kept.pop(namespace, None)
        if had is not None and had.identity != identity:  # guard: a-new-namespace-gets-a-new-socket
            had.it.close()
            had = None
        it = had.it if had is not None else self._open(namespace)
        try:
            yield it
        except BaseException:
            it.close()
            raise
        self._keep(namespace, identity, it)

    def forget(self, namespace: str) -> None:
        """Close what is kept for the namespace."""
        with self._changed:
            had = self._kept.pop(namespace, None)
        if had is not None:
            had.it.close()

    def _keep(self, namespace: str | None, identity: int, it: _T) -> None:
        with self._changed:
            too_many = [self._kept.pop(namespace)] if namespace in self._kept else []
            self._kept[namespace] = _Kept(identity, it, time.monotonic() + KEPT_S)
            if len(self._kept) > _KEPT_MAX:
                too_many.append(self._kept.pop(next(iter(self._kept))))
            if self._closing is None:
                self._closing = threading.Thread(target=self._close_unused, name="closing", daemon=True)
                self._closing.start()
            self._changed.notify()
        for had in too_many:
            had.it.close()

    def _close_unused(self) -> None:
        while True:
            with self._changed:
                while not self._kept:
                    self._changed.wait()
                oldest = next(iter(self._kept))
                left_s = self._kept[oldest].ends - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
                had = self._kept.pop(oldest)
            had.it.close()


def _identity(namespace: str | None) -> int:
    """The inode number of the namespace, without a name of that of the calling thread; 0 for one that is missing."""
    if not namespace:
        return namespaces.own_identity()
    try:
        return namespaces.identity(namespace)
    except FileNotFoundError:
        return 0


_netfilter = Keeper(lambda namespace: Socket(netlink.NETLINK_NETFILTER, namespace))
_nft = Keeper(Nft)

netfilter = _netfilter.lent
nft = _nft.lent


def forget(namespace: str) -> None:
    """Close the sockets that are kept for the namespace."""
    _netfilter.forget(namespace)
    _nft.forget(namespace)
