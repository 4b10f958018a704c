"""The hit rate of an LRU prefix cache of any size, from one pass over the requests.

What is modelled: one cache of C tokens that holds blocks. A request's leading blocks are looked up, all at once; those
up to the first that is missing are hits. Then the request's blocks are touched from its last to its first, missing ones
being stored, and whenever the cache holds more than C tokens, the block that was touched longest ago is dropped. So a
block is never older than one behind it in a prompt and a prefix is dropped from its end, as engines do. Not modelled:
that a running request holds its blocks, that a block is there only when it has been computed, and generated tokens.

Such caches include each other: what the smaller one holds, the larger one holds as well. A block is therefore hit in
all caches of at least a certain size, its reuse distance: the tokens of all blocks touched since it was, and its own
(Mattson et al., "Evaluation techniques for storage hierarchies", 1970). The blocks that a request touched last of all
are the end of its prompt, as later requests take over beginnings of it. A lookup thus meets runs of blocks with one
last request each, about logarithmically many on average, for the reason that makes link-cut trees fast (Sleator and
Tarjan, 1983); in a run the distance grows by a block each, and what was touched after a run is a sum over requests, by
a Fenwick tree.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokensByRequest:
    """A token count for each request and sums of them, both in O(log requests): a Fenwick tree (Fenwick, 1994)."""

    def __init__(self, requests: int) -> None:
        self._sums = [0] * (requests + 1)
        self.total = 0

    def add(self, request: int, tokens: int) -> None:
        """Add to the count of a request."""
        self.total += tokens
        index = request + 1
        while index < len(self._sums):
            self._sums[index] += tokens
            index += index & -index

    def after(self, request: int) -> int:
        """The sum over all later requests."""
        index, before = request + 1, 0
        while index:
            before += self._sums[index]
            index &= index - 1
        return self.total - before


class ReuseDistances:
    """Hits by the size of the cache that is needed for them. Feed it with `request`, in order."""

    def __init__(self, block_size: int, requests: int) -> None:
        self.block_size = block_size
        self._owned = TokensByRequest(requests)
        self._requests = 0
        self._runs = array("q")
        """Tokens touched after a run that was looked up, and its own, by turns."""

    def request(self, prompt_tokens: int, matched: Sequence[tuple[int, int]]) -> None:
        """The next request.

        Args:
            prompt_tokens: of the request.
            matched: its runs of known blocks from the first on: who touched them last, and their tokens, which are
                whole blocks everywhere but at the end of the prompt. Two runs of one toucher may follow each other.
        """
        toucher, before = -1, 0
        for last, tokens in matched:
            if last != toucher:
                toucher, before = last, self._owned.after(last)
            self._runs.extend((before, tokens))
            before += tokens
        for last, tokens in matched:
            self._owned.add(last, -tokens)
        self._owned.add(self._requests, prompt_tokens)
        self._requests += 1

    def hit_tokens(self, size: int) -> int:
        """How many prompt tokens are hits in a cache of `size` tokens."""
        runs: NDArray[np.int64] = np.frombuffer(self._runs, np.int64).reshape(-1, 2)
        before, tokens = runs[:, 0], runs[:, 1]
        blocks = np.clip((size - before) // self.block_size, 0, tokens // self.block_size)
        partial = (tokens % self.block_size)[before + tokens <= size]
        return int(blocks.sum()) * self.block_size + int(partial.sum())
