"""What a request gives back: text, tokens, usage, timing and where it ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from preble.sched.placement import Placement

FinishReason: TypeAlias = Literal["stop", "length", "abort"]
"""`stop`: a stop token or string; `length`: `max_tokens` or the context's end; `abort`: `Cluster.abort`."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's log-probability and those of the most probable tokens at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), most probable first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a stream yields: the text and tokens that are new since the last chunk."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    """Which of the `n` continuations this belongs to."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk of a continuation."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `completion_tokens` counts all `n` continuations."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was already on the replica when the request was first admitted."""
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, as seen by the cluster."""

    queued: float
    """From submission to the first step that worked on the request."""
    ttft: float
    """From submission to the first token (time to first token)."""
    tpot: float
    """Per output token after the first (time per output token); 0.0 for a single token."""
    total: float
    """From submission to the end."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One of a request's `n` continuations."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """A finished request. `text`, `token_ids`, … are those of the first continuation."""

    request_id: str
    completions: tuple[Completion, ...]
    """All `n` continuations, in order."""
    usage: Usage
    timing: Timing
    placement: Placement
    """Which replica ran the first continuation, and the terms it was chosen by."""

    @property
    def text(self) -> str:
        """The generated text, without stop strings and special tokens."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated token ids, a stop token included."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the text ended."""
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One entry per generated token when `logprobs` was asked for, else empty."""
        return self.completions[0].logprobs


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A replica as its engine saw it at its last step."""

    replica: int
    device: str
    attention: str
    """The attention backend in use."""
    running: int
    waiting: int
    pages_total: int
    pages_in_use: int
    pages_cached: int
    """Pages that hold a reusable prefix and belong to no running request."""
    pages_free: int
    prompt_tokens: int
    """Prompt tokens admitted since the start."""
    cached_tokens: int
    """… of which these were found in the prefix cache."""
    computed_tokens: int
    """Tokens that went through the model since the start, recomputation after preemption included."""
    generated_tokens: int
    preemptions: int
    tokens_per_second: float
    """Generated tokens per second over the last ten seconds."""

    @property
    def hit_rate(self) -> float:
        """Cached prompt tokens / prompt tokens since the start."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True, slots=True)
class ClusterStats:
    """All replicas, and what waits in front of them."""

    replicas: tuple[ReplicaStats, ...]
    pending: int
    """Requests accepted and not finished."""
    policy: str
    placements: dict[str, int]
    """How many requests were placed for which reason."""
    recoveries: tuple[float, ...] = ()
    """Of the latest requests that lost their replica: seconds from when that was noticed to their next token."""

    @property
    def hit_rate(self) -> float:
        """Cached prompt tokens / prompt tokens over all replicas."""
        prompt = sum(replica.prompt_tokens for replica in self.replicas)
        return sum(replica.cached_tokens for replica in self.replicas) / prompt if prompt else 0.0
