"""What a request gives back: text, tokens, usage, timing and where it ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from preble.sched.placement import Placement

FinishReason: TypeAlias = Literal["stop", "length", "abort"]
"""Why a text ended: `Completion.finish_reason` says what each means."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's log-probability and those of the most probable tokens at its position."""

    token_id: int
    """The token that was chosen."""
    logprob: float
    """Its natural log-probability, before any sampling option changed the logits."""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), most probable first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a stream yields: the text and tokens that are new since the last chunk."""

    text: str
    """New text: characters come whole, stop strings never show."""
    token_ids: tuple[int, ...]
    """New token ids."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One entry per new token when `logprobs` was asked for, else empty."""
    index: int = 0
    """Which of the `n` continuations this belongs to."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk of a continuation."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `completion_tokens` counts all `n` continuations."""

    prompt_tokens: int
    """Tokens of the prompt, special ones included."""
    cached_tokens: int
    """Prompt tokens whose KV was already on the replica when the request was first admitted."""
    completion_tokens: int
    """Tokens generated, over all `n` continuations."""


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
    """Its number, from 0."""
    text: str
    """Without stop strings and special tokens."""
    token_ids: tuple[int, ...]
    """The generated token ids, a stop token included."""
    finish_reason: FinishReason
    """Why the text ended. `stop`: a stop token or string; `length`: `max_tokens` or the context's end; `abort`:
    `Cluster.abort`."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One entry per generated token when `logprobs` was asked for, else empty."""


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """A finished request. `text`, `token_ids`, … are those of the first continuation."""

    request_id: str
    """Yours, or a made one."""
    completions: tuple[Completion, ...]
    """All `n` continuations, in order."""
    usage: Usage
    """How many tokens it took."""
    timing: Timing
    """How long it took."""
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
        """Why the text ended (`Completion.finish_reason`)."""
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One entry per generated token when `logprobs` was asked for, else empty."""
        return self.completions[0].logprobs


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A replica as its engine saw it at its last step."""

    replica: int
    """Its number."""
    device: str
    """Its torch device."""
    attention: str
    """The attention backend in use."""
    running: int
    """Requests that compute."""
    waiting: int
    """Requests in its queue."""
    pages_total: int
    """KV pages that it has: those in use, cached and free together."""
    pages_in_use: int
    """KV pages that running requests hold."""
    pages_cached: int
    """Pages that hold a reusable prefix and belong to no running request."""
    pages_free: int
    """KV pages that hold nothing."""
    prompt_tokens: int
    """Prompt tokens admitted since the start."""
    cached_tokens: int
    """… of which these were found in the prefix cache."""
    computed_tokens: int
    """Tokens that went through the model since the start, recomputation after preemption included."""
    generated_tokens: int
    """Tokens generated since the start."""
    preemptions: int
    """How often a running request was put back into the queue for lack of pages, since the start."""
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
    """One entry per replica, by number."""
    pending: int
    """Requests accepted and not finished."""
    policy: str
    """Name of the placement policy."""
    placements: dict[str, int]
    """How many requests were placed for which reason."""
    recoveries: tuple[float, ...] = ()
    """Of the latest thousand continuations that lost their replica: seconds from when that was noticed to their next
    token."""

    @property
    def hit_rate(self) -> float:
        """Cached prompt tokens / prompt tokens over all replicas."""
        prompt = sum(replica.prompt_tokens for replica in self.replicas)
        return sum(replica.cached_tokens for replica in self.replicas) / prompt if prompt else 0.0
