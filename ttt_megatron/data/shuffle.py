"""Seeded permutations from integer arithmetic alone.

The order of a run must survive an upgrade of any library, so no library's random generator is
used: element i is keyed by SplitMix64 (Steele, Lea and Flood 2014) and the keys are sorted.
"""

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def hash_keys(count: int, *parts: int) -> np.ndarray:
    """Pseudo-random uint64 [count], a function of `parts` (seed, epoch, purpose) alone."""
    state = 0
    for part in parts:
        state = _mix(state + _GAMMA + (part & _MASK))
    values = np.arange(1, count + 1, dtype=np.uint64)
    values *= np.uint64(_GAMMA)
    values += np.uint64(state)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def permutation(count: int, *parts: int) -> np.ndarray:
    """A permutation of 0 … count − 1, int64 [count], a function of `parts` alone."""
    return np.argsort(hash_keys(count, *parts), kind="stable")


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
