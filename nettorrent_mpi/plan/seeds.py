"""Where every random number of a run begins: a key made of (seed, purpose, numbers), the same on every rank."""

from __future__ import annotations

import hashlib


def key(seed: int, purpose: str, *numbers: int | str) -> int:
    """A 64-bit key for one use of randomness.

    `purpose` tells the uses apart ("initial", "dropout", "order", "augment", ...); `numbers` say which one (a layer's
    name, an epoch, a step). Never the rank or the number of ranks: parallel has to equal serial.
    """
    text = "/".join(str(part) for part in (seed, purpose, *numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
