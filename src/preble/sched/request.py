"""A request as the global scheduler sees it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from preble.sched.hashing import Tokens

if TYPE_CHECKING:
    from preble.sched.ledger import Ledger
    from preble.sched.prefix_node import Prediction, PrefixNode


class Request:
    """One request, from `submit` to its end. It waits in the cluster while `ledger` is `None`.

    Args:
        request_id: unique among the requests that have not ended.
        tokens: int32 [n], the prompt.
        max_tokens: the most tokens it may generate.
        namespace: prefixes are shared only within one.
        priority: higher is served first.
        deadline: seconds on the caller's clock; among equals of priority the earliest is served first.
        number: order of submission.
    """

    __slots__ = (
        "decoding",
        "ledger",
        "max_tokens",
        "namespace",
        "node",
        "number",
        "output",
        "prediction",
        "prefill_tokens",
        "priority",
        "queued",
        "request_id",
        "tokens",
        "urgency",
    )

    def __init__(
        self,
        request_id: str,
        tokens: Tokens,
        *,
        max_tokens: int,
        namespace: str,
        priority: int,
        deadline: float | None,
        number: int,
    ) -> None:
        self.request_id = request_id
        self.tokens = tokens
        self.max_tokens = max_tokens
        self.namespace = namespace
        self.priority = priority
        self.number = number
        self.urgency = (-priority, math.inf if deadline is None else deadline, number)
        """Waiting requests are served in this order, smallest first: priority, then deadline, then age."""
        self.output: list[int] = []
        """Tokens generated so far, on any replica."""
        self.ledger: Ledger | None = None
        self.node: PrefixNode | None = None
        """Where the prompt's whole pages end in the tree, as of its placement."""
        self.prediction: Prediction | None = None
        self.queued = False
        """On a replica, and not admitted there yet."""
        self.decoding = False
        self.prefill_tokens = 0
        """Tokens that the replica has yet to compute before it decodes."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.tokens)

    @property
    def deadline(self) -> float:
        """Seconds on the caller's clock, infinity without one."""
        return self.urgency[1]

    def history(self, start: int = 0) -> Tokens:
        """int32 [n]: prompt and output, from a position of the prompt on."""
        return np.concatenate((self.tokens[start:], np.array(self.output, np.int32)))

    def generated(self, tokens: tuple[int, ...], stop: int) -> None:
        """Take in generated tokens that end at position `stop` of the request. Known ones are replaced; tokens behind a
        gap cannot be placed and are left out."""
        start = stop - len(tokens) - len(self.tokens)
        if 0 <= start <= len(self.output):
            self.output[start:] = tokens
