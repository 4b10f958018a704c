"""What a replica is told, and what it reports: one message per direction and step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from preble.outputs import FinishReason, ReplicaStats, TokenLogprob
from preble.sampling import SamplingParams
from preble.sched.events import Event
from preble.sched.hashing import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Submit:
    """Run a request. Output generated before, on a replica that was lost, follows the prompt in `token_ids`."""

    request_id: str
    token_ids: Tokens
    prompt_length: int
    max_length: int
    """Prompt and output together never grow past this."""
    sampling: SamplingParams
    seed: int
    namespace: str = ""
    priority: int = 0
    deadline: float | None = None
    expected_tokens: float | None = None
    """How many tokens it will probably generate, where the caller knows; a hint, never a limit."""


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request before the next step; nothing more is reported of it but its `Finished` event."""

    request_id: str


Command: TypeAlias = Submit | Abort


@dataclass(slots=True)
class Delta:
    """What a step adds to one request."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    cached_tokens: int
    """Prompt tokens found in the prefix cache when the request was first admitted."""
    started: float
    """`time.monotonic()` of the first step that worked on the request."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Why this request, alone, cannot go on."""


@dataclass(slots=True)
class StepReport:
    """Everything one step of a replica tells the cluster."""

    replica: int
    stats: ReplicaStats
    deltas: list[Delta] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
