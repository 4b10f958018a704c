"""What a replica is told, and what it reports: one message per direction and step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from preble.engine.options import EngineOptions
from preble.engine.token_text import TokenTextState
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
    arrived: float | None = None
    """`time.monotonic()` when it was first handed to a replica, if that was another one: it does not queue anew."""


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request before the next step; nothing more is reported of it but its `Finished` event."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ResetCache:
    """Forget every cached prefix that no running request uses."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Take no more steps, or go on. What runs keeps its pages; aborts take effect all the same."""

    paused: bool


Command: TypeAlias = Submit | Abort | ResetCache | Pause
"""What a running replica may be told, in any number between two steps."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The first thing that a worker process is told: which engine it shall be."""

    model: str
    """A checkpoint folder, or what else `EngineSource` takes."""
    replica: int
    device: str
    sharing: int
    """Replicas on that device, this one included: each takes its share of the memory."""
    torch_threads: int
    options: EngineOptions
    pages: int | None = None
    """KV pages, where they are known from an earlier life of the replica; otherwise as many as fit."""
    text: TokenTextState | None = None
    """What it decodes with; otherwise it loads the checkpoint's tokenizer."""
    log_level: int = 30
    """Records of the logger `preble` from this level on are sent to the parent."""


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
    """Everything one step of a replica tells the cluster; one without deltas and events says that requests arrived."""

    replica: int
    stats: ReplicaStats
    deltas: list[Delta] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    taken: int = 0
    """Commands that the engine has taken in since it was made; they were in effect during this step."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is loaded and takes requests."""

    pages: int
    """KV pages it has."""
    max_batched_tokens: int
    stats: ReplicaStats


@dataclass(frozen=True, slots=True)
class LogLine:
    """A record that the worker logged."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Crash:
    """The worker's last message: an error ended it."""

    kind: str
    """The error's class, by name."""
    text: str
    traceback: str


News: TypeAlias = Ready | StepReport | LogLine | Crash
"""What a replica may tell."""
