"""Views made by hand: a policy's whole input, with every number as the test wants it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from preble.sched import View
from preble.sched.cost import CostModel
from preble.sched.lots import Lots
from preble.sched.policies.base import Stretch


@dataclass(frozen=True)
class Linear(CostModel):
    """Seconds that can be added up in one's head."""

    step: float = 0.01
    per_token: float = 0.0001
    per_context: float = 0.0
    name = "linear"

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        tokens = decodes + sum(new for new, _ in prefills)
        context = decode_context + sum(attended for _, attended in prefills)
        return self.step + self.per_token * tokens + self.per_context * context if tokens else 0.0


@dataclass
class Books:
    """A replica's books, as a policy sees them."""

    replica: int = 0
    in_flight: int = 0
    queued_prefill_tokens: int = 0
    last_placed: int = -1
    queued: int = 0
    decoding: int = 0
    decode_context_tokens: int = 0
    capacity_tokens: int = 1_000_000
    resident_tokens: int = 0
    unique_pages: int = 0
    total_pages: int = 0
    max_batched_tokens: int = 100
    page_size: int = 10
    queued_prefill_seconds: float = 0.0
    window_prefill_seconds: float = 0.0
    window_decode_seconds: float = 0.0
    cost: CostModel = field(default_factory=Linear)
    state: str = "up"


@dataclass
class Asked:
    """A request, as a policy sees it."""

    prompt_tokens: int = 100
    expected_tokens: float = 10.0
    request_id: str = "r"
    max_tokens: int = 10
    namespace: str = ""
    priority: int = 0
    deadline: float = float("inf")
    insists: bool = False


@dataclass
class Traffic:
    """What the cluster observed, as a policy sees it."""

    arrival_rate: float = 0.0
    mean_ttft: float = 0.0
    mean_latency: float = 0.0
    mean_output_tokens: float = 45.0


@dataclass
class Seen:
    """All that a policy decides by."""

    request: Asked
    replicas: tuple[Books, ...]
    matched: tuple[int, ...]
    lots: Lots
    traffic: Traffic
    stretches: tuple[Stretch, ...]
    now: float = 0.0
    session: int | None = None
    window: float = 180.0
    prefix: None = None
    recomputing: tuple[float, ...] = ()

    def eviction_seconds(self, index: int) -> float:
        return 0.0

    def recomputing_seconds(self, index: int) -> float:
        return self.recomputing[index] if self.recomputing else 0.0


def view(
    replicas: Iterable[Books],
    matched: Iterable[int] | None = None,
    *,
    asked: Asked | None = None,
    traffic: Traffic | None = None,
    stretches: Iterable[tuple[int, int, int, int]] = (),
    seed: int = 0,
) -> View:
    """What a policy sees; nobody has any of the prompt unless `matched` says so."""
    books = tuple(replicas)
    return Seen(
        asked or Asked(),
        books,
        tuple(matched or [0] * len(books)),
        Lots(seed),
        traffic or Traffic(),
        tuple(Stretch(*stretch) for stretch in stretches),
    )
