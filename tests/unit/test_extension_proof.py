"""Proofs of placements: every type of key, an SSH agent, a password; and everything that is no proof."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from netloom.claimwire import EvacuationClaim, PlacementClaim, Signable, StandbyClaim
from netloom.errors import BadRequest, LoginRefused
from netloom.extension.deadline import Deadline
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.hosts import Hosts, Inquiry
from netloom.extension.placement import HostAnswer, Situation
from netloom.extension.pool import Pool
from netloom.extension.progress import Progress
from netloom.extension.proof import PROOF_CHARACTERS_MAX, Credentials, holds, sign
from netloom.extension.ssh import Login
from netloom.secret import Secret
from netloom.wire import Call, Evacuated, Registration, Reply, StandbyReply

TYPES = (
    "ssh-ed25519",
    "ssh-ed448",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ecdsa-sha2-1.3.132.0.10",
    "ssh-rsa",
)
CLAIM = PlacementClaim("netloom/phys-1", "net-42", 4, "kvm2")
DEAD = EvacuationClaim("netloom/phys-1", "kvm1", 1_800_000_000, "kvm2")
STANDBY = StandbyClaim("netloom/phys-1", "net-42", 4, "kvm2")


def login(sshkey: str = "", password: str = "", home: str = "", agent: str = "") -> Login:
    return Login(
        trust=Trust((), KnownHosts("/nonexistent")),
        sshkey=Secret(sshkey),
        password=Secret(password),
        home=home,
        ssh_auth_sock=agent,
    )


def new_key(kind: str = "ssh-ed25519", form: str = "openssh", bits: int = 2048) -> str:
    """``bits``: of an RSA key."""
    options = {"key_size": bits} if kind == "ssh-rsa" else {}
    return asyncssh.generate_private_key(kind, None, **options).export_private_key(form).decode()


KEY, STRANGER = new_key(), new_key()


def proof_of(claim: Signable, credentials: Login) -> str:
    return asyncio.run(sign(credentials, claim))


def is_valid(claim: Signable, proof: str, credentials: Login) -> bool:
    return asyncio.run(holds(credentials, claim, proof))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("claim", [CLAIM, DEAD, STANDBY], ids=["placement", "evacuation", "standby"])
def test_a_key_of_every_type_makes_proofs(kind: str, claim: Signable) -> None:
    credentials = login(new_key(kind))
    proof = proof_of(claim, credentials)
    assert proof.isascii()
    assert proof.isprintable()
    assert is_valid(claim, proof, credentials)
    assert not is_valid(claim, proof, login(new_key(kind)))


def test_a_proof_by_a_large_key_is_short() -> None:
    proof = proof_of(CLAIM, login(new_key("ssh-rsa", bits=4096)))
    assert len(proof) <= 800


def test_the_form_of_the_registered_key_does_not_matter() -> None:
    key = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
    forms = [key.export_private_key(form).decode() for form in ("openssh", "pkcs1-pem", "pkcs8-pem")]
    proof = proof_of(CLAIM, login(forms[0]))
    assert all(is_valid(CLAIM, proof, login(form)) for form in forms)
    assert is_valid(CLAIM, proof, login(forms[1].replace("\n", "\\n")))


def test_keys_that_make_no_proofs_are_refused_in_one_line() -> None:
    with pytest.raises(BadRequest, match="a key of type ssh-dss cannot sign a placement"):
        proof_of(CLAIM, login(new_key("ssh-dss", "pkcs1-pem")))
    encrypted = asyncssh.generate_private_key("ssh-ed25519").export_private_key("pkcs8-pem", passphrase="x")
    with pytest.raises(BadRequest, match="the key is encrypted"):
        proof_of(CLAIM, login(encrypted.decode()))
    with pytest.raises(BadRequest, match="a field contains NUL"):
        proof_of(replace(CLAIM, host="kvm2\0"), login(KEY))


# --- what is no proof

OTHERS: list[Signable] = [
    replace(CLAIM, owner="netloom/phys-2"),
    replace(CLAIM, scope_id="net-43"),
    replace(CLAIM, scope_id="vpc-42"),
    replace(CLAIM, epoch=3),
    replace(CLAIM, epoch=5),
    replace(CLAIM, host="kvm3"),
    replace(CLAIM, owner="netloom/phys-1\0net-42", scope_id="4"),
    EvacuationClaim("netloom/phys-1", "net-42", 4, "kvm2"),  # the same fields
    StandbyClaim("netloom/phys-1", "net-42", 4, "kvm2"),
]


@pytest.mark.parametrize("credentials", [login(KEY), login(password="Sesame-1")], ids=["key", "password"])
def test_a_proof_is_for_one_owner_scope_epoch_and_host(credentials: Login) -> None:
    proof = proof_of(CLAIM, credentials)
    assert is_valid(CLAIM, proof, credentials)
    assert is_valid(replace(CLAIM, host="KVM2"), proof, credentials)  # DNS does not distinguish them
    for other in OTHERS:
        assert not is_valid(other, proof, credentials), other
    dead = proof_of(DEAD, credentials)
    for that in (
        replace(DEAD, owner="x"),
        replace(DEAD, dead="kvm3"),
        replace(DEAD, until=DEAD.until + 1),
        replace(DEAD, host="kvm3"),
    ):
        assert not is_valid(that, dead, credentials), that


def test_a_signature_is_for_one_purpose() -> None:
    """No text that is signed for a proof is one that SSH signs: those begin with a length, or with SSHSIG."""
    for claim in (CLAIM, DEAD, replace(CLAIM, owner="SSHSIG")):
        assert claim.text.startswith(b"netloom ")
        assert int.from_bytes(claim.text[:4], "big") > 1 << 30  # as the length of a session id


def test_sha1_is_not_accepted() -> None:
    key = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
    credentials = login(key.export_private_key().decode())
    for algorithm, expected in ((b"ssh-rsa", False), (b"rsa-sha2-256", False), (b"rsa-sha2-512", True)):
        proof = "key:" + base64.b64encode(key.sign(CLAIM.text, algorithm)).decode()
        assert is_valid(CLAIM, proof, credentials) is expected


@pytest.mark.mutation("a-proof-is-short")
def test_a_long_proof_does_not_count() -> None:
    credentials = login(KEY)
    proof = proof_of(CLAIM, credentials)
    assert is_valid(CLAIM, f"{proof},x", credentials)
    assert not is_valid(CLAIM, f"{proof},{'x' * PROOF_CHARACTERS_MAX}", credentials)


GARBAGE = ["", "key:", "mac:", "key:,mac:", "key:====", "key:!", "key:AAAA", "mac:AAAA", "\0", "key:\xff", "x" * 5000]


def pieces(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


@given(
    st.one_of(
        st.sampled_from(GARBAGE),
        st.text(),
        st.binary(max_size=200).map(lambda it: "key:" + base64.b64encode(it).decode()),
        st.binary(max_size=200).map(
            lambda it: "key:" + base64.b64encode(pieces(b"ecdsa-sha2-nistp256", pieces(it[:40], it[40:]))).decode()
        ),
        st.binary(max_size=300).map(lambda it: "key:" + base64.b64encode(pieces(b"rsa-sha2-512", it)).decode()),
        st.binary(max_size=300).map(lambda it: "key:" + base64.b64encode(pieces(b"ssh-ed25519", it)).decode()),
    )
)
def test_any_text_is_a_proof_or_none(text: str) -> None:
    for credentials in CREDENTIALS:
        assert not asyncio.run(credentials.holds(CLAIM, text))


CREDENTIALS = [
    Credentials(login(new_key(kind), "Sesame-1")) for kind in ("ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa")
]


@pytest.mark.mutation("a-proof-is-a-signature", instead="data.startswith(head)")
@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_proof_with_one_changed_byte_is_none(position: int, change: int) -> None:
    proof = proof_of(CLAIM, login(KEY))
    signature = bytearray(base64.b64decode(proof.removeprefix("key:")))
    signature[position % len(signature)] ^= change
    assert not is_valid(CLAIM, "key:" + base64.b64encode(signature).decode(), login(KEY))


# --- passwords


def test_a_proof_by_key_or_password_counts_if_both_are_registered() -> None:
    both = login(KEY, "Sesame-1")
    assert is_valid(CLAIM, proof_of(CLAIM, login(KEY)), both)
    assert is_valid(CLAIM, proof_of(CLAIM, login(password="Sesame-1")), both)
    assert is_valid(CLAIM, proof_of(CLAIM, both), login(KEY))
    for wrong in (login(STRANGER), login(password="Sesame-2")):
        assert not is_valid(CLAIM, proof_of(CLAIM, wrong), both)


def test_credentials_that_are_not_registered_do_not_count(tmp_path: Path) -> None:
    home = with_identity(tmp_path, "id_ed25519", KEY)
    for other in (login(password="Sesame-1"), login(STRANGER)):
        assert not is_valid(CLAIM, proof_of(CLAIM, login(home=home)), replace(other, home=home))


def test_a_password_is_not_used_itself() -> None:
    """Others see the proof. It is made with a derived key, so that trying passwords takes time and memory."""
    proof = proof_of(CLAIM, login(password="Sesame-1"))
    salt = b"netloom proof 2\0netloom/phys-1"
    seed = hashlib.scrypt(b"Sesame-1", salt=salt, n=1 << 16, r=8, p=1, dklen=32, maxmem=1 << 27)
    signature = Ed25519PrivateKey.from_private_bytes(seed).sign(CLAIM.text)
    assert proof == "key:" + base64.b64encode(pieces(b"ssh-ed25519", signature)).decode()
    other = proof_of(replace(CLAIM, owner="x"), login(password="Sesame-1"))
    assert other != proof


@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
@settings(max_examples=10, deadline=None)
def test_any_password_and_owner(password: str, owner: str) -> None:
    claim = replace(CLAIM, owner=owner.replace("\0", ""))
    assert is_valid(claim, proof_of(claim, login(password=password)), login(password=password))


# --- what a host says


def heard(reply: Reply, *, host: str = "kvm2", stored: str = "kvm1", left_s: float = 10) -> HostAnswer:
    """What a reply of ``host`` is worth, while ``stored`` is silent."""
    hosts = Hosts(login(KEY), None, Deadline(left_s, time.monotonic()), Pool(), Progress(), installs=False)
    call = Call(
        call_id="a", command="implement-network", scope_id="net-42", registration=Registration(owner=CLAIM.owner)
    )
    situation = Situation(scope_id="net-42", order=("kvm2", "KVM3"), stored=stored, previous=("kvm0",))
    return asyncio.run(Inquiry(hosts, call).answer(situation, host, reply))


def record(dead: str, *, left_s: int = 600, key: str = KEY, host: str = "kvm2", owner: str = CLAIM.owner) -> Evacuated:
    until = int(time.time()) + left_s
    proof = proof_of(EvacuationClaim(owner, dead, until, host), login(key))
    return Evacuated(host=dead, until=until, proof=proof)


def test_a_claim_is_verified() -> None:
    proof = proof_of(CLAIM, login(KEY))
    reply = Reply(call_id="a", holds=True, gate="open", epoch=4, proof=proof)
    assert heard(reply) == HostAnswer(holds=True, gate="open", epoch=4, is_proven=True)
    for other in (
        structs.replace(reply, proof=""),
        structs.replace(reply, epoch=5),
        structs.replace(reply, holds=False),
        structs.replace(reply, moved_to="kvm3"),
        structs.replace(reply, proof=proof_of(CLAIM, login(STRANGER))),
    ):
        assert not heard(other).is_proven, other
    assert not heard(reply, host="KVM3").is_proven
    for epoch in (-1, 1 << 53, (1 << 64) - 1):
        assert heard(structs.replace(reply, epoch=epoch)).failure == f"kvm2: its agent says that the epoch is {epoch}"


@pytest.mark.mutation("a-standbys-proof-has-a-beginning")
def test_the_proof_of_a_standby_holds_from_its_number_on() -> None:
    proof = proof_of(STANDBY, login(KEY))
    group = StandbyReply(group_id="1a2b3c4d", host="kvm1", witness="kvm3", term=5, serving=True)
    reply = Reply(call_id="a", holds=True, gate="open", epoch=9, proof=proof, proof_from=4, standby=group)
    assert heard(reply) == HostAnswer(holds=True, gate="open", epoch=9, is_proven=True, standby=group)
    copy = structs.replace(reply, holds=False, gate="standby", moved_to="kvm1")
    assert heard(copy).is_proven and heard(copy).stands_by
    for other in (
        structs.replace(reply, proof_from=0),
        structs.replace(reply, proof_from=5),
        structs.replace(reply, proof_from=-4),
        structs.replace(reply, epoch=3),
        structs.replace(reply, holds=False),
        structs.replace(reply, moved_to="kvm3"),
        structs.replace(copy, moved_to=""),
        structs.replace(reply, proof=proof_of(StandbyClaim("x", "net-42", 4, "kvm2"), login(KEY))),
        structs.replace(reply, proof=proof_of(StandbyClaim(STANDBY.owner, "net-43", 4, "kvm2"), login(KEY))),
        structs.replace(reply, proof=proof_of(StandbyClaim(STANDBY.owner, "net-42", 4, "kvm3"), login(KEY))),
        structs.replace(reply, proof=proof_of(PlacementClaim(STANDBY.owner, "net-42", 4, "kvm2"), login(KEY))),
        structs.replace(reply, proof=proof_of(STANDBY, login(STRANGER))),
    ):
        assert not heard(other).is_proven, other
    assert not heard(reply, host="KVM3").is_proven


def test_an_active_host_without_a_lease_does_not_serve() -> None:
    group = StandbyReply(group_id="1a2b3c4d", host="kvm1", witness="kvm3", term=5)
    answer = heard(Reply(call_id="a", holds=True, gate="open", epoch=9, standby=group))
    assert (answer.gate, answer.holds, answer.serves, answer.is_moving) == ("standby", True, False, True)


@pytest.mark.mutation("an-evacuation-ends")
def test_a_record_of_a_dead_host_expires() -> None:
    assert heard(Reply(call_id="a", evacuated=(record("kvm1", left_s=-60),))).evacuated == frozenset()


@pytest.mark.mutation("an-evacuation-needs-a-proof")
def test_a_record_of_a_dead_host_is_verified() -> None:
    good = record("kvm1")
    expired = record("kvm1", left_s=-60)
    refused = [
        structs.replace(good, proof=""),
        structs.replace(good, until=good.until + 1),
        expired,
        structs.replace(expired, until=good.until),
        record("kvm1", key=STRANGER),
        record("kvm1", host="kvm3"),
        record("kvm1", owner="x"),
        record("kvm9"),
        structs.replace(record("kvm9"), host="kvm1"),
    ]
    for each in refused:
        assert heard(Reply(call_id="a", evacuated=(each,))).evacuated == frozenset(), each
    assert heard(Reply(call_id="a", evacuated=(*refused, good))).evacuated == {"kvm1"}


def test_records_are_spelled_as_in_the_registration_and_bounded() -> None:
    some = (record("KVM1"), record("kvm3"), record("kvm0"))
    assert heard(Reply(call_id="a", evacuated=some)).evacuated == {"kvm1", "KVM3", "kvm0"}
    many = tuple(structs.replace(record("kvm1"), proof="x" * 3000) for _ in range(100))
    assert heard(Reply(call_id="a", evacuated=(*many, *some))).evacuated == frozenset()


def test_the_stored_host_needs_no_proof_and_gives_none() -> None:
    reply = Reply(call_id="a", holds=True, gate="passive", epoch=4, error="why", proof="x", evacuated=(record("kvm1"),))
    expected = HostAnswer(holds=True, gate="passive", epoch=4, why="why")
    assert heard(reply, host="kvm1") == expected
    assert heard(structs.replace(reply, status=3), host="kvm1") == expected
    assert heard(Reply(call_id="a", status=3, error="no"), host="kvm1") == HostAnswer(failure="kvm1: no")


def test_a_proof_that_is_not_verified_in_time_does_not_count(tmp_path: Path) -> None:
    """The caller's SSH agent hangs."""
    reply = Reply(call_id="a", holds=True, gate="open", epoch=4, proof=proof_of(CLAIM, login(KEY)))
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / "agent"))
        hung.listen(8)
        credentials = login(agent=str(tmp_path / "agent"))
        hosts = Hosts(credentials, None, Deadline(1, time.monotonic()), Pool(), Progress(), installs=False)
        call = Call(call_id="a", command="x", scope_id="net-42", registration=Registration(owner=CLAIM.owner))
        situation = Situation(scope_id="net-42", order=("kvm2",), stored="kvm1")
        answer = asyncio.run(Inquiry(hosts, call).answer(situation, "kvm2", reply))
    assert answer == HostAnswer(holds=True, gate="open", epoch=4)


# --- the caller's own keys


def with_identity(directory: Path, name: str, key: str) -> str:
    (directory / ".ssh").mkdir(exist_ok=True)
    (directory / ".ssh" / name).write_text(key)
    (directory / ".ssh" / name).chmod(0o600)
    return str(directory)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """The socket of an SSH agent without keys."""
    path = str(tmp_path / "agent.sock")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it listens by then
    yield path
    process.send_signal(signal.SIGTERM)
    process.wait()
    process.stdout.close()


def add(agent: str, directory: Path, key: str) -> None:
    file = directory / "key"
    file.write_text(key)
    file.chmod(0o600)
    environ = {**os.environ, "SSH_AUTH_SOCK": agent}
    subprocess.run(["ssh-add", "-q", str(file)], env=environ, check=True, capture_output=True)


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-sha2-nistp384", "ssh-rsa"])
def test_a_key_of_an_ssh_agent_proves_what_the_registered_key_proves(kind: str, agent: str, tmp_path: Path) -> None:
    """The operator has the registered key in an SSH agent, and other keys besides."""
    key = new_key(kind)
    add(agent, tmp_path, STRANGER)
    add(agent, tmp_path, key)
    home = with_identity(tmp_path, "id_ed25519", new_key())
    proof = proof_of(CLAIM, login(agent=agent, home=home))
    assert len(proof) <= PROOF_CHARACTERS_MAX
    assert is_valid(CLAIM, proof, login(key))
    assert not is_valid(CLAIM, proof, login(new_key(kind)))
    assert is_valid(CLAIM, proof, login(agent=agent))
    assert is_valid(CLAIM, proof, login(home=home))


def test_an_operator_with_very_many_keys(agent: str, tmp_path: Path) -> None:
    for _ in range(60):
        add(agent, tmp_path, new_key())
    assert len(proof_of(CLAIM, login(agent=agent))) <= PROOF_CHARACTERS_MAX


def test_without_a_key_that_signs_there_is_a_remedy(agent: str, tmp_path: Path) -> None:
    for credentials in (login(), login(agent=agent), login(agent=str(tmp_path / "none"), home=str(tmp_path))):
        with pytest.raises(LoginRefused, match="use the credentials of the registration"):
            proof_of(CLAIM, credentials)
    assert not is_valid(CLAIM, proof_of(CLAIM, login(KEY)), login(agent=agent))
