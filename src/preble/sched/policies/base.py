"""What a placement policy sees and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from preble.sched.lots import Lots

NO_COSTS: Mapping[str, float] = MappingProxyType({})
"""The costs of a decision that weighed nothing."""


class RequestView(Protocol):
    """The request to be placed. Read it, never change it."""

    @property
    def request_id(self) -> str: ...
    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""

    @property
    def max_tokens(self) -> int:
        """The most tokens it may generate."""

    @property
    def namespace(self) -> str: ...
    @property
    def priority(self) -> int:
        """Higher is served first."""

    @property
    def deadline(self) -> float:
        """Seconds on the caller's clock, infinity without one."""


class ReplicaView(Protocol):
    """A replica's books as of this very moment. Read them, never change them."""

    @property
    def replica(self) -> int:
        """Its number."""

    @property
    def state(self) -> str:
        """`up`, `draining` or `down`."""

    @property
    def capacity_tokens(self) -> int:
        """Tokens that its KV pages hold."""

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
    def queued_prefill_tokens(self) -> int:
        """Tokens it has yet to compute before all of them decode."""

    @property
    def last_placed(self) -> int:
        """Number of the last placement it got, -1 before the first."""


class View(NamedTuple):
    """All that a policy decides by."""

    request: RequestView
    replicas: tuple[ReplicaView, ...]
    """The replicas that may take the request, at least one."""
    matched: tuple[int, ...]
    """Per entry of `replicas`: prompt tokens that are, or will soon be, in its prefix cache; whole pages."""
    now: float
    """Seconds on the caller's clock."""
    lots: Lots
    """For ties: seeded, so that the same calls give the same decisions."""


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

    @abstractmethod
    def choose(self, view: View) -> Choice | None:
        """Choose a replica, or `None` to let the request wait in the cluster for the next event.

        Must not change the policy: `GlobalScheduler.explain` asks as well, and the answer may not be acted upon.
        """

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
