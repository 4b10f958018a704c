"""What a step costs: GPU seconds as a function of what it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


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
