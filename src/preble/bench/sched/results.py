"""What came of the measurements, whether it is what it should be, and both as plain values."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from preble.bench.sched.peers.worker import Tally
from preble.bench.sched.plan import (
    DYNAMO_MICROSECONDS,
    FLAT_GOAL,
    MANY_REPLICAS,
    MANY_REPLICAS_GOAL,
    P99_GOAL,
    PEER_GOALS,
    REPLICAS,
)
from preble.bench.sched.traffic import Times, percentile
from preble.bench.sched.workload import Workload


@dataclass(frozen=True, slots=True)
class Summary:
    """One round in microseconds of processor time, and its rate."""

    per_second: float
    """Whole decisions per second."""
    submit_p50: float
    submit_p99: float
    submit_max: float
    whole_p50: float
    whole_p99: float
    whole_max: float

    @classmethod
    def of(cls, times: Times) -> Summary:
        """The figures of a run."""
        cuts = [percentile(values, cut) / 1e3 for values in (times.submit, times.whole) for cut in (0.5, 0.99, 1.0)]
        return cls(times.per_second, *cuts)


@dataclass(slots=True)
class WorkloadResult:
    """One workload with one page size."""

    workload: Workload
    page_size: int
    streamed: bool
    """Whether replicas reported every output token by itself."""
    rounds: list[Summary] = field(default_factory=list)
    hit_rate: float = 0.0
    tree_pages: int = 0

    def median(self, figure: Callable[[Summary], float]) -> float:
        """Over the rounds."""
        return statistics.median(figure(one) for one in self.rounds)

    @property
    def met(self) -> bool:
        """Whether the rate is what it should be."""
        return self.median(lambda one: one.per_second) >= self.workload.goal

    @property
    def p99_met(self) -> bool:
        """Whether decisions are as quick as they should be."""
        return self.median(lambda one: one.whole_p99) < P99_GOAL * 1e6

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "workload": asdict(self.workload),
            "page_size": self.page_size,
            "output_events": "one per token" if self.streamed else "two per request",
            "rounds": [asdict(one) for one in self.rounds],
            "per_second": self.median(lambda one: one.per_second),
            "goal_per_second": self.workload.goal,
            "met": self.met,
            "p99_met": self.p99_met,
            "hit_rate": self.hit_rate,
            "tree_pages": self.tree_pages,
        }


@dataclass(slots=True)
class FleetResult:
    """Means of each round in microseconds, by the number of replicas."""

    whole: dict[int, list[float]] = field(default_factory=lambda: {REPLICAS: [], MANY_REPLICAS: []})
    """Whole decisions. With more replicas there is more room, and less to report of evicted pages."""
    submit: dict[int, list[float]] = field(default_factory=lambda: {REPLICAS: [], MANY_REPLICAS: []})
    """`submit` alone."""

    @property
    def whole_ratio(self) -> float:
        """Many to few: the median over rounds, each compared within itself."""
        return _many_to_few(self.whole)

    @property
    def submit_ratio(self) -> float:
        """The same of `submit`."""
        return _many_to_few(self.submit)

    @property
    def met(self) -> bool:
        """Whether many cost little more, either way."""
        return max(self.whole_ratio, self.submit_ratio) <= MANY_REPLICAS_GOAL

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "whole_microseconds": self.whole,
            "submit_microseconds": self.submit,
            "whole_ratio": self.whole_ratio,
            "submit_ratio": self.submit_ratio,
            "goal": MANY_REPLICAS_GOAL,
            "met": self.met,
        }


def _many_to_few(rounds: dict[int, list[float]]) -> float:
    pairs = zip(rounds[MANY_REPLICAS], rounds[REPLICAS], strict=True)
    return statistics.median(many / few for many, few in pairs)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of distinct prompts, and how things stood at its end."""

    prompts: int
    """Submitted so far."""
    microseconds: float
    """Mean of the segment's whole decisions."""
    tree_pages: int
    bound_pages: int
    """Pages that all replicas hold, and those used within the window."""
    resident_bytes: int | None
    """Memory of the process, the benchmark's own included; `None` where the system does not tell."""


@dataclass(slots=True)
class FlatResult:
    """Very many distinct prompts."""

    prompt_tokens: int
    page_size: int
    segments: list[Segment] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Cost of the last segment to that of the first."""
        return self.segments[-1].microseconds / self.segments[0].microseconds

    @property
    def met(self) -> bool:
        """Whether the last decisions cost little more than the first."""
        return self.ratio <= FLAT_GOAL

    @property
    def fullest(self) -> Segment:
        """The one that comes nearest to its bound."""
        return max(self.segments, key=lambda one: one.tree_pages / one.bound_pages)

    @property
    def memory_met(self) -> bool:
        """Whether the tree always stayed within its bound."""
        return self.fullest.tree_pages <= self.fullest.bound_pages

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "page_size": self.page_size,
            "segments": [asdict(one) for one in self.segments],
            "ratio": self.ratio,
            "goal": FLAT_GOAL,
            "met": self.met,
            "memory_met": self.memory_met,
        }


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy on the tool-use workload."""

    name: str
    summary: Summary
    hit_rate: float

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {"policy": self.name, **asdict(self.summary), "hit_rate": self.hit_rate}


@dataclass(frozen=True, slots=True)
class Pace:
    """What a request cost one engine of the contest in a round: medians in microseconds of processor time."""

    decision: float
    """To choose a replica and to book the request."""
    whole: float
    """With all that is due until the request has ended."""
    decision_wall: float
    """The same on the wall clock, whatever else the machine did."""
    whole_wall: float
    hit_rate: float
    """Prompt tokens that the engine believed to be cached."""

    @classmethod
    def of(cls, tally: Tally) -> Pace:
        """The figures of a run."""
        return cls(
            decision=statistics.median(tally.decision) / 1e3,
            whole=statistics.median(tally.whole) / 1e3,
            decision_wall=statistics.median(tally.decision_wall) / 1e3,
            whole_wall=statistics.median(tally.whole_wall) / 1e3,
            hit_rate=tally.hit_rate,
        )


@dataclass(slots=True)
class ContestResult:
    """Prompts of one length through every engine."""

    prompt_tokens: int
    rounds: dict[str, list[Pace]] = field(default_factory=dict)
    """Engine -> rounds, `preble` among them."""

    def median(self, engine: str, figure: Callable[[Pace], float]) -> float:
        """Over the rounds."""
        return statistics.median(figure(one) for one in self.rounds[engine])

    def ratio(self, peer: str, figure: Callable[[Pace], float]) -> float:
        """How many times Preble's figure the peer's is: the median over rounds, each compared within itself."""
        pairs = zip(self.rounds[peer], self.rounds["preble"], strict=True)
        return statistics.median(figure(theirs) / figure(ours) for theirs, ours in pairs)

    @property
    def met(self) -> bool | None:
        """Whether every goal against a peer that ran is met; `None` without such a goal."""
        judged = [
            self.ratio(peer, lambda one: one.decision) >= goal
            for peer, goal in PEER_GOALS.items()
            if peer in self.rounds
        ]
        return all(judged) if judged else None

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        peers = [name for name in self.rounds if name != "preble"]
        return {
            "prompt_tokens": self.prompt_tokens,
            "rounds": {name: [asdict(one) for one in rounds] for name, rounds in self.rounds.items()},
            "decision_ratios": {peer: self.ratio(peer, lambda one: one.decision) for peer in peers},
            "whole_ratios": {peer: self.ratio(peer, lambda one: one.whole) for peer in peers},
            "goals": {peer: goal for peer, goal in PEER_GOALS.items() if peer in peers},
            "dynamo_microseconds_when_the_goal_was_set": DYNAMO_MICROSECONDS.get(self.prompt_tokens),
            "met": self.met,
        }
