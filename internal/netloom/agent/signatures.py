"""Verify signatures of SSH keys with public keys, without an SSH library.

The management server signs with asyncssh; an agent only verifies, and rarely. So cryptography is imported by the first
signature: that takes 50 ms.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

_ED25519, _ED448, _RSA = b"ssh-ed25519", b"ssh-ed448", b"rsa-sha2-512"
# ECDSA by curve, as cryptography names it: the name of the algorithm and of the hash.
_CURVES = {
    "secp256r1": (b"ecdsa-sha2-nistp256", "SHA256"),
    "secp384r1": (b"ecdsa-sha2-nistp384", "SHA384"),
    "secp521r1": (b"ecdsa-sha2-nistp521", "SHA512"),
    "secp256k1": (b"ecdsa-sha2-1.3.132.0.10", "SHA256"),
}
_NUMBER_BYTES_MAX = 67  # of the curve with the largest ones, with a zero in front


def checks(keys: Sequence[bytes], signatures: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a key and a signature that are worth a verification: of the same algorithm."""
    for signature in signatures:
        algorithm = _pieces(signature)[:1]
        for key in keys:
            if algorithm == [_algorithm(key)]:
                yield key, signature


def is_signed(key: bytes, signature: bytes, text: bytes) -> bool:
    """Whether the signature of ``text`` is by this key. ``key``: SubjectPublicKeyInfo in DER. Never raises."""
    from cryptography.exceptions import InvalidSignature  # cryptography: three starts of the agent's relay
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    public = _loaded(key)
    pieces = _pieces(signature)
    if public is None or len(pieces) != 2 or pieces[0] != _algorithm(key):
        return False
    signed = pieces[1]
    try:
        if isinstance(public, rsa.RSAPublicKey):
            public.verify(signed, text, padding.PKCS1v15(), hashes.SHA512())
        elif isinstance(public, ec.EllipticCurvePublicKey):
            numbers = _pieces(signed)
            if len(numbers) != 2 or max(map(len, numbers)) > _NUMBER_BYTES_MAX:
                return False
            r, s = (int.from_bytes(it, "big") for it in numbers)
            used: Any = getattr(hashes, _CURVES[public.curve.name][1])()
            public.verify(encode_dss_signature(r, s), text, ec.ECDSA(used))
        else:
            public.verify(signed, text)
    except (InvalidSignature, ValueError):  # guard: a-claim-is-signed
        return False
    return True


@functools.lru_cache(maxsize=64)
def _loaded(key: bytes) -> Any:
    """The public key; None for one that makes no proofs."""
    from cryptography.exceptions import UnsupportedAlgorithm  # as in is_signed
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        public = load_der_public_key(key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    usable = ed25519.Ed25519PublicKey, ed448.Ed448PublicKey, rsa.RSAPublicKey, ec.EllipticCurvePublicKey
    if not isinstance(public, usable):
        return None
    return None if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name not in _CURVES else public


@functools.lru_cache(maxsize=64)
def _algorithm(key: bytes) -> bytes:
    """The name of the key's signatures in SSH; empty for a key that makes no proofs."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519  # as in is_signed

    public = _loaded(key)
    if public is None:
        return b""
    if isinstance(public, ec.EllipticCurvePublicKey):
        return _CURVES[public.curve.name][0]
    if isinstance(public, ed25519.Ed25519PublicKey):
        return _ED25519
    return _ED448 if isinstance(public, ed448.Ed448PublicKey) else _RSA


def _pieces(data: bytes) -> list[bytes]:
    """The byte strings of which ``data`` consists (RFC 4251, section 5), at most two; empty if it is something else."""
    found: list[bytes] = []
    while data:
        length = int.from_bytes(data[:4], "big")
        if len(data) < 4 + length or len(data) < 4 or len(found) == 2:
            return []
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found
