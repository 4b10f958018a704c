"""What came of a simulation, in figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preble.sched.hot_prefixes import HotPrefix
from preble.sim.samples import Samples
from preble.sim.settings import Settings
from preble.sim.simulation import Simulation
from preble.sim.slo import SLO

Array = NDArray[np.float64]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One policy on one trace. Arrays have an entry per completed request, in order of the trace; times are seconds."""

    trace: str
    """Name of the trace."""
    policy: str
    """Name of the policy, or of the `Router`."""
    settings: Settings
    """The fleet."""
    slo: SLO
    """What counts as good."""
    requests: int
    """In the trace."""
    rate: float
    """… per second, as they were recorded or made."""
    refused: int
    """… of which no replica could have held these."""
    numbers: NDArray[np.int64]
    """Positions in the trace of the completed ones."""
    arrived: Array
    """When each came in, since the first arrival."""
    ttft: Array
    """From arrival to the first token."""
    tpot: Array
    """Per token after the first; NaN for answers of one token."""
    e2e: Array
    """From arrival to the last token."""
    queueing: Array
    """From arrival until a replica began to compute it."""
    prompt_tokens: NDArray[np.int64]
    """Of each request."""
    cached_tokens: NDArray[np.int64]
    """… found in the cache."""
    computed_tokens: NDArray[np.int64]
    """… and tokens computed but for those decoded: the rest of the prompt, and what was computed once more after
    preemptions and failures."""
    replica: NDArray[np.int64]
    """Where it ended."""
    reasons: dict[str, int]
    """How many were placed by which rule."""
    recomputed_tokens: int
    """Prompt tokens computed that some replica had computed for an earlier request: what an endless cache that all
    share would have saved."""
    evicted_tokens: int
    """Tokens that left the replicas' prefix caches to make room."""
    preemptions: int
    """How often a request lost its pages and was put back into its replica's queue."""
    moves: int
    """How often a request was lost with a replica that failed, and placed anew."""
    busy_seconds: Array
    """float64 [replicas]: in which it was computing."""
    makespan: float
    """From the first arrival to the last end."""
    samples: Samples
    """How busy the replicas were over time."""
    hottest: list[HotPrefix]
    """The prefixes whose sharing saved most when the last request arrived, and who had them. None where others than a
    `GlobalScheduler` decided."""
    decide_seconds: float
    """Real seconds of the global scheduler. All else is the same in every run."""

    @property
    def completed(self) -> int:
        """Requests that were answered."""
        return len(self.numbers)

    @property
    def hit_rate(self) -> float:
        """Cached share of the prompt tokens."""
        return float(self.cached_tokens.sum() / self.prompt_tokens.sum()) if self.completed else 0.0

    @property
    def imbalance(self) -> float:
        """Busy time of the busiest replica, relative to the mean."""
        mean = self.busy_seconds.mean()
        return float(self.busy_seconds.max() / mean) if mean else 1.0

    @property
    def utilization(self) -> float:
        """Mean share of the makespan in which replicas were computing."""
        return float(self.busy_seconds.mean() / self.makespan) if self.makespan else 0.0

    @property
    def good(self) -> int:
        """Requests that kept the SLO."""
        slo = self.slo
        kept = (self.ttft <= slo.ttft) & ~(self.tpot > slo.tpot) & (self.e2e <= slo.e2e)
        return int(kept.sum())

    @property
    def goodput(self) -> float:
        """Requests per second that kept the SLO."""
        return self.good / self.makespan if self.makespan else 0.0

    @property
    def decisions_per_second(self) -> float:
        """Requests per real second of the global scheduler, everything it does for them included."""
        return self.completed / self.decide_seconds if self.decide_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures but the real seconds, so that the same run gives the same, in types that JSON knows."""
        return {
            "policy": self.policy,
            "requests": self.requests,
            "completed": self.completed,
            "refused": self.refused,
            "ttft": distribution(self.ttft),
            "tpot": distribution(self.tpot),
            "e2e": distribution(self.e2e),
            "queueing": distribution(self.queueing),
            "hit_rate": self.hit_rate,
            "good": self.good,
            "goodput": self.goodput,
            "imbalance": self.imbalance,
            "utilization": self.utilization,
            "busy_seconds": self.busy_seconds.tolist(),
            "makespan": self.makespan,
            "prompt_tokens": int(self.prompt_tokens.sum()),
            "cached_tokens": int(self.cached_tokens.sum()),
            "computed_tokens": int(self.computed_tokens.sum()),
            "recomputed_tokens": self.recomputed_tokens,
            "evicted_tokens": self.evicted_tokens,
            "preemptions": self.preemptions,
            "moves": self.moves,
            "reasons": self.reasons,
        }


def distribution(values: Array) -> dict[str, float | None]:
    """Mean and quantiles of those values that are numbers; `None` if there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, **dict.fromkeys(QUANTILES)}
    quantiles = np.quantile(known, list(QUANTILES.values()), method="inverted_cdf")
    return {"mean": float(known.mean()), **dict(zip(QUANTILES, quantiles.tolist(), strict=True))}


def outcome_of(simulation: Simulation, slo: SLO) -> Outcome:
    """The figures of a simulation that has run."""
    flights = simulation.flights
    done = [one for one in flights if one.ended == one.ended]
    ttft = np.array([one.first_token - one.arrived for one in done], np.float64)
    e2e = np.array([one.ended - one.arrived for one in done], np.float64)
    after_first = np.array([one.generated - 1 for one in done], np.float64)
    cached = np.array([one.cached_tokens for one in done], np.int64)
    prompt = np.array([one.traced.prompt_tokens for one in done], np.int64)
    reasons: dict[str, int] = {}
    for one in done:
        reasons[one.reason] = reasons.get(one.reason, 0) + 1
    known = np.array([simulation.trace.known_tokens[one.number] for one in done], np.int64)
    return Outcome(
        trace=simulation.trace.name,
        policy=simulation.router.policy_name,
        settings=simulation.settings,
        slo=slo,
        requests=len(flights),
        rate=simulation.trace.rate,
        refused=len(simulation.refused),
        numbers=np.array([one.number for one in done], np.int64),
        arrived=np.array([one.arrived for one in done], np.float64),
        ttft=ttft,
        tpot=np.divide(e2e - ttft, after_first, out=np.full(len(done), np.nan), where=after_first > 0),
        e2e=e2e,
        queueing=np.array([one.admitted - one.arrived for one in done], np.float64),
        prompt_tokens=prompt,
        cached_tokens=cached,
        computed_tokens=np.array([one.computed_tokens for one in done], np.int64),
        replica=np.array([one.replica for one in done], np.int64),
        reasons=dict(sorted(reasons.items())),
        recomputed_tokens=int(np.maximum(known - cached, 0).sum()),
        evicted_tokens=sum(one.evicted_tokens for one in simulation.replicas),
        preemptions=sum(one.preemptions for one in done),
        moves=sum(one.moves for one in flights),
        busy_seconds=np.array([one.busy_seconds for one in simulation.replicas]),
        makespan=max((one.ended for one in done), default=0.0),
        samples=simulation.samples,
        hottest=simulation.hottest,
        decide_seconds=simulation.decide_seconds,
    )
