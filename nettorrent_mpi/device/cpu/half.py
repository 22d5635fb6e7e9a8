"""Conversion of float32 to float16 and back, at a speed that does not depend on the values.

NumPy's casts take 2.5 ns per element, and 1.7 back, but 65 and 8 below 6e-5, where float16 is subnormal. These take 1.8
and 1.6 (2,000,000 elements in pieces of 32768, one core of an AMD EPYC of family 25, NumPy 2.4).

Let p be the largest power of two in |x|, but at least 2^-14. The float16 numbers between p and 2p are the multiples of
2^-10 p, and these are float32's steps between M = 2^13 p and 2M. So |x| + M is |x| rounded, and the difference of its
bits to M's counts the steps from 0: up to 1024 if |x| < 2^-14, from 1024 to 2048 otherwise. No subnormal float32 occurs
on the way, which a process may be configured to treat as 0.
"""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.flat import Operations

_EXPONENT_32, _SIGN_32 = 0x7F800000, -1 << 31
_EXPONENT_16, _SIGN_16, _MAGNITUDE_16 = 0x7C00, 0x8000, 0x7FFF
_SMALLEST_32 = 113 << 23  # the bits of 2^-14, float16's smallest normal number, in float32
_TIMES_8192 = 13 << 23  # added to the bits of a float32: 2^13 times the number


class HalfOperations(Operations):
    """Converts flat arrays between float32 and float16, for messages."""

    def to_half(self, x: Array, halves: Array) -> None:
        """Convert x (float32) to the bits of the nearest float16 numbers, halves (int16), ties to even.

        Both are flat. x is from -65504 to 65504, and overwritten. Allocates nothing once `memory` has seen the size.
        """
        memory = self.memory(np.float32)
        m, s = (memory.keep(name, x.shape, np.float32) for name in ("half m", "half s"))
        x_bits, m_bits, s_bits = x.view(np.int32), m.view(np.int32), s.view(np.int32)
        np.bitwise_and(x_bits, _EXPONENT_32, out=m_bits)
        np.clip(m_bits, _SMALLEST_32, _EXPONENT_32, out=m_bits)  # np.maximum takes longer
        np.add(m_bits, _TIMES_8192, out=m_bits)
        np.abs(x, out=s)
        np.add(s, m, out=s)
        np.subtract(s_bits, m_bits, out=s_bits)  # the steps
        np.right_shift(m_bits, 13, out=m_bits)
        np.add(s_bits, m_bits, out=s_bits)
        np.subtract(s_bits, (_SMALLEST_32 + _TIMES_8192) >> 13, out=s_bits)
        np.right_shift(x_bits, 16, out=x_bits)
        np.bitwise_and(x_bits, _SIGN_16, out=x_bits)
        np.bitwise_or(s_bits, x_bits, out=s_bits)
        np.copyto(halves, s_bits, casting="unsafe")

    def from_half(self, halves: Array) -> Array:
        """Return finite float16 numbers, given by their bits (int16), as float32: flat, in scratch memory."""
        memory = self.memory(np.float32)
        x, m, s = (memory.keep(name, halves.shape, np.float32) for name in ("half x", "half m", "half s"))
        x_bits, m_bits, s_bits = x.view(np.int32), m.view(np.int32), s.view(np.int32)
        np.copyto(x_bits, halves)  # the sign goes to where float32 has it
        np.bitwise_and(x_bits, _EXPONENT_16, out=m_bits)
        np.subtract(m_bits, 1 << 10, out=m_bits)
        np.clip(m_bits, 0, _EXPONENT_16, out=m_bits)
        np.bitwise_and(x_bits, _MAGNITUDE_16, out=s_bits)
        np.subtract(s_bits, m_bits, out=s_bits)  # the steps
        np.left_shift(m_bits, 13, out=m_bits)
        np.add(m_bits, _SMALLEST_32 + _TIMES_8192, out=m_bits)
        np.add(s_bits, m_bits, out=s_bits)
        np.subtract(s, m, out=s)
        np.bitwise_and(x_bits, _SIGN_32, out=x_bits)
        np.bitwise_or(s_bits, x_bits, out=s_bits)
        return s
