"""Prompts as chained blocks: what two of them have in common becomes equal leading block numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from preble.errors import InvalidRequest
from preble.sim.trace import Blocks


class Segment(NamedTuple):
    """The first `tokens` tokens of the text called `key`."""

    key: Hashable
    tokens: int
    """At least 1."""


class _Run:
    """A text after one particular history. It holds the blocks that end within it."""

    __slots__ = ("blocks", "following")

    def __init__(self) -> None:
        self.blocks: Blocks = np.empty(0, np.int32)
        self.following: dict[tuple[int, Hashable], _Run] = {}
        """By how much of this text comes first and the key of the next one."""


class PromptBook:
    """Numbers the blocks of prompts.

    A prompt is a path of segments. Two paths have in common the segments that are equal, up to the first that is not,
    and of that one the shorter of the two if only the lengths differ. Two prompts with `n` tokens in common share
    exactly their first `n // block_size` blocks; a partial last block belongs to its prompt alone.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._root = _Run()
        self._numbered = 0

    def blocks(self, path: Sequence[Segment]) -> Blocks:
        """int32 [ceil(tokens / block size)]: the blocks of a prompt.

        Raises:
            InvalidRequest: The path or one of its segments is empty.
        """
        run, taken, end = self._root, 0, 0
        parts: list[Blocks] = []
        for key, tokens in path:
            if tokens < 1:
                raise InvalidRequest(f"a segment of a prompt has at least 1 token; {key!r} has {tokens}")
            run = run.following.setdefault((taken, key), _Run())
            count = (end + tokens) // self.block_size - end // self.block_size
            if count > len(run.blocks):
                run.blocks = np.concatenate((run.blocks, self._fresh(count - len(run.blocks))))
            parts.append(run.blocks[:count])
            taken, end = tokens, end + tokens
        if not parts:
            raise InvalidRequest("a prompt has at least one segment")
        if end % self.block_size:
            parts.append(self._fresh(1))
        return np.concatenate(parts)

    def _fresh(self, count: int) -> Blocks:
        first = self._numbered
        self._numbered += count
        return np.arange(first, self._numbered, dtype=np.int32)
