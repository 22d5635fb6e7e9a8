"""Lossy compression makes the messages between replicas smaller; error feedback sends the omitted part later.

CHOCO-SGD (Koloskova, Stich, Jaggi 2019, arXiv 1902.00340): along an edge a -> b both ends hold the same estimate x_hat
of a's values. In a round a sends q = C(x_a - x_hat), both ends add q to x_hat, and both move by gamma times the
pairing's weight times x_hat, b up and a down. What a message omits stays in x_a - x_hat and goes with a later one, so
nothing is lost for good, however coarse C is; and because the two ends move by the same numbers, the sum over the
replicas is preserved.

A device encodes and decodes (ops.encode, ops.decode_add). All codecs are deterministic and, for finite values within
their range, contractions: ||x - C(x)||^2 <= (1 - delta) ||x||^2 with delta > 0.
"""

from __future__ import annotations

import math

from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.exchange_specs import TopK
from nettorrent_mpi.plan.specs import Spec

INT8_BLOCK, SIGN_BLOCK = 1024, 128  # elements that have one scale

# CHOCO's step for each codec, unless the user gives one. Found by gossip as above with 2 to 16 replicas of 1000
# elements on rings, grids, hypercubes, complete, finite, exponential and shuffled graphs, from differences that are
# normally distributed, or that times exp(2 normal):
# float16, int8: 1 is quickest, as without codec; 1.4 settles, too.
# sign: quick from 0.25 to 1; under constant noise the replicas stay nearest to each other from 0.5 to 0.85. Signs times
#   a mean alone (Karimireddy et al. 2019, arXiv 1901.09847) have delta = ||x||_1^2 / (n ||x||_2^2) for a block of n:
#   2/pi where values are normally distributed, but down to 1/n with outliers. An outlier then takes about n messages to
#   arrive; gossip, going by old estimates for so long, swings up (on the exponential graph of 16 already at a gamma of
#   0.03). With the largest value apart, as here, delta is at least 2 / (sqrt(n) + 1).
# topk: an element waits for up to 1 / fraction messages, and who goes by older news must go slower: quickest from 1 to
#   1.6 times the fraction; settles everywhere up to 1.8 times, on dense graphs not any more from 2.5 to 3 times.
_GAMMAS = {"float16": 1.0, "int8": 1.0, "sign": 0.5}


class MessageFormat:
    """A MessageFormat gives the length of compressed messages and CHOCO's step, `gamma`, for any spec in COMPRESSIONS
    but `none`.

    Raises ConfigError for a fraction out of range.
    """

    def __init__(self, spec: Spec):
        self.kind = spec.kind
        self._fraction = spec.fraction if isinstance(spec, TopK) else 1.0
        if not 0.0 < self._fraction <= 1.0:
            key = "exchange.gossip.compress.topk.fraction"
            raise ConfigError(f"{self._fraction} is not a part of all elements: above 0, at most 1", key=key)
        self.gamma = min(1.2 * self._fraction, 1.0) if isinstance(spec, TopK) else _GAMMAS[spec.kind]

    def bytes(self, size: int) -> int:
        """Return the length of the message about `size` elements, of float32 or float64."""
        if self.kind == "float16":
            return 2 * size
        if self.kind == "int8":
            return 4 * -(-size // INT8_BLOCK) + size
        if self.kind == "sign":
            return 9 * -(-size // SIGN_BLOCK) + -(-size // 8)
        return 8 * self.count(size)

    def count(self, size: int) -> int:
        """Return how many of `size` elements topk sends: that fraction, rounded up, at least one."""
        exact = self._fraction * size
        return min(size, max(1, math.ceil(exact - 1e-12 * exact)))  # 0.07 * 100 is a little more than 7
