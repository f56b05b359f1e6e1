"""How much one VM, and one network, may ask for: so that nobody's flood is everybody's outage."""

from __future__ import annotations

import time

# cloud-init asks some thirty times at boot, over as many connections; a script in a loop asks for ever.
VM_REQUESTS_PER_S, VM_REQUESTS_BURST = 20.0, 200.0
NETWORK_REQUESTS_PER_S, NETWORK_REQUESTS_BURST = 200.0, 2000.0
VM_CONNECTIONS_MAX = 8
NETWORK_CONNECTIONS_MAX = 256
NOTICES_PER_S, NOTICES_BURST = 0.2, 10.0


class Bucket:
    """``per_s`` tokens a second, up to ``burst`` of them."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = burst
        self._at = time.monotonic()

    def take(self) -> bool:
        """Whether there is a token, which is then gone."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    @property
    def half_full(self) -> bool:
        """Whether little was taken lately."""
        return self._tokens >= self._burst / 2


class Load:
    """What one VM, or one network, is using."""

    def __init__(self, per_s: float, burst: float, connections_max: int) -> None:
        self._connections_max = connections_max
        self.requests = Bucket(per_s, burst)
        self.connections = 0

    @property
    def full(self) -> bool:
        """Whether no further connection is let in."""
        return self.connections >= self._connections_max


def admitted(vm: Load, network: Load) -> bool:
    """Whether one more request is answered: nobody's flood keeps a VM waiting that asks for little."""
    return vm.requests.take() and (network.requests.take() or vm.requests.half_full)


def vm_load() -> Load:
    """What one VM may use."""
    return Load(VM_REQUESTS_PER_S, VM_REQUESTS_BURST, VM_CONNECTIONS_MAX)


def network_load() -> Load:
    """What all VMs of a network may use together."""
    return Load(NETWORK_REQUESTS_PER_S, NETWORK_REQUESTS_BURST, NETWORK_CONNECTIONS_MAX)
