"""Logins of the management server to hosts: methods, errors, and files left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bed import Bed
from bed.cloudstack import CLOUD_UID, NAT_SERVICES, Failed, FakeCloudStack
from e2e.networks import MakeLife, Traces, impatient
from netloom.extension.agent_client import HEARD_S


def cloud_of(bed: Bed, **options: str) -> FakeCloudStack:
    """Another CloudStack on the same management server, with other options, for example ``home``."""
    return FakeCloudStack.on(bed.management, **options)  # type: ignore[arg-type]


@pytest.mark.binary
@pytest.mark.parametrize("home", ["set", "unset"])
@pytest.mark.parametrize("by", ["key", "password"])
@pytest.mark.parametrize("user", ["root", "netadmin"])
def test_login_by_user_method_and_home(bed: Bed, make_life: MakeLife, user: str, by: str, home: str) -> None:
    cloud = cloud_of(bed, home=home)
    cloud.register(hosts=bed.hosts, **bed.login(user, by=by))  # type: ignore[arg-type]
    life = make_life(with_cloud=cloud)
    sent = life.network.ensure()
    assert (sent.execution.status, life.network.details["namespace"]) == (0, life.network.namespace), sent.output
    life.network.implement()
    assert life.network.failures == []
    assert life.network.namespace in life.host.objects()["namespaces"]


@pytest.fixture
def users_own_key(bed: Bed) -> Iterator[None]:
    key = f"{bed.management.home}/.ssh/id_ed25519"
    bed.management.write(key, bed.private_key, mode=0o600, uid=CLOUD_UID)
    yield
    bed.management.remove(key)


@pytest.mark.binary
@pytest.mark.usefixtures("users_own_key")
def test_login_with_the_keys_of_the_calling_user(make_life: MakeLife, bed: Bed) -> None:
    cloud = cloud_of(bed, home="set")
    cloud.register(hosts=bed.hosts, **bed.login("root", by="nothing"))
    assert make_life(with_cloud=cloud).network.ensure().execution.status == 0


@pytest.mark.parametrize("form", ["without its last newline", "with CR LF"])
def test_a_key_as_pasted_by_operators_works(bed: Bed, make_life: MakeLife, form: str) -> None:
    cloud = cloud_of(bed)
    key = bed.private_key.rstrip("\n") if "without" in form else bed.private_key.replace("\n", "\r\n")
    cloud.register(hosts=bed.hosts, username="root", sshkey=key)
    assert make_life(with_cloud=cloud).network.ensure().execution.status == 0


@pytest.mark.parametrize(
    ("user", "secret"),
    [("root", {"password": "FAKE-wrong-4711"}), ("nobody-here", {"password": "FAKE-wrong-4711"}), ("plainuser", {})],
)
def test_a_refused_login_is_reported_without_the_secret(
    bed: Bed, make_life: MakeLife, user: str, secret: dict[str, str]
) -> None:
    cloud = cloud_of(bed)
    details = bed.login(user, by="password") if not secret else {"username": user, **secret}
    cloud.register(hosts=[bed.hosts[0]], **details)
    sent = make_life(with_cloud=cloud).network.ensure()
    assert sent.execution.status == 2
    assert bed.hosts[0].address in sent.output
    assert len(sent.output.splitlines()) == 1
    assert sent.output.isascii()
    assert details["password"] not in sent.output


def test_a_silent_host_is_reported_before_the_deadline(bed: Bed, make_life: MakeLife) -> None:
    """The host drops all packets. The call ends by itself before the deadline and names the host."""
    cloud = cloud_of(bed)
    cloud.register(hosts=["198.18.0.99"], **bed.login("root"))
    network = make_life(with_cloud=cloud).network
    with impatient(cloud, 15):
        sent = network.ensure()
    assert sent.execution.status == 2
    assert "198.18.0.99" in sent.output
    assert sent.execution.seconds < 15
    assert network.stored == "{}"


def test_a_silent_candidate_is_skipped_for_a_new_network(bed: Bed, make_life: MakeLife) -> None:
    cloud = cloud_of(bed)
    cloud.register(hosts=[bed.hosts[0], "198.18.0.99"], **bed.login("root"))
    life = make_life(with_cloud=cloud)
    with impatient(cloud, 30):
        life.network.ensure()
    assert life.network.host == bed.hosts[0].address


def test_a_network_stays_on_a_disconnected_host(bed: Bed, make_life: MakeLife) -> None:
    life = make_life()
    life.network.implement()
    host = life.host
    host.partition("mgmt")
    time.sleep(HEARD_S)  # until then the helper answers for a host that has just replied
    try:
        with impatient(life.cloud):
            sent = life.network.ensure()
        assert sent.execution.status == 2
        assert host.address in sent.output
        assert life.network.host == host.address
        assert life.network.namespace not in life.elsewhere.objects()["namespaces"]
    finally:
        host.heal()
    assert life.network.ensure().ok


@pytest.mark.binary
def test_a_changed_host_key_is_refused(bed: Bed, make_life: MakeLife) -> None:
    cloud = cloud_of(bed)
    key = bed.hosts[1].host_key
    cloud.register(hosts=[bed.hosts[0]], **bed.login("root"), hostkeys=f"{bed.hosts[0].address} {key}")
    sent = make_life(with_cloud=cloud).network.ensure()
    assert sent.execution.status == 2
    assert "key" in sent.output


@pytest.mark.binary
def test_nothing_is_written_beside_the_executable(bed: Bed, make_life: MakeLife) -> None:
    cloud = cloud_of(bed)
    cloud.register(hosts=bed.hosts, **bed.login("root"))
    make_life(with_cloud=cloud, offering=NAT_SERVICES).network.implement()
    assert bed.management.listing("/usr/share/cloudstack-management/extensions/netloom") == ["netloom.sh"]


def test_a_truncated_payload_is_refused(bed: Bed, make_life: MakeLife) -> None:
    life = make_life()
    life.network.implement()
    before = Traces(bed)
    whole = life.cloud.history[-1]
    cut = life.cloud.execute_text(whole.command, whole.text[: len(whole.text) // 2])
    assert cut.execution.status == 1
    assert len(cut.output.splitlines()) == 1
    assert before.left() == {}
    with pytest.raises(Failed):
        life.network.send_or_fail("no-such-command", {"network_id": life.network.facts.network_id})
    assert life.cloud.history[-1].execution.status == 1
