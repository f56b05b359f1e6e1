"""What the fake CloudStack sends for shared networks is what the real one sends, in its order (tests/payloads/3*)."""

from __future__ import annotations

import pytest

from bed import payloads as cs
from bed.cloudstack import FakeCloudStack
from bed.shared import SharedNetwork
from unit.recorded_calls import Recorder, as_fixtures, sent, without_ensures

VM = cs.Nic(
    "7101",
    "6b7c2a10-0000-4000-8000-000000007101",
    "1e:00:aa:00:00:11",
    "10.30.0.61",
    cs.VirtualMachine("sh-1", "9f000000-0000-4000-8000-000000000071"),
)


@pytest.fixture
def network() -> SharedNetwork:
    recorder = Recorder()
    recorder.prints = '{"host":"192.0.2.11","namespace":"cs-net-410"}'
    cloud = FakeCloudStack(recorder).register(hosts=["192.0.2.11"])
    return SharedNetwork(cloud, 410, vlan=1410, cidr="10.30.0.0/24", device_ip="10.30.0.5")


def test_a_life(network: SharedNetwork) -> None:
    network.add_nic(VM)
    said = sent(network.cloud)
    commands = [it for it in said if "current_details" not in it["payload"]]  # type: ignore[operator]
    assert said[0] == as_fixtures("300")[0]
    assert commands[:5] == as_fixtures("301", "302", "303", "304", "305")
    before = len(network.cloud.history)
    network.restart()
    assert without_ensures(network.cloud, before) == ["implement-network", "restore-network"]
    assert sent(network.cloud, before)[2] == as_fixtures("314")[0]
    before = len(network.cloud.history)
    network.expunge_vm(VM)
    said = sent(network.cloud, before)
    assert [said[1], said[3], said[5]] == as_fixtures("311", "310", "312")
    network.delete()
    assert sent(network.cloud)[-1] == as_fixtures("316")[0]
    assert not network.stored
