"""Agents verify with public keys what the management side has signed: every type of key, and nothing else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import netloom
from netloom.agent.signatures import checks, is_signed
from netloom.claimwire import Claim, PlacementClaim, signatures_in
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.proof import Credentials
from netloom.extension.ssh import Login
from netloom.secret import Secret

CLAIM = PlacementClaim("netloom/phys-1", "net-42", 4, "kvm2")
KINDS = (
    "ssh-ed25519",
    "ssh-ed448",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ecdsa-sha2-1.3.132.0.10",
    "ssh-rsa",
)


def credentials(kind: str = "", password: str = "") -> Credentials:
    key = asyncssh.generate_private_key(kind).export_private_key().decode() if kind else ""
    trust = Trust((), KnownHosts("/nonexistent"))
    return Credentials(Login(trust, sshkey=Secret(key), password=Secret(password)))


ALL = {kind: credentials(kind) for kind in KINDS}
ALL["password"] = credentials(password="Sesame-1")


def keys(signer: Credentials, owner: str = CLAIM.owner) -> tuple[bytes, ...]:
    return asyncio.run(signer.signers(owner, "kvm1")).keys


def signed(signer: Credentials, claim: Claim = CLAIM) -> list[bytes]:
    return signatures_in(asyncio.run(signer.sign(claim)))


def verified(public: tuple[bytes, ...], signatures: list[bytes], claim: Claim = CLAIM) -> bool:
    return any(is_signed(key, signature, claim.text) for key, signature in checks(public, signatures))


@pytest.mark.mutation("a-claim-is-signed")
@pytest.mark.parametrize("name", ALL)
def test_each_kind_of_key_is_verified_and_no_other_key_is_taken(name: str) -> None:
    signatures = signed(ALL[name])
    for other, signer in ALL.items():
        assert verified(keys(signer), signatures) is (other == name)
    assert not verified(keys(ALL[name]), signatures, replace(CLAIM, epoch=5))
    again = credentials(password="Sesame-2") if name == "password" else credentials(name)
    assert not verified(keys(again), signatures)
    every = tuple(key for signer in ALL.values() for key in keys(signer))
    assert len(list(checks(every, signatures))) == (2 if name in ("ssh-ed25519", "password") else 1)


def test_what_an_agent_gets_is_public() -> None:
    """The key that is derived from a password is another one for another owner."""
    signers = asyncio.run(ALL["password"].signers(CLAIM.owner, "kvm1"))
    assert signers.host == "kvm1"
    assert [asyncssh.import_public_key(it).get_algorithm() for it in signers.keys] == ["ssh-ed25519"]
    for it in signers.keys:
        with pytest.raises(asyncssh.KeyImportError):
            asyncssh.import_private_key(it)
    assert keys(ALL["password"], "x") != signers.keys
    assert keys(ALL["password"], "x\0y\ud800") != signers.keys  # any text


def test_a_registration_with_both_hands_out_both_keys() -> None:
    key = asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()
    both = Credentials(Login(Trust((), KnownHosts("/nonexistent")), sshkey=Secret(key), password=Secret("Sesame-1")))
    assert len(keys(both)) == 2
    assert verified(keys(both), signed(ALL["password"]))


def test_sha1_is_not_accepted() -> None:
    key = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
    public = (key.convert_to_public().export_public_key("pkcs8-der"),)
    for algorithm, expected in ((b"ssh-rsa", False), (b"rsa-sha2-256", False), (b"rsa-sha2-512", True)):
        assert verified(public, [key.sign(CLAIM.text, algorithm)]) is expected


def test_keys_that_make_no_proofs_are_ignored() -> None:
    dsa = asyncssh.generate_private_key("ssh-dss")
    public = dsa.convert_to_public().export_public_key("pkcs8-der")
    signature = dsa.sign(CLAIM.text, b"ssh-dss")
    assert not verified((public, b"", b"x", b"\x30\0"), [signature, b""])
    assert not is_signed(public, signature, CLAIM.text)


def piece(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


PUBLIC = tuple(key for signer in ALL.values() for key in keys(signer))
NAMES = [it.encode() for it in KINDS[:-1]] + [b"rsa-sha2-512", b""]


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=100),
        st.tuples(st.sampled_from(NAMES), st.binary(max_size=150)).map(lambda it: piece(it[0]) + piece(it[1])),
        st.tuples(st.sampled_from(NAMES), st.binary(max_size=80), st.binary(max_size=80)).map(
            lambda it: piece(it[0]) + piece(piece(it[1]) + piece(it[2]))
        ),
    )
)
def test_any_bytes_are_no_signature(data: bytes) -> None:
    assert not verified(PUBLIC, [data])
    assert not any(is_signed(key, data, CLAIM.text) for key in PUBLIC)


def test_the_agent_starts_without_cryptography() -> None:
    """It is imported with the first signature."""
    program = "import sys, netloom.agent.serve; sys.exit('cryptography' in sys.modules or 'asyncssh' in sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(Path(netloom.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=environ, timeout=60).returncode == 0
