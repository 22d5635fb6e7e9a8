"""Seeds: every random number of a run starts from a key made of (seed, purpose, numbers), the same on every rank."""

from __future__ import annotations

import hashlib


def key(seed: int, purpose: str, *numbers: int | str) -> int:
    """Return a 64-bit key for one use of randomness.

    `purpose` distinguishes the uses ("initial", "dropout", "order", "augment", ...); `numbers` identify one of them (a
    layer's name, an epoch, a step). Never the rank or the number of ranks: parallel has to equal serial.
    """
    text = "/".join(str(part) for part in (seed, purpose, *numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
