"""What steps cost on one replica: what they cost on its kind, times how much slower it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from preble.sched.cost import CostModel
from preble.sched.cost_fit import FittedCost
from preble.sched.events import StepTimed

BELIEVED = 32
"""Steps that the kind must have seen before a replica is compared with it, and after which half of what was seen of the
replica alone is believed."""

RECENT = 128
"""The comparison follows about the last so many steps."""

FARTHEST = 1.0
"""A step counts as at most e times faster or slower than the replica seemed so far."""


class ReplicaCost(CostModel):
    """Replicas of one kind learn together, so that one which has not run yet is not taken for a different machine, and
    each by itself how much slower it is than the others.

    Args:
        kind: shared by all replicas that began with the same cost model.
    """

    def __init__(self, kind: FittedCost) -> None:
        self.name = kind.name
        self.kind = kind
        self.slowness = 1.0
        """Its times are this multiple of its kind's."""
        self._steps = 0
        self._logarithm = 0.0

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return self.slowness * self.kind.model.step_seconds(prefills, decodes, decode_context)

    def prefill_seconds(self, new_tokens: int, cached_tokens: int = 0) -> float:
        return self.slowness * self.kind.model.prefill_seconds(new_tokens, cached_tokens)

    def decode_seconds(self, decodes: int, context_tokens: int) -> float:
        return self.slowness * self.kind.model.decode_seconds(decodes, context_tokens)

    def observe(self, event: StepTimed) -> None:
        """Learn from a step of this replica. One whose time or sums cannot be true is ignored."""
        expected = self.kind.expected_seconds(event)
        if expected and self.kind.steps >= BELIEVED:
            self._steps += 1
            off = math.log(event.seconds / expected) - self._logarithm
            self._logarithm += min(max(off, -FARTHEST), FARTHEST) / min(self._steps, RECENT)
            self.slowness = math.exp(self._logarithm * self._steps / (self._steps + BELIEVED))
        self.kind.observe(event)
