"""How long outputs get, learned from those that ended."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REMEMBERED = 256
"""Outputs that are remembered."""
FIRST_GUESS = 45.0
"""Tokens in an output before one ended: the mean over the paper's workloads."""


class OutputLengths:
    """The lengths of the last outputs, and what they say of those still growing.

    Of an output that has t tokens, those that got longer than t tell how it may go on: where all outputs are alike it
    ends where the others did; where they have a long tail, the longer it is the longer it will still be. To these one
    imagined output is added whose end is as likely with every token, and that is expected to double: for the time when
    none, or none so long, has ended yet.
    """

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=REMEMBERED)
        self._sorted: Array | None = None

    def observe(self, tokens: int) -> None:
        """An output ended with this many tokens."""
        self._recent.append(tokens)
        self._sorted = None

    def going_on(self, generated: Array, ahead: Array) -> Array:
        """How likely outputs are to go on for some more tokens.

        Args:
            generated: float64 [n], tokens each has so far.
            ahead: float64 [m], numbers of tokens, 0 or more.

        Returns:
            float64 [n, m]: the probability that output i gets longer than `generated[i] + ahead[j]`.
        """
        if self._sorted is None:
            self._sorted = np.sort(np.array(self._recent, np.float64))
        imagined = np.exp(-ahead / np.maximum(generated, FIRST_GUESS)[:, None])
        ended = np.searchsorted(self._sorted, generated[:, None] + ahead, side="right")
        ended_by_now = np.searchsorted(self._sorted, generated, side="right")[:, None]
        count = len(self._sorted)
        likely: Array = (count - ended + imagined) / (count - ended_by_now + 1)
        return likely
