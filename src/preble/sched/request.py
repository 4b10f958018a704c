"""A request as the global scheduler sees it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from preble.sched.hashing import Tokens

if TYPE_CHECKING:
    from preble.sched.ledger import Ledger, Share
    from preble.sched.prefix_node import PrefixNode
    from preble.sched.prefix_stats import PrefixStats


class Request:
    """One request, from `submit` to its end. It waits in the cluster while `ledger` is `None`.

    Args:
        request_id: unique among the requests that have not ended.
        tokens: int32 [n], the prompt.
        max_tokens: the most tokens it may generate.
        namespace: prefixes are shared only within one.
        priority: higher is served first.
        deadline: seconds on the caller's clock; among equals of priority the earliest is served first.
        session: whom it belongs to; unique within the namespace.
        hint: how many tokens the caller expects it to generate.
        number: order of submission.
        submitted: when.
    """

    __slots__ = (
        "admitted",
        "decoding",
        "expected_tokens",
        "hint",
        "insists",
        "ledger",
        "max_tokens",
        "namespace",
        "node",
        "number",
        "output_tokens",
        "pages",
        "prefill_seconds",
        "prefill_tokens",
        "priority",
        "private_pages",
        "queued",
        "request_id",
        "service_seconds",
        "session",
        "share",
        "stats",
        "submitted",
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
        session: str | None,
        hint: int | None,
        number: int,
        submitted: float,
    ) -> None:
        self.request_id = request_id
        self.tokens = tokens
        self.max_tokens = max_tokens
        self.namespace = namespace
        self.priority = priority
        self.session = session
        self.hint = hint
        self.number = number
        self.submitted = submitted
        self.urgency = (-priority, math.inf if deadline is None else deadline, number)
        """Waiting requests are served in this order, smallest first: priority, then deadline, then age."""
        self.expected_tokens = 0.0
        """How many it will probably generate, as of its latest placement."""
        self.output_tokens = 0
        """Tokens generated so far, on any replica."""
        self.admitted = False
        """Some replica started on it."""
        self.service_seconds = 1.0
        """While it waits in the cluster: what it takes by itself, as far as the policy says."""
        self.insists = False
        """It waits, and it is its turn to take any replica that can take it."""
        self.ledger: Ledger | None = None
        self.node: PrefixNode | None = None
        """Where the prompt's whole pages end in the tree, while it is on a replica."""
        self.stats: PrefixStats | None = None
        """The books of the key portion that it shares with others, once it was admitted."""
        self.share: Share | None = None
        """Its part in the replica's load of the window."""
        self.queued = False
        """On a replica, and not admitted there yet."""
        self.decoding = False
        self.prefill_tokens = 0
        """Tokens that the replica has yet to compute before it decodes."""
        self.prefill_seconds = 0.0
        """What that costs."""
        self.pages = 0
        """Pages it will hold at its end, as expected."""
        self.private_pages = 0
        """… of which these are not whole pages of its prompt."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.tokens)

    @property
    def known_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.tokens) + self.output_tokens

    @property
    def deadline(self) -> float:
        """Seconds on the caller's clock, infinity without one."""
        return self.urgency[1]
