"""Page hashes: the 64-bit hash of a whole prefix, at every page boundary, in a few vectorised operations.

The hash of a prefix is the sum over its tokens of `mix(token) * (mix(position) | 1)` modulo 2^64, plus a salt of the
namespace. A sum can be continued from any boundary, so a cache hashes only what is new. It guards scheduling hints,
never correctness: engines compare the tokens themselves.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Hashes = NDArray[np.uint64]

_MASK = (1 << 64) - 1


def _mix(values: Hashes) -> Hashes:
    """splitmix64's finalizer (Steele et al., 2014), in place."""
    values += np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


_position_weights: Hashes = np.empty(0, np.uint64)


def _weights(start: int, stop: int) -> Hashes:
    global _position_weights
    if len(_position_weights) < stop:
        size = max(stop, 2 * len(_position_weights), 4096)
        _position_weights = _mix(np.arange(size, dtype=np.uint64)) | np.uint64(1)
    return _position_weights[start:stop]


def namespace_salt(namespace: str) -> int:
    """The hash of the empty prefix of a namespace."""
    raw = namespace.encode()
    return (zlib.crc32(raw) << 32 | zlib.adler32(raw)) if raw else 0


def page_hashes(tokens: Tokens, page_size: int, *, start: int = 0, base: int = 0) -> Hashes:
    """Prefix hashes at the end of each whole page of `tokens`.

    Args:
        tokens: int32 [n], the tokens at positions `start` to `start + n`.
        page_size: tokens in a page; a partial last page has no hash.
        start: position of the first token.
        base: hash of the prefix that ends at `start` (`namespace_salt` where `start` is 0).

    Returns:
        uint64 [n // page_size].
    """
    pages = len(tokens) // page_size
    if pages == 0:
        return np.empty(0, np.uint64)
    count = pages * page_size
    terms = _mix(tokens[:count].astype(np.uint64))
    terms *= _weights(start, start + count)
    hashes: Hashes = np.cumsum(terms.reshape(pages, page_size).sum(axis=1, dtype=np.uint64), dtype=np.uint64)
    hashes += np.uint64(base & _MASK)
    return hashes
