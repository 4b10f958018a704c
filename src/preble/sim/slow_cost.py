"""A machine that is slower than others of its kind."""

from __future__ import annotations

from collections.abc import Sequence

from preble.sched.cost import CostModel


class SlowCost(CostModel):
    """Steps take `factor` times what `kind` says."""

    def __init__(self, kind: CostModel, factor: float) -> None:
        self.name = f"{factor:g} x {kind.name}"
        self._kind = kind
        self._factor = factor

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return self._factor * self._kind.step_seconds(prefills, decodes, decode_context)
