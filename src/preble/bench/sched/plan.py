"""How much is measured, and what it should come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preble.bench.sched.traffic import RATE
from preble.bench.sched.workload import TOOL_USE, WORKLOADS, Workload

WINDOW = 180.0
"""Seconds for which the scheduler remembers a prefix that nobody holds: H in the paper, and its default."""
PAGE_SIZES = (16, 64)
REPLICAS = 8
MANY_REPLICAS = 64

P99_GOAL = 1e-3
"""Seconds that 99 of 100 whole decisions stay under."""
MANY_REPLICAS_GOAL = 2.0
"""Most times that a decision among many replicas costs one among few."""
FLAT_GOAL = 1.5
"""Most times that the last of very many decisions cost the first."""
PEER_GOALS = {"dynamo": 3.0}
"""Least ratio of a peer's time for a decision to the scheduler's."""
DYNAMO_MICROSECONDS = {2_000: 290.0, 8_000: 641.0, 32_000: 2_735.0}
"""What `select_and_reserve` took when the goal was set, by prompt tokens; the ratio is taken of this run's figures."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of all measurements, in requests where nothing else is said."""

    fill: int
    """Before the first measured one: as many as arrive within the window."""
    measured: int
    """In each round."""
    rounds: int
    distinct: int
    """Prompts with nothing in common, in the measurement of flatness."""
    segment: int
    """Of these, how many are averaged: the first so many are compared with the last."""
    policy_fill: int
    peer_fill: int
    peer_measured: Mapping[int, int]
    """By prompt tokens."""
    workloads: tuple[Workload, ...] = WORKLOADS
    tool_use: Workload = TOOL_USE
    """Where only one workload is measured."""
    page_sizes: tuple[int, ...] = PAGE_SIZES


FULL = Plan(
    fill=int(WINDOW * RATE),
    measured=1_000,
    rounds=3,
    distinct=1_000_000,
    segment=10_000,
    policy_fill=2_000,
    peer_fill=200,
    peer_measured={2_000: 600, 8_000: 300, 32_000: 150},
)
QUICK = Plan(
    fill=1_000,
    measured=500,
    rounds=1,
    distinct=50_000,
    segment=10_000,
    policy_fill=500,
    peer_fill=100,
    peer_measured={2_000: 200, 8_000: 100, 32_000: 50},
)
