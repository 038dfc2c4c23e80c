"""Random numbers that are a function of what they are for, so that a run that resumes draws them again.

A sample's key is a hash of (seed, epoch, sample); its n-th number is a hash of (key, n), by the finaliser of SplitMix64
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"), whose successive outputs these are. No
state is kept, and a whole batch is drawn at once.
"""

from __future__ import annotations

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio, odd
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def sample_keys(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """A key for each sample, ``(B,)`` uint64, of its epoch and its index, ``(B,)`` integers."""
    keys = np.full(len(indices), seed % 2**64, dtype=np.uint64)
    for part in (epochs, indices):
        keys = _mix(keys + _STEP + np.asarray(part).astype(np.uint64))
    return keys


def words(keys: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """``(B, count)`` uint64, every bit random; ``stream`` tells apart what one sample draws for different ends."""
    return words_at(keys[:, None], np.arange(count), stream)


def words_at(keys: np.ndarray, places: np.ndarray, stream: int = 0) -> np.ndarray:
    """Number ``places`` of each key alone, of shapes that broadcast."""
    start = _mix(keys + np.uint64(stream)) if stream else keys
    return _mix(start + _STEP * (places.astype(np.uint64) + np.uint64(1)))


def uniforms(keys: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """``(B, count)`` float64 in [0, 1)."""
    return as_uniform(words(keys, count, stream))


def as_uniform(random: np.ndarray) -> np.ndarray:
    """Random words as float64 in [0, 1)."""
    return (random >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x ^= x >> np.uint64(27)
    x *= _SECOND
    x ^= x >> np.uint64(31)
    return x
