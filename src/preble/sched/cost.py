"""What a step costs: GPU seconds as a function of what it computes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from preble.errors import InvalidRequest


class CostModel(ABC):
    """Predicts the seconds of an engine step on one replica.

    All times are at least 0 and never fall when any argument grows. Policies call these methods on every decision, so
    they cost about a microsecond.
    """

    name: str
    """Shown in statistics and explanations."""

    @abstractmethod
    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        """Seconds of one step; 0 for an empty one.

        Args:
            prefills: per prefill chunk: tokens computed, and tokens attended to at its end (cached ones and its own).
            decodes: requests that compute one token.
            decode_context: sum over these of the tokens attended to.
        """

    def prefill_seconds(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """Seconds to compute `new_tokens` behind `cached_tokens`, alone in one step; 0 for none."""
        if not new_tokens:
            return 0.0
        return self.step_seconds(((new_tokens, cached_tokens + new_tokens),), 0, 0)

    def decode_seconds(self, decodes: int, context_tokens: int) -> float:
        """Seconds of a step that generates one token for each of `decodes` requests with `context_tokens` in all."""
        return self.step_seconds((), decodes, context_tokens)


class PiecewiseCost(CostModel):
    """A sum of terms that never fall: a piecewise-linear base in the step's tokens, and one price per kind of work.

    seconds = base(all tokens) + `per_decode` x decodes + `per_decode_context` x their context, and if the step has
    prefill chunks, + `prefill` + `per_prefill_token` x their tokens + `per_prefill_context` x tokens attended to at the
    ends of the chunks + `per_pair` x the sum over the chunks of tokens computed times tokens attended to.
    """

    def __init__(
        self,
        name: str,
        knots: Sequence[int],
        base: Sequence[float],
        *,
        prefill: float = 0.0,
        per_prefill_token: float = 0.0,
        per_prefill_context: float = 0.0,
        per_pair: float = 0.0,
        per_decode: float = 0.0,
        per_decode_context: float = 0.0,
    ) -> None:
        """`base[i]` are the seconds at `knots[i]` tokens; beyond the last knot the last slope goes on.

        Raises:
            InvalidRequest: fewer than two knots, or they do not rise from 0; `base` is of another length or falls; any
                price is negative or not finite.
        """
        if len(knots) < 2 or knots[0] != 0 or not all(below < above for below, above in pairwise(knots)):
            raise InvalidRequest(f"knots of cost model {name!r} must be at least two numbers rising from 0: {knots}")
        if len(base) != len(knots):
            raise InvalidRequest(f"base of cost model {name!r} has {len(base)} values for {len(knots)} knots")
        if not all(0 <= seconds < math.inf for seconds in base) or any(
            before > after for before, after in pairwise(base)
        ):
            raise InvalidRequest(f"base of cost model {name!r} must be seconds, 0 or more, that never fall: {base}")
        self.name = name
        self.knots = tuple(knots)
        self.base = tuple(base)
        self.prices = {
            "prefill": prefill,
            "per_prefill_token": per_prefill_token,
            "per_prefill_context": per_prefill_context,
            "per_pair": per_pair,
            "per_decode": per_decode,
            "per_decode_context": per_decode_context,
        }
        """The other terms by name, in seconds."""
        for term, price in self.prices.items():
            if not 0 <= price < math.inf:
                raise InvalidRequest(f"{term} of cost model {name!r} must be seconds, 0 or more, not {price}")
        slopes = [
            (after - before) / (end - start)
            for (start, end), (before, after) in zip(pairwise(knots), pairwise(base), strict=True)
        ]
        self._pieces = (*zip(self.knots, self.base, (*slopes, slopes[-1]), strict=True),)
        self._prefill = prefill
        self._per_prefill_token = per_prefill_token
        self._per_prefill_context = per_prefill_context
        self._per_pair = per_pair
        self._per_decode = per_decode
        self._per_decode_context = per_decode_context

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        computed = context = pairs = 0
        for new, attended in prefills:
            computed += new
            context += attended
            pairs += new * attended
        tokens = computed + decodes
        if not tokens:
            return 0.0
        start, seconds, slope = self._pieces[bisect_right(self.knots, tokens) - 1]
        seconds += slope * (tokens - start) + self._per_decode * decodes + self._per_decode_context * decode_context
        if computed:
            seconds += (
                self._prefill
                + self._per_prefill_token * computed
                + self._per_prefill_context * context
                + self._per_pair * pairs
            )
        return seconds

    def prefill_seconds(self, new_tokens: int, cached_tokens: int = 0) -> float:
        if not new_tokens:
            return 0.0
        start, seconds, slope = self._pieces[bisect_right(self.knots, new_tokens) - 1]
        attended = cached_tokens + new_tokens
        return (
            seconds
            + slope * (new_tokens - start)
            + self._prefill
            + self._per_prefill_token * new_tokens
            + (self._per_prefill_context + self._per_pair * new_tokens) * attended
        )

    def decode_seconds(self, decodes: int, context_tokens: int) -> float:
        if not decodes:
            return 0.0
        start, seconds, slope = self._pieces[bisect_right(self.knots, decodes) - 1]
        return (
            seconds + slope * (decodes - start) + self._per_decode * decodes + self._per_decode_context * context_tokens
        )
