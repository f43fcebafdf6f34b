"""Random numbers as pure functions of names and counters: the same in every worker, process, run and resume."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
from numpy.typing import NDArray


def key_of(*parts: object) -> int:
    """A 128-bit key from the parts' text; parts are length-prefixed, so ('ab', 'c') and ('a', 'bc') differ."""
    text = b"".join(b"%d:" % len(part) + part for part in (str(part).encode() for part in parts))
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def uniforms(count: int, *parts: object) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), counter-based (Philox), a pure function of `parts`."""
    return _numbers.of_key(key_of(*parts), count)


class _Numbers(threading.local):
    """A generator of each thread, set to the beginning of a key: about a seventh of the cost of a new generator."""

    def __init__(self) -> None:
        bits = np.random.Philox(key=0)
        self.bits, self.generator, self.beginning = bits, np.random.Generator(bits), bits.state

    def of_key(self, key: int, count: int) -> NDArray[np.float64]:
        words = self.beginning["state"]["key"]
        words[0], words[1] = key & 0xFFFFFFFFFFFFFFFF, key >> 64
        self.bits.state = self.beginning
        return self.generator.random(count)


_numbers = _Numbers()


def permuted(positions: NDArray[np.int64], length: int, *parts: object) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of range(length), named by `parts`, sends `positions`.

    A Feistel network of four rounds on the smallest even number of bits that holds `length`, walking on while the value
    falls outside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). It needs no memory for the
    permutation, so any position of an epoch over billions of samples is found at once.

    Args:
        positions: each in [0, length).
        length: number of samples, >= 1.
    Returns:
        Distinct indices in [0, length) for distinct positions.
    """
    if length < 1 or positions.min(initial=0) < 0 or positions.max(initial=0) >= length:
        raise ValueError(f"positions must lie in [0, {length}), got {positions.min()} to {positions.max()}")
    half_bits = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    low_mask = np.uint64((1 << int(half_bits)) - 1)
    key = key_of(*parts)
    num_rounds = 8 if half_bits < 4 else 4  # on fewer than 64 values four rounds favour some places
    round_keys = [
        np.uint64(((key >> (32 * (i % 4))) & 0xFFFFFFFF) + (i // 4) * 0x1E3779B97F4A7C15) for i in range(num_rounds)
    ]
    result = positions.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], round_keys, half_bits, low_mask)
        outside = result >= np.uint64(length)
    return result.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], round_keys: list[np.uint64], half_bits: np.uint64, low_mask: np.uint64
) -> NDArray[np.uint64]:
    left, right = values >> half_bits, values & low_mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & low_mask)
    return (left << half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
