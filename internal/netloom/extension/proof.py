"""Who may serve a scope while its stored host is silent: signatures with the registration's credentials.

An operator's command signs a claim, a host keeps the signature and shows it, and a call of CloudStack verifies it. A
host does not have the credentials, so it cannot make a proof. With password logins a hostile host learns the password
at the login, and can; see docs/operators/threat-model.md.

A proof is printable ASCII: signatures, separated by commas, of which one has to be right. ``key:`` is followed by an
SSH signature in base64. A password signs with an Ed25519 key that is derived from it, so hosts can verify and not sign.

Agents get the public keys (``Credentials.signers``): they verify what other hosts claim on the wire (claimwire.py).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
from collections.abc import Iterable

import asyncssh
from asyncssh.agent import SSHAgentKeyPair
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from netloom.claimwire import KEY, Signable
from netloom.errors import BadRequest, LoginRefused
from netloom.extension.ssh import Login, agent_keys, own_keys, parse_key
from netloom.secret import Secret
from netloom.wire import Signers

KEYS_MAX = 16  # that agents get
PROOF_CHARACTERS_MAX = 4096  # one signature of an RSA key of 16,384 bits, or several of shorter keys

# How each type of key signs. No SHA-1, and no security keys: somebody would have to touch them for each signature.
_ALGORITHMS = {
    "ssh-ed25519": "ssh-ed25519",
    "ssh-ed448": "ssh-ed448",
    "ecdsa-sha2-nistp256": "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384": "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521": "ecdsa-sha2-nistp521",
    "ecdsa-sha2-1.3.132.0.10": "ecdsa-sha2-1.3.132.0.10",
    "ssh-rsa": "rsa-sha2-512",
}

# Any host of a VLAN may hear a signature during an evacuation and try passwords: each try takes 64 MiB and 0.2 s.
_SCRYPT = {"n": 1 << 16, "r": 8, "p": 1}


async def sign(login: Login, claim: Signable) -> str:
    """The proof of the claim, by the credentials of ``login``. See Credentials.sign."""
    return await Credentials(login).sign(claim)


async def holds(login: Login, claim: Signable, proof: str) -> bool:
    """Whether ``proof`` proves the claim, for a registration with the credentials of ``login``."""
    return await Credentials(login).holds(claim, proof)


class Credentials:
    """The credentials of one login, for many claims: keys are read and derived once."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self._public_keys: list[asyncssh.SSHKey] | None = None

    async def sign(self, claim: Signable) -> str:
        """The proof of the claim, at most PROOF_CHARACTERS_MAX characters.

        It is made by the method of the login. If that is the caller's own keys, each of them signs, because only the
        management server knows which of them it uses. Raises BadRequest and LoginRefused when there is no key that can
        sign.
        """
        login = self._login
        try:
            text = claim.text
        except ValueError as error:
            raise BadRequest(f"a placement cannot be signed: {error}") from error
        if login.method == "sshkey":
            return _signature(parse_key(login.sshkey), text)
        if login.method == "password":
            return _signature(await _password_key(login.password, claim.owner), text)
        signatures = [await _agent_signature(pair, text) for pair in await agent_keys(login.ssh_auth_sock)]
        signatures += [_signature(key, text) for key in own_keys(login.home) if _algorithm(key)]
        proof = ""
        for signature in dict.fromkeys(filter(None, signatures)):
            longer = f"{proof},{signature}" if proof else signature
            proof = longer if len(longer) <= PROOF_CHARACTERS_MAX else proof
        if not proof:
            raise LoginRefused(
                "nothing to sign the placement with: neither the SSH agent nor the calling user has a key that signs",
                hint="use the credentials of the registration: --sshkey or --ask-password",
            )
        return proof

    async def holds(self, claim: Signable, proof: str) -> bool:
        """Whether ``proof`` proves the claim. ``proof`` may be any text; it comes from a host."""
        try:
            text = claim.text
        except ValueError:
            return False
        if len(proof) > PROOF_CHARACTERS_MAX or not proof.isascii():  # guard: a-proof-is-short
            return False
        signatures = [it.removeprefix(KEY) for it in proof.split(",") if it.startswith(KEY)]
        return bool(signatures) and _is_signed(signatures, await self._verifying_keys(claim.owner), text)

    async def signers(self, owner: str, host: str) -> Signers:
        """What the agent of ``host`` needs to verify claims of the owner's scopes. It is no secret."""
        keys = [it for it in await self._verifying_keys(owner) if _algorithm(it)]
        return Signers(host=host, keys=tuple(it.export_public_key("pkcs8-der") for it in keys[:KEYS_MAX]))

    async def _verifying_keys(self, owner: str) -> list[asyncssh.SSHKey]:
        """The keys whose signatures count: the registered one, that of the registered password, or the caller's own
        where nothing is registered."""
        if self._public_keys is None:
            login = self._login
            if login.sshkey:
                self._public_keys = [parse_key(login.sshkey).convert_to_public()]
            elif login.method == "own keys":
                pairs = await agent_keys(login.ssh_auth_sock)
                self._public_keys = [_public(pair) for pair in pairs if _pair_algorithm(pair)]
                self._public_keys += [key.convert_to_public() for key in own_keys(login.home)]
            else:
                self._public_keys = []
        if not self._login.password:
            return self._public_keys
        return [*self._public_keys, (await _password_key(self._login.password, owner)).convert_to_public()]


async def _password_key(password: Secret, owner: str) -> asyncssh.SSHKey:
    """The key that signs for a registration with a password: derived from the password and the owner."""
    return await asyncio.to_thread(_derived_key, password, owner)


@functools.lru_cache(maxsize=16)  # each call of CloudStack hands the public key out
def _derived_key(password: Secret, owner: str) -> asyncssh.SSHKey:
    salt = b"netloom proof 2\0" + owner.encode("utf-8", "surrogatepass")
    secret = password.reveal().encode("utf-8", "surrogatepass")
    # Not hashlib's: the interpreter of the one file has none.
    seed = Scrypt(salt=salt, length=32, **_SCRYPT).derive(secret)
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return asyncssh.import_private_key(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def _algorithm(key: asyncssh.SSHKey) -> str:
    """How the key signs; empty for a type of key that makes no proofs."""
    return _ALGORITHMS.get(key.get_algorithm(), "")


def _signature(key: asyncssh.SSHKey, text: bytes) -> str:
    algorithm = _algorithm(key)
    if not algorithm:
        raise BadRequest(
            f"sshkey: a key of type {key.get_algorithm()} cannot sign a placement", hint="use Ed25519, ECDSA or RSA"
        )
    return KEY + base64.b64encode(key.sign(text, algorithm.encode())).decode()


def _pair_algorithm(pair: asyncssh.SSHKeyPair) -> str:
    """The same for a key of an SSH agent; empty for a certificate, whose key the agent has, too."""
    return "" if pair.has_cert else _ALGORITHMS.get(pair.key_algorithm.decode("ascii", "replace"), "")


async def _agent_signature(pair: asyncssh.SSHKeyPair, text: bytes) -> str:
    """The signature of a key of an SSH agent; empty when the agent does not sign (it is locked, the user says no)."""
    algorithm = _pair_algorithm(pair)
    if not algorithm:
        return ""
    assert isinstance(pair, SSHAgentKeyPair)
    pair.set_sig_algorithm(algorithm.encode())
    try:
        return KEY + base64.b64encode(await pair.sign_async(text)).decode()
    except (OSError, ValueError, asyncssh.Error):
        return ""


def _public(pair: asyncssh.SSHKeyPair) -> asyncssh.SSHKey:
    return asyncssh.import_public_key(pair.key_algorithm + b" " + base64.b64encode(pair.key_public_data))


def _is_signed(signatures: Iterable[str], keys: Iterable[asyncssh.SSHKey], text: bytes) -> bool:
    for key in keys:
        algorithm = _algorithm(key).encode()
        head = len(algorithm).to_bytes(4, "big") + algorithm
        for signature in signatures:
            try:
                data = base64.b64decode(signature, validate=True)
                if data.startswith(head) and key.verify(text, data):  # guard: a-proof-is-a-signature
                    return True
            except (binascii.Error, ValueError, TypeError, OverflowError):  # a signature is any bytes
                continue
    return False
