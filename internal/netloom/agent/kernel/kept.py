"""Sockets of nftables and conntrack that stay open for a moment after their use.

To close one may take long: the kernel first waits until everything is freed that the transactions of its namespace have
deleted. That takes an RCU grace period, some 10 ms (``nft_rcv_nl_event`` in net/netfilter/nf_tables_api.c). So a thread
closes them later, when nobody waits for it. Until then our own sockets are used again, and the contexts of libnftables
are not. With a libnftables that has not been tried, each context is closed at once, and there is one at a time: those
of 0.9.8 have tables in common, which it frees with each context.

A socket keeps its namespace alive, so whoever deletes a namespace calls :func:`forget` before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Generic, NamedTuple, Protocol, TypeVar

from netloom.agent.kernel import namespaces, netlink
from netloom.agent.kernel.netlink import Socket
from netloom.agent.kernel.nft import Nft, version

KEPT_S = 1.0
_CLOSED_AFTER_S = 0.1  # a context of libnftables
_INDEPENDENT_SINCE = (1, 0, 6)  # of the versions that were tried
_KEPT_MAX = 64  # of each kind; libnftables needs low descriptors


class _Closable(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closable)


class _Kept(NamedTuple, Generic[_T]):
    namespace: str | None
    identity: int  # of the namespace; a later one of the same name has another
    it: _T
    ends: float


class Lender(Generic[_T]):
    """Lends what ``open_`` opens in a namespace, to one thread at a time. It is closed ``kept_s`` seconds later.

    ``reuse``: until then it is lent again.
    """

    def __init__(self, open_: Callable[[str | None], _T], kept_s: float = KEPT_S, *, reuse: bool = True) -> None:
        self._open = open_
        self._kept_s = kept_s
        self._reuse = reuse
        self._changed = threading.Condition()
        self._kept: list[_Kept[_T]] = []  # in the order in which they are closed
        self._closing: threading.Thread | None = None

    @contextmanager
    def lent(self, namespace: str | None) -> Iterator[_T]:
        """One for the block. After an exception it is closed: answers may be left in it. Raises what ``open_`` raises.

        Call it outside of ``namespaces.inside``: it may start a thread.
        """
        identity = _identity(namespace)
        had = self._taken(namespace, identity) if self._reuse else None
        it = had if had is not None else self._open(namespace)
        try:
            yield it
        except BaseException:
            it.close()
            raise
        self._keep(_Kept(namespace, identity, it, time.monotonic() + self._kept_s))

    def forget(self, namespace: str) -> None:
        """Close what is kept for the namespace."""
        with self._changed:
            gone = [it for it in self._kept if it.namespace == namespace]
            self._kept = [it for it in self._kept if it.namespace != namespace]
        for had in gone:
            had.it.close()

    def _taken(self, namespace: str | None, identity: int) -> _T | None:
        """The one that is kept for this very namespace, which is kept no longer."""
        with self._changed:
            for at in range(len(self._kept) - 1, -1, -1):
                had = self._kept[at]
                if had.namespace == namespace and had.identity == identity:  # guard: a-new-namespace-gets-a-new-socket
                    del self._kept[at]
                    return had.it
        return None

    def _keep(self, kept: _Kept[_T]) -> None:
        too_many: list[_Kept[_T]] = []
        with self._changed:
            self._kept.append(kept)
            if len(self._kept) > _KEPT_MAX:
                too_many = self._kept[:1]
                del self._kept[:1]
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
                left_s = self._kept[0].ends - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
                had = self._kept.pop(0)
            had.it.close()


def _identity(namespace: str | None) -> int:
    """The inode number of the namespace, without a name of that of the calling thread; 0 for one that is missing."""
    if not namespace:
        return namespaces.own_identity()
    try:
        return namespaces.identity(namespace)
    except FileNotFoundError:
        return 0


_netfilter = Lender(lambda namespace: Socket(netlink.NETLINK_NETFILTER, namespace))
_nft = Lender(Nft, _CLOSED_AFTER_S, reuse=False)

netfilter = _netfilter.lent
_alone = threading.Lock()


@contextmanager
def nft(namespace: str | None) -> Iterator[Nft]:
    """``Nft`` of the namespace, for one script. Call it outside of ``namespaces.inside``. Raises as ``Nft`` does."""
    if _contexts_are_independent():  # guard: old-contexts-have-tables-in-common
        with _nft.lent(namespace) as it:
            yield it
    else:
        with _alone, Nft(namespace) as it:
            yield it


def _contexts_are_independent() -> bool:
    with _alone:  # the first question uses a context, too
        return _is_tried()


@cache
def _is_tried() -> bool:
    return version() >= _INDEPENDENT_SINCE


def forget(namespace: str) -> None:
    """Close the sockets that are kept for the namespace."""
    _netfilter.forget(namespace)
    _nft.forget(namespace)
