"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from preble.sched.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """Whether the chunk ends the known tokens, so that the step yields the next one."""


@dataclass(slots=True)
class StepPlan:
    """One step's work: decodes and prefill chunks together, `tokens` in all."""

    chunks: list[Chunk] = field(default_factory=list)
    tokens: int = 0
