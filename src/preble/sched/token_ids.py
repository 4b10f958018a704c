"""What callers may give as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from preble.errors import InvalidRequest
from preble.sched.hashing import Tokens

TokenIds: TypeAlias = NDArray[np.integer[Any]] | Sequence[int]

_LARGEST = np.iinfo(np.int32).max


def as_tokens(token_ids: TokenIds) -> Tokens:
    """int32 [n], a copy.

    Raises:
        InvalidRequest: not flat, empty, not integers, negative, or too large for int32.
    """
    if type(token_ids) is np.ndarray and token_ids.dtype == np.int32 and token_ids.ndim == 1 and len(token_ids):
        tokens = token_ids.astype(np.int32)
        if np.minimum.reduce(tokens) >= 0:
            return tokens
    try:
        given = np.asarray(token_ids)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"token_ids must be a flat sequence of integers: {error}") from error
    if given.ndim != 1 or given.size == 0:
        raise InvalidRequest(f"token_ids must be a flat sequence, not empty; this one has shape {given.shape}")
    if given.dtype.kind not in "iu":
        raise InvalidRequest(f"token_ids must be integers, not {given.dtype}")
    lowest = np.minimum.reduce(given)
    if lowest < 0:
        raise InvalidRequest(f"token_ids must not be negative, as {lowest} is")
    if given.dtype != np.int32 and given.max() > _LARGEST:
        raise InvalidRequest(f"token_ids must be at most {_LARGEST}, which {given.max()} is not")
    return given.astype(np.int32)
