"""Page hashes: the 64-bit hash of a whole prefix, at every page boundary, in a few vectorised operations.

The hash of a prefix is the sum over its tokens of `(token + 1) * weight(position)` modulo 2^64, with a pseudo-random
odd weight for every position, plus a salt of the namespace. Two prompts that differ have equal hashes about as often as
two random numbers; whoever wants a collision can compute one. That is good enough, as a hash guides scheduling hints,
never correctness: engines compare the tokens themselves. A sum can be continued from any boundary, so a cache hashes
only what is new.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Hashes = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_1, _27, _30, _31 = (np.uint64(n) for n in (1, 27, 30, 31))


def _mix(values: Hashes) -> Hashes:
    """splitmix64's finalizer (Steele et al., 2014), in place."""
    values += _GOLDEN
    values ^= values >> _30
    values *= _FIRST
    values ^= values >> _27
    values *= _SECOND
    values ^= values >> _31
    return values


# Only ever grows, by replacement: engines hash in threads of their own, so a function keeps using the array it read.
_position_weights: Hashes = np.empty(0, np.uint64)


def _weights(start: int, stop: int) -> Hashes:
    global _position_weights
    weights = _position_weights
    if len(weights) < stop:
        size = max(stop, 2 * len(weights), 4096)
        _position_weights = weights = _mix(np.arange(size, dtype=np.uint64)) | _1
    return weights[start:stop]


def namespace_salt(namespace: str) -> int:
    """The hash of the empty prefix of a namespace."""
    if not namespace:
        return 0
    return int.from_bytes(hashlib.blake2b(namespace.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def page_hashes(tokens: Tokens, page_size: int, *, start: int = 0, base: int = 0) -> Hashes:
    """Prefix hashes at the end of each whole page of `tokens`.

    Args:
        tokens: int32 [n], none negative, the tokens at positions `start` to `start + n`.
        page_size: tokens in a page; a partial last page has no hash.
        start: position of the first token.
        base: hash of the prefix that ends at `start` (`namespace_salt` where `start` is 0).

    Returns:
        uint64 [n // page_size].
    """
    count = len(tokens) - len(tokens) % page_size
    if count == 0:
        return np.empty(0, np.uint64)
    terms: Hashes = tokens[:count].astype(np.uint64)
    terms += _1  # or runs of token 0 would all hash alike
    terms *= _weights(start, start + count)
    hashes: Hashes = terms.cumsum()[page_size - 1 :: page_size] + np.uint64(base & _MASK)
    return hashes


def in_common(some: Hashes, others: Hashes) -> int:
    """How many hashes the two start with alike."""
    limit = min(len(some), len(others))
    if limit == 0:
        return 0
    differs = some[:limit] != others[:limit]
    first = int(differs.argmax())
    return first if differs[first] else limit
