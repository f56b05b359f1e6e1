"""Limits on requests and connections, for each VM and for each network.

A VM that floods the guest process is limited, and the other VMs are still answered.
"""

from __future__ import annotations

import time

# cloud-init sends about thirty requests at boot, each over its own connection. A script in a loop sends without end.
VM_REQUESTS_PER_S, VM_REQUESTS_BURST = 20.0, 200.0
NETWORK_REQUESTS_PER_S, NETWORK_REQUESTS_BURST = 200.0, 2000.0
VM_CONNECTIONS_MAX = 8
NETWORK_CONNECTIONS_MAX = 256
NOTICES_PER_S, NOTICES_BURST = 0.2, 10.0
LIMITED_EVERY_S = 30.0  # between two notices that a VM is limited
# Answers in memory that VMs have not received completely, of one network and of all networks, in bytes.
NETWORK_UNREAD_BYTES_MAX = 32 << 20
UNREAD_BYTES_MAX = 128 << 20


class Bucket:
    """A token bucket: ``per_s`` tokens are added each second, up to ``burst``. It starts full."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = burst
        self._at = time.monotonic()

    def take(self) -> bool:
        """Take a token; False: there is none."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    @property
    def half_full(self) -> bool:
        """Whether at least half of ``burst`` was left after the last ``take``."""
        return self._tokens >= self._burst / 2


class Unread:
    """The bodies of answers that were not received completely. Equal ones are kept once, and count once.

    The bytes also count in ``above``, if that is given.
    """

    def __init__(self, above: Unread | None = None) -> None:
        self._above = above
        self._kept: dict[bytes, tuple[bytes, int]] = {}  # to the first of the equal ones, and how many there are
        self.bytes = 0

    def keep(self, body: bytes) -> bytes:
        """Keep a body until ``release``; return the one that is kept, which is equal."""
        kept, count = self._kept.get(body, (body, 0))  # guard: equal-answers-share-their-memory
        self._kept[kept] = (kept, count + 1)
        if not count:
            self._count(len(kept))
        return kept

    def release(self, body: bytes) -> None:
        """Forget a body that was kept as often as it was kept."""
        kept, count = self._kept[body]
        if count > 1:
            self._kept[body] = (kept, count - 1)
        else:
            del self._kept[body]
            self._count(-len(kept))

    def growth(self, body: bytes) -> int:
        """By how much ``bytes`` would grow if this body were kept."""
        return 0 if body in self._kept else len(body)

    def _count(self, more: int) -> None:
        self.bytes += more
        if self._above is not None:
            self._above._count(more)


class Load:
    """The open connections, the request rate and the unread answers of one VM, or of one network."""

    def __init__(self, per_s: float, burst: float, connections_max: int, above: Unread | None) -> None:
        self._connections_max = connections_max
        self.requests = Bucket(per_s, burst)
        self.connections = 0
        self.unread = Unread(above)
        self._noticed_at = -LIMITED_EVERY_S

    def notice_due(self) -> bool:
        """Whether a notice that this VM is limited is due; the next one is in ``LIMITED_EVERY_S``."""
        now = time.monotonic()
        if now - self._noticed_at < LIMITED_EVERY_S:
            return False
        self._noticed_at = now
        return True

    @property
    def full(self) -> bool:
        """Whether the maximum number of connections is open."""
        return self.connections >= self._connections_max


def admitted(vm: Load, network: Load) -> bool:
    """Count one more request of ``vm``; False: refuse it.

    The limit of the network does not apply to a VM that has used less than half of its own burst. So other VMs cannot
    use up the share of a VM that asks rarely.
    """
    return vm.requests.take() and (network.requests.take() or vm.requests.half_full)


def vm_load(network: Load | None = None) -> Load:
    """A load with the limits of one VM of ``network``."""
    return Load(VM_REQUESTS_PER_S, VM_REQUESTS_BURST, VM_CONNECTIONS_MAX, network.unread if network else None)


def network_load(all_networks: Unread | None = None) -> Load:
    """A load with the limits of all VMs of a network together."""
    return Load(NETWORK_REQUESTS_PER_S, NETWORK_REQUESTS_BURST, NETWORK_CONNECTIONS_MAX, all_networks)
