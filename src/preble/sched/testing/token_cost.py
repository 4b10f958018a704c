"""A cost model whose seconds can be told in advance."""

from __future__ import annotations

from collections.abc import Sequence

from preble.sched.cost import CostModel


class TokenCost(CostModel):
    """A step costs `seconds` for each token that it computes, whatever the context. Large ones let a few short prompts
    saturate a replica."""

    def __init__(self, seconds: float) -> None:
        self.name = f"{seconds:g} s per token"
        self.seconds = seconds

    def __repr__(self) -> str:
        return f"TokenCost({self.seconds!r})"

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return self.seconds * (sum(new for new, _ in prefills) + decodes)
