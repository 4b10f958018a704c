"""A request as a replica sees it: its tokens, how many have KV, and on which pages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from preble.sched.block_table import BlockTable
from preble.sched.hashing import Tokens
from preble.sched.prefix_cache import CachedRun


class Sequence:
    """One request on one replica: `tokens[:length]` are prompt and output, `tokens[:computed]` have KV on `table`.

    Where steps are planned ahead of their results, up to `pending` tokens more are sampled, or being sampled, that
    nobody here knows yet; what is `computed` may include them.

    Args:
        request_id: unique on the replica.
        token_ids: int32 [n], the prompt, and behind it any output generated before on another replica.
        prompt_length: how many of `token_ids` are prompt.
        max_length: prompt and output never grow past this.
        namespace: prefixes are shared only within one.
        priority: higher is served first.
        deadline: seconds on the caller's clock, by which the caller wants the whole output.
        expected_tokens: how many tokens it will probably generate, where the caller knows; a hint, never a limit.
        lockstep: its next token is planned only once the one before is known: something outside of the device, a
            grammar say, has to see every token.
        payload: whatever the engine keeps for the request.
    """

    __slots__ = (
        "_buffer",
        "admitted",
        "arrived",
        "cached",
        "computed",
        "deadline",
        "expected_tokens",
        "finished",
        "in_flight",
        "length",
        "lockstep",
        "looked",
        "matched",
        "max_length",
        "namespace",
        "node",
        "passed",
        "payload",
        "pending",
        "preemptions",
        "priority",
        "prompt_length",
        "request_id",
        "serial",
        "table",
    )

    def __init__(
        self,
        request_id: str,
        token_ids: Tokens,
        *,
        prompt_length: int,
        max_length: int,
        namespace: str = "",
        priority: int = 0,
        deadline: float | None = None,
        expected_tokens: float | None = None,
        lockstep: bool = False,
        payload: Any = None,
    ) -> None:
        self.request_id = request_id
        self.length = len(token_ids)
        self.prompt_length = prompt_length
        self.max_length = max_length
        self.namespace = namespace
        self.priority = priority
        self.deadline = math.inf if deadline is None else deadline
        self.expected_tokens = expected_tokens
        self.lockstep = lockstep
        self.payload = payload
        self.computed = 0
        """Tokens with KV, those of steps in flight included."""
        self.pending = 0
        """Tokens that steps in flight sample."""
        self.in_flight = 0
        """Steps planned with a chunk of this request whose results are not known yet."""
        self.finished = False
        """Whether the request has ended; steps in flight may still compute a token that nobody wants."""
        self.cached = 0
        """Tokens found in the cache when the request was first admitted."""
        self.admitted = False
        """Whether the request was ever admitted; after a preemption it still was."""
        self.preemptions = 0
        self.serial = 0
        """Arrival order on the replica; kept through preemption."""
        self.arrived = 0.0
        """When the request came to the replica, in seconds on the caller's clock; kept through preemption."""
        self.matched = 0
        """While waiting: tokens found in the cache when last looked up."""
        self.looked = -1
        """`PrefixCache.version` as of that look."""
        self.passed = 0
        """How many others were admitted while this one let them pass, its prefix being in the making."""
        self.node: CachedRun | None = None
        """The locked part of the prefix cache; `None` while waiting."""
        self.table = BlockTable()
        self._buffer = np.empty(min(max_length, self.length + 64), np.int32)
        self._buffer[: self.length] = token_ids

    @property
    def tokens(self) -> Tokens:
        """int32 [length]: prompt and output so far, a view."""
        return self._buffer[: self.length]

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed; 1 for a request that decodes."""
        return self.length + self.pending - self.computed

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return self.length - self.prompt_length

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.extend(token, 1)

    def extend(self, token: int, count: int) -> None:
        """Add a generated token, `count` times."""
        length = self.length + count
        if length > len(self._buffer):
            grown = np.empty(min(self.max_length, max(2 * self.length, length)), np.int32)
            grown[: self.length] = self._buffer[: self.length]
            self._buffer = grown
        self._buffer[self.length : length] = token
        self.length = length
