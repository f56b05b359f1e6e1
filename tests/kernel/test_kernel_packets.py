"""After a ruleset change the agent can wait for packets that are still processed under the old rules."""

from __future__ import annotations

import pytest

from kernel.agent_host import agent_host, done
from netloom.agent.host import flows
from netloom.agent.kernel import conntrack, packets
from unit.scopes import A1, admit, wish


def test_this_kernel_can_wait_for_packets_in_flight() -> None:
    assert packets.settled()


@pytest.mark.mutation("packets-under-way-are-awaited")
def test_revocations_wait_for_packets_in_flight_before_reading_conntrack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that revokes something waits before it reads conntrack; a change that only adds does not."""
    order: list[str] = []
    settled, count = packets.settled, conntrack.count

    def waited() -> bool:
        order.append("settled")
        return settled()

    def counted(namespace: str | None) -> int:
        order.append("count")
        return count(namespace)

    monkeypatch.setattr(packets, "settled", waited)
    monkeypatch.setattr(conntrack, "count", counted)
    open_, closed = wish(admit(A1, "tcp", "22")), wish()
    with agent_host() as host:
        host.start()
        done(host.call("020", "implement-network"))
        with host.within("cs-net-204"):
            assert flows.enforce(None, open_, closed) == (0, False)  # type: ignore[arg-type]
            assert order == ["settled", "count"]
            assert flows.enforce(None, closed, open_) == (0, False)  # type: ignore[arg-type]
            assert order == ["settled", "count", "count"]
            assert flows.enforce(None, closed, open_, revoked=False) == (0, False)  # type: ignore[arg-type]
    assert order == ["settled", "count", "count"], "nothing is asked if no flow is revoked"
