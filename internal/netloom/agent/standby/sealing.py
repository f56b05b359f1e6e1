"""The cryptography of the connections between two hosts: AES-GCM and X25519.

Most hosts belong to no group, so cryptography is imported by the first connection. That takes 50 ms.
"""

from __future__ import annotations

from netloom.pairwire import TAG_BYTES, PairError

_COUNTER_BYTES = 12  # the nonce of AES-GCM


class AesGcm:
    """A ``pairwire.Cipher``. No number may be used twice with a key."""

    def __init__(self, key: bytes) -> None:
        from cryptography.exceptions import InvalidTag  # cryptography: three starts of the agent's relay
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(key)
        self._refused = InvalidTag

    def encrypt(self, number: int, text: bytes) -> bytes:
        return self._cipher.encrypt(number.to_bytes(_COUNTER_BYTES, "big"), text, None)

    def decrypt(self, number: int, sealed: memoryview) -> bytes | None:
        if len(sealed) < TAG_BYTES:
            return None
        try:
            return self._cipher.decrypt(number.to_bytes(_COUNTER_BYTES, "big"), sealed, None)
        except self._refused:  # guard: a-record-is-authentic
            return None


class Agreement:
    """The X25519 key of one end of one connection. ``nonce``: the public key, new and random."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # as in AesGcm

        self._key = X25519PrivateKey.generate()
        self.nonce = self._key.public_key().public_bytes_raw()

    def agreed(self, nonce: bytes) -> bytes:
        """What both ends compute, 32 bytes. ``nonce``: of the other end, authenticated. Raises PairError."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey  # as in AesGcm

        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(nonce))
        except ValueError:  # a point of a small group, or not 32 bytes
            raise PairError("the nonce of the other host is no public key") from None
