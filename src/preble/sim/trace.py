"""A trace: which requests arrive when, what their prompts share, how long their answers are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from preble.errors import InvalidRequest
from preble.sched.hashing import Tokens
from preble.sched.radix import Node, RadixTree

Blocks = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TracedRequest:
    """One request of a trace."""

    arrival: float
    """Seconds since the trace began. In a closed loop it counts for the first turn of a session only."""
    prompt_tokens: int
    """At least 1."""
    output_tokens: int
    """How many tokens it generates, at least 1."""
    blocks: Blocks
    """int32 [ceil(prompt_tokens / block size)], none negative: two prompts share as many tokens as their leading blocks
    are equal. So, but where a block is one token, a number stands for the block and all before it. The last block may
    be partial; then its number must occur in no prompt of different length."""
    session: str | None = None
    """The conversation or agent it belongs to. Its requests follow each other in the order of the trace."""
    think: float = 0.0
    """In a closed loop: seconds from the end of the session's request before to this one."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival."""

    name: str
    """Shown in results."""
    block_size: int
    """Tokens in a block."""
    requests: tuple[TracedRequest, ...]
    """In order of arrival."""

    @property
    def duration(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival - self.requests[0].arrival if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Requests per second, 0 where they all arrive at once."""
        return (len(self.requests) - 1) / self.duration if self.duration else 0.0

    @cached_property
    def known_tokens(self) -> NDArray[np.int64]:
        """int64 [requests]: tokens in the longest prefix shared with a request before it, whole blocks, the prompt's
        last token never counted: what a cache without end would have."""
        tree = RadixTree(Node, page_size=1)  # a block of the trace is a token of the tree
        known = np.zeros(len(self.requests), np.int64)
        for number, request in enumerate(self.requests):
            node, shared = tree.match("", request.blocks)
            known[number] = min(shared * self.block_size, request.prompt_tokens - 1)
            if shared < len(request.blocks):
                tree.extend(node if shared == node.end else tree.split(node, shared), request.blocks)
        return known

    def tokens(self, request: TracedRequest) -> Tokens:
        """int32 [prompt_tokens]: the prompt, every token named after its block."""
        return np.repeat(request.blocks, self.block_size)[: request.prompt_tokens]

    def first(self, count: int) -> Trace:
        """Its first `count` requests."""
        return replace(self, requests=self.requests[:count])

    def scaled(self, rate: float) -> Trace:
        """The same requests arriving `rate` times as fast. Think times stay.

        Raises:
            InvalidRequest: `rate` is not a positive, finite number.
        """
        if not 0 < rate < float("inf"):
            raise InvalidRequest(f"a trace can be replayed at a positive multiple of its rate, not {rate}")
        return replace(self, requests=tuple(replace(one, arrival=one.arrival / rate) for one in self.requests))
