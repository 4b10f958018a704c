"""The study of a trace: every number of it, as values and as JSON."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np

from preble.errors import InvalidRequest
from preble.sim.study.arrivals import Arrivals
from preble.sim.study.distribution import Distribution
from preble.sim.study.prompt_tree import PromptTree
from preble.sim.study.reuse import ReuseDistances
from preble.sim.study.sharing import Sharing
from preble.sim.trace import Trace

STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
"""Cache sizes in a decade: a nearly geometric series of round numbers."""
SMALLEST_CACHE = 10_000
"""Tokens, for workloads of at least ten times as many distinct ones."""
GOALS = (0.5, 0.9, 0.99)
"""Parts of the ideal hit rate for which the necessary cache is told."""


@dataclass(frozen=True, slots=True)
class Cache:
    """An LRU prefix cache."""

    tokens: int
    """How many it holds."""
    hit_rate: float
    """Share of all prompt tokens."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"tokens": self.tokens, "hit_rate": self.hit_rate}


@dataclass(frozen=True, slots=True)
class NeededCache:
    """The smallest cache that hits a part of what an unbounded one does."""

    of_ideal: float
    """At least this part of the ideal hit rate."""
    cache: Cache

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"of_ideal": self.of_ideal, **self.cache.as_json()}


@dataclass(frozen=True, slots=True)
class CacheCurve:
    """What an LRU prefix cache would hit, by its size (`preble.sim.study.reuse` tells what is modelled)."""

    curve: tuple[Cache, ...]
    """From small to large; the last one holds all prompts."""
    needed: tuple[NeededCache, ...]
    """For the parts in `GOALS`; empty where nothing is shared."""

    @classmethod
    def of(cls, reuse: ReuseDistances, prompt_tokens: int, distinct_tokens: int) -> CacheCurve:
        """From small caches to one that holds all distinct tokens."""

        def cache(size: int) -> Cache:
            return Cache(size, reuse.hit_tokens(size) / prompt_tokens)

        ideal = reuse.hit_tokens(distinct_tokens)
        candidates = range(distinct_tokens + 1)
        smallest = {goal: bisect_left(candidates, goal * ideal, key=reuse.hit_tokens) for goal in GOALS}
        return cls(
            curve=tuple(cache(size) for size in cache_sizes(distinct_tokens)),
            needed=tuple(NeededCache(goal, cache(size)) for goal, size in smallest.items()) if ideal else (),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "curve": [one.as_json() for one in self.curve],
            "needed": [one.as_json() for one in self.needed],
        }


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What is in a trace."""

    name: str
    block_size: int
    """Tokens in a block: sharing is seen in whole blocks."""
    requests: int
    sessions: int
    """How many conversations or agents are named; 0 where none is."""
    arrivals: Arrivals
    prompt_tokens: Distribution
    output_tokens: Distribution
    sharing: Sharing
    cache: CacheCurve

    @property
    def prompt_output_ratio(self) -> float:
        """Prompt tokens for every output token."""
        return self.prompt_tokens.total / self.output_tokens.total

    def as_json(self) -> dict[str, Any]:
        """Every number as plain values. Times are in seconds; what cannot be told is `None`."""
        return {
            "trace": {"name": self.name, "block_size": self.block_size},
            "requests": self.requests,
            "sessions": self.sessions,
            "arrivals": self.arrivals.as_json(),
            "prompt_tokens": self.prompt_tokens.as_json(),
            "output_tokens": self.output_tokens.as_json(),
            "prompt_output_ratio": self.prompt_output_ratio,
            "sharing": self.sharing.as_json(),
            "cache": self.cache.as_json(),
        }


def study(trace: Trace) -> Study:
    """Study a trace. The time it takes is about proportional to its blocks.

    Raises:
        InvalidRequest: it has no requests.
    """
    if not trace.requests:
        raise InvalidRequest(f"there is nothing to study: trace {trace.name!r} has no requests")
    times = np.array([request.arrival for request in trace.requests])
    prompt_tokens = Distribution.of([request.prompt_tokens for request in trace.requests])
    tree = PromptTree(trace)
    sharing = Sharing.of(tree)
    return Study(
        name=trace.name,
        block_size=trace.block_size,
        requests=len(trace.requests),
        sessions=len({request.session for request in trace.requests} - {None}),
        arrivals=Arrivals(times - times[0]),
        prompt_tokens=prompt_tokens,
        output_tokens=Distribution.of([request.output_tokens for request in trace.requests]),
        sharing=sharing,
        cache=CacheCurve.of(tree.reuse, prompt_tokens.total, sharing.distinct_tokens),
    )


def cache_sizes(distinct_tokens: int) -> tuple[int, ...]:
    """Round numbers of tokens from 10,000, or less where that would be a good part of them, to all distinct tokens."""
    size = SMALLEST_CACHE
    while size > 1 and size * 10 > distinct_tokens:
        size //= 10
    sizes: list[int] = []
    while True:
        for step in STEPS:
            if size * step >= distinct_tokens:
                return (*sizes, distinct_tokens)
            if (size * step).is_integer():
                sizes.append(int(size * step))
        size *= 10
