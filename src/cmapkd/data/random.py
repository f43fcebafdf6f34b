"""Random numbers as pure functions of names and counters: the same in every worker, process, run and resume."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RoundKeys = Any  # a number for each round, or for each round an array of one for each value
_Step = Callable[[NDArray[np.uint64], _RoundKeys, int], NDArray[np.uint64]]


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
    return _walk(_inside(positions, length), length, key_of(*parts), _feistel)


def unpermuted(places: NDArray[np.int64], length: int, *parts: object) -> NDArray[np.int64]:
    """The positions that `permuted` with the same length and parts sends to `places`; see there."""
    return _walk(_inside(places, length), length, key_of(*parts), _feistel_back)


def permuted_each(
    positions: NDArray[np.int64], which: NDArray[np.int64], lengths: NDArray[np.int64], keys: Sequence[int]
) -> NDArray[np.int64]:
    """`permuted` for many short ranges at once, each with a permutation of its own.

    Args:
        positions: Int[positions], each in [0, length of its range).
        which: Int[positions], the range of each.
        lengths: Int[ranges], each >= 1.
        keys: of the ranges, as `key_of` makes them.
    """
    result = np.empty_like(positions)
    half_bits = np.array([_half_bits(length) for length in lengths.tolist()])
    for bits in np.unique(half_bits).tolist():  # those that are alike take their rounds together
        ranges = np.flatnonzero(half_bits == bits)
        here = slice(None) if len(ranges) == len(lengths) else half_bits[which] == bits
        own = np.searchsorted(ranges, which[here])
        rounds = np.array([_round_keys(keys[each], bits) for each in ranges.tolist()], dtype=np.uint64)
        values, limits = positions[here].astype(np.uint64), lengths[ranges].astype(np.uint64)
        left = np.arange(len(values))
        while len(left):
            moved = _feistel(values[left], rounds[own[left]].T, bits)
            values[left] = moved
            left = left[moved >= limits[own[left]]]
        result[here] = values.astype(np.int64)
    return result


def _inside(positions: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    if length < 1 or positions.min(initial=0) < 0 or positions.max(initial=0) >= length:
        raise ValueError(f"positions must lie in [0, {length}), got {positions.min()} to {positions.max()}")
    return positions


def _half_bits(length: int) -> int:
    return max(1, ((length - 1).bit_length() + 1) // 2)


def _round_keys(key: int, half_bits: int) -> list[np.uint64]:
    num_rounds = 8 if half_bits < 4 else 4  # on fewer than 64 values four rounds favour some places
    return [
        np.uint64(((key >> (32 * (i % 4))) & 0xFFFFFFFF) + (i // 4) * 0x1E3779B97F4A7C15) for i in range(num_rounds)
    ]


def _walk(positions: NDArray[np.int64], length: int, key: int, step: _Step) -> NDArray[np.int64]:
    half_bits = _half_bits(length)
    round_keys = _round_keys(key, half_bits)
    result = positions.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        result[outside] = step(result[outside], round_keys, half_bits)
        outside = result >= np.uint64(length)
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], round_keys: _RoundKeys, half_bits: int) -> NDArray[np.uint64]:
    bits, low_mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & low_mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & low_mask)
    return (left << bits) | right


def _feistel_back(values: NDArray[np.uint64], round_keys: _RoundKeys, half_bits: int) -> NDArray[np.uint64]:
    bits, low_mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & low_mask
    for round_key in reversed(round_keys):
        left, right = right ^ (_mix(left + round_key) & low_mask), left
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
