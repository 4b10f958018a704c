"""What a placement policy sees and what it answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from preble.sched.lots import Lots

if TYPE_CHECKING:
    from preble.sched.cost import CostModel
    from preble.sched.prefix_stats import PrefixStats

NO_COSTS: Mapping[str, float] = MappingProxyType({})
"""The costs of a decision that weighed nothing."""


class RequestView(Protocol):
    """The request to be placed. Read it, never change it."""

    @property
    def request_id(self) -> str:
        """Its name, unique among the requests that have not ended."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""

    @property
    def max_tokens(self) -> int:
        """The most tokens it may generate."""

    @property
    def expected_tokens(self) -> float:
        """How many it will probably generate: the caller's hint, or what requests with its prefix did so far."""

    @property
    def namespace(self) -> str:
        """Prefixes are shared only within one."""

    @property
    def priority(self) -> int:
        """Higher is served first."""

    @property
    def deadline(self) -> float:
        """Seconds on the caller's clock, infinity without one."""

    @property
    def insists(self) -> bool:
        """It waits, was overtaken often enough, and takes any replica that can take it (`Policy.overtakes`)."""


class ReplicaView(Protocol):
    """A replica's books as of this very moment. Read them, never change them."""

    @property
    def replica(self) -> int:
        """Its number."""

    @property
    def state(self) -> str:
        """`up`, `draining` or `down`."""

    @property
    def cost(self) -> CostModel:
        """What its steps cost."""

    @property
    def page_size(self) -> int:
        """Tokens in a page, the same on all replicas."""

    @property
    def capacity_tokens(self) -> int:
        """Tokens that its KV pages hold."""

    @property
    def max_batched_tokens(self) -> int:
        """Tokens that one of its steps computes at most."""

    @property
    def resident_tokens(self) -> int:
        """Tokens in its prefix cache."""

    @property
    def in_flight(self) -> int:
        """Requests placed there that have not ended."""

    @property
    def queued(self) -> int:
        """… of which it has not yet started on these."""

    @property
    def decoding(self) -> int:
        """… and these generate, one token per step."""

    @property
    def decode_context_tokens(self) -> int:
        """Sum over the decoding requests of their tokens so far, prompt and output."""

    @property
    def queued_prefill_tokens(self) -> int:
        """Tokens it has yet to compute before all of them decode."""

    @property
    def queued_prefill_seconds(self) -> float:
        """What computing these costs."""

    @property
    def unique_pages(self) -> int:
        """Pages that the requests placed there will hold at their ends, prompt and expected output, shared ones counted
        once."""

    @property
    def total_pages(self) -> int:
        """The same, shared ones counted once per request that shares them."""

    @property
    def window_prefill_seconds(self) -> float:
        """Prefill time of the requests placed there within the window H."""

    @property
    def window_decode_seconds(self) -> float:
        """Their share of the decode steps' time."""

    @property
    def last_placed(self) -> int:
        """Number of the last placement it got, -1 before the first."""


class TrafficView(Protocol):
    """What the cluster observed lately."""

    @property
    def arrival_rate(self) -> float:
        """Requests per second over the last 100 arrivals; 0 before there were two."""

    @property
    def mean_ttft(self) -> float:
        """Seconds from `submit` to the first token, a running mean; 0 before the first."""

    @property
    def mean_latency(self) -> float:
        """Seconds from `submit` to the end, a running mean; 0 before the first."""

    @property
    def mean_output_tokens(self) -> float:
        """Tokens a request generates, a running mean; the paper's 45 before the first."""


class Stretch(NamedTuple):
    """A part of the matched prefix with the same users throughout."""

    start: int
    """Position in the prompt of its first token."""
    end: int
    """… and of the first token behind it."""
    in_flight: int
    """Requests in flight whose prompts contain it, on all replicas."""
    holders: int
    """Replicas that have it, or soon will."""


class View(Protocol):
    """All that a policy decides by."""

    @property
    def request(self) -> RequestView:
        """What is to be placed."""

    @property
    def replicas(self) -> tuple[ReplicaView, ...]:
        """The replicas that may take the request, at least one."""

    @property
    def matched(self) -> tuple[int, ...]:
        """Per entry of `replicas`: prompt tokens that are, or will soon be, in its prefix cache; whole pages."""

    @property
    def now(self) -> float:
        """Seconds on the caller's clock."""

    @property
    def lots(self) -> Lots:
        """For ties: seeded, so that the same calls give the same decisions."""

    @property
    def traffic(self) -> TrafficView:
        """What the cluster observed lately."""

    @property
    def session(self) -> int | None:
        """Position in `replicas` of the one that got the last request of the same session."""

    @property
    def window(self) -> float:
        """H: the seconds for which load and uses count."""

    @property
    def prefix(self) -> PrefixStats | None:
        """What requests with the matched key portion experienced; `None` where nobody shared it yet."""

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The longest match with any replica or recent prompt, from its start. Worked out when asked for."""

    def eviction_seconds(self, index: int) -> float:
        """M in the paper: what must go from the cache of `replicas[index]` to make room for the request, as the time to
        compute it again times the number of requests within H that used it. Worked out when asked for."""

    def recomputing_seconds(self, index: int) -> float:
        """The same without the number of requests: the time to compute once more what must go, of what a request used
        within H."""


class Choice(NamedTuple):
    """A policy's answer."""

    chosen: int
    """Position of the replica in `View.replicas`."""
    reason: str
    """The rule that decided, for `Placement.reason`."""
    costs: Mapping[str, float] = NO_COSTS
    """The terms it decided by, for `Placement.costs`; name the unit, as in `queued_tokens`."""


class Policy(ABC):
    """Decides where a request goes. Subclass it and give an object to `GlobalScheduler(policy=…)`."""

    name: str
    """Shown in statistics and explanations."""
    review_every = math.inf
    """Seconds between two calls of `review`."""
    overtakes = False
    """What happens to requests that `choose` lets wait. If false, each waits for the one before it. If true, they are
    offered by priority, then those whose deadline presses, then by response ratio ((wait + p) / p with p from
    `service_seconds`), and one that still has to wait is overtaken; but every 64th turn is the oldest one's of the
    highest priority, and then it `insists`."""

    @abstractmethod
    def choose(self, view: View) -> Choice | None:
        """Choose a replica, or `None` to let the request wait in the cluster for the next event.

        Must not change the policy: `GlobalScheduler.explain` asks as well, and the answer may not be acted upon.
        """

    def accepts(self, replicas: Sequence[ReplicaView]) -> bool:
        """Whether any of them can take a request at all: a quick test while requests wait, before `choose` is asked."""
        return True

    def service_seconds(self, view: View) -> float:
        """Where requests may be overtaken: what this one takes by itself, more than 0. Must not change the policy."""
        return 1.0

    def placed(self, view: View, choice: Choice) -> None:  # noqa: B027  # most policies keep nothing
        """The choice was acted upon. Here a policy may change."""

    def review(self, replicas: Sequence[ReplicaView], now: float) -> None:  # noqa: B027  # as above
        """Look at the fleet off the path of requests: every `review_every` seconds, and whenever a replica came, left,
        failed or drains. `replicas` are those that may take requests. Here a policy may change."""

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        """The terms by which `view.replicas[index]` is judged, for `GlobalScheduler.explain`."""
        replica = view.replicas[index]
        return {"in_flight": replica.in_flight, "queued_tokens": replica.queued_prefill_tokens}


def least(view: View, indices: Iterable[int]) -> int:
    """The least loaded of some replicas: fewest requests in flight, then fewest tokens to prefill, then by lot."""
    replicas = view.replicas
    best: list[int] = []
    fewest = tokens = 0
    for index in indices:
        replica = replicas[index]
        more = replica.in_flight - fewest or replica.queued_prefill_tokens - tokens
        if more < 0 or not best:
            fewest, tokens = replica.in_flight, replica.queued_prefill_tokens
            best = [index]
        elif more == 0:
            best.append(index)
    return draw(view, best)


def draw(view: View, indices: list[int]) -> int:
    """One of several equals, by lot."""
    if len(indices) == 1:
        return indices[0]
    return indices[view.lots.draw(len(indices))]


def holders(view: View) -> list[int]:
    """The replicas with the longest match; none where nobody has any of the prompt."""
    longest = max(view.matched)
    if not longest:
        return []
    return [index for index, matched in enumerate(view.matched) if matched == longest]
