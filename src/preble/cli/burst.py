"""What a burst of questions cost under one placement policy: figures, and tables of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from preble.cli.graded_answer import GradedAnswer, accuracy
from preble.cli.tables import table

if TYPE_CHECKING:
    from rich.table import Table

    from preble.outputs import ClusterStats

REASONS = {
    "exploit": "to the replica that has the prompt's prefix",
    "explore": "to where it costs least, as no replica has most of the prompt, or all have as much",
    "rebalance": "to the least loaded replica, as the one with the prefix had more than its share",
    "replicate": "to a replica that gets a copy of a prefix in demand",
    "relieve": "away from the prefix, as waiting there costs more than computing it again",
}
"""Reasons of placement that need a word of explanation."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds, over the requests of a burst."""

    mean: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of one value at least. The p99 is a value that occurred: 1 % of them, at most, are larger."""
        return cls(statistics.fmean(seconds), sorted(seconds)[(99 * len(seconds) - 1) // 100])

    def __str__(self) -> str:
        decimals = 3 if self.p99 < 10 else 1 if self.p99 < 100 else 0
        return f"{self.mean:.{decimals}f} / {self.p99:.{decimals}f}"


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """What one replica did in a burst."""

    replica: int
    requests: int
    reasons: Mapping[str, int]
    """Reason of placement -> requests."""
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    """Tokens that went through the model, of prompts and of answers."""
    pages_cached: int
    """Pages of the prefix cache after the burst."""


@dataclass(frozen=True, slots=True)
class Burst:
    """What a burst cost under one policy."""

    policy: str
    replicas: tuple[ReplicaShare, ...]
    right: int | None
    """Right answers; `None` where they were not graded."""
    ttft: Spread
    latency: Spread
    seconds: float

    @classmethod
    def of(
        cls, policy: str, answers: Sequence[GradedAnswer], before: ClusterStats, after: ClusterStats, seconds: float
    ) -> Burst:
        """From at least one answer, and the statistics around them."""
        computed = {replica.replica: -replica.computed_tokens for replica in before.replicas}
        outputs = [answer.output for answer in answers]
        shares = []
        for replica in after.replicas:
            mine = [output for output in outputs if output.placement.replica == replica.replica]
            shares.append(
                ReplicaShare(
                    replica=replica.replica,
                    requests=len(mine),
                    reasons=dict(Counter(output.placement.reason for output in mine).most_common()),
                    prompt_tokens=sum(output.usage.prompt_tokens for output in mine),
                    cached_tokens=sum(output.usage.cached_tokens for output in mine),
                    computed_tokens=computed[replica.replica] + replica.computed_tokens,
                    pages_cached=replica.pages_cached,
                )
            )
        marks = [answer.right for answer in answers if answer.right is not None]
        return cls(
            policy=policy,
            replicas=tuple(shares),
            right=sum(marks) if marks else None,
            ttft=Spread.of([output.timing.ttft for output in outputs]),
            latency=Spread.of([output.timing.total for output in outputs]),
            seconds=seconds,
        )

    @property
    def requests(self) -> int:
        """How many there were."""
        return sum(one.requests for one in self.replicas)

    @property
    def accuracy(self) -> float | None:
        """Right answers / answers; `None` where they were not graded."""
        return None if self.right is None else self.right / self.requests

    @property
    def hit_rate(self) -> float:
        """Cached prompt tokens / prompt tokens."""
        return sum(one.cached_tokens for one in self.replicas) / sum(one.prompt_tokens for one in self.replicas)

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model, on all replicas."""
        return sum(one.computed_tokens for one in self.replicas)

    @property
    def requests_per_second(self) -> float:
        """Requests / seconds of the whole burst."""
        return self.requests / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in seconds."""
        return {
            **asdict(self),
            "requests": self.requests,
            "accuracy": self.accuracy,
            "hit_rate": self.hit_rate,
            "computed_tokens": self.computed_tokens,
            "requests_per_second": self.requests_per_second,
        }


def replica_table(burst: Burst) -> Table:
    """What went where, and why."""
    made = table("replica", "requests", "hit rate", "computed", "why<")
    for one in burst.replicas:
        made.add_row(
            str(one.replica),
            str(one.requests),
            f"{one.cached_tokens / max(one.prompt_tokens, 1):.0%}",
            f"{one.computed_tokens:,}",
            ", ".join(f"{count} {reason}" for reason, count in one.reasons.items()),
        )
    return made


def legend(burst: Burst) -> list[str]:
    """A line on each reason that its name does not tell."""
    used = {reason for one in burst.replicas for reason in one.reasons}
    return [f"{reason}: {meaning}" for reason, meaning in REASONS.items() if reason in used]


def policy_table(bursts: Sequence[Burst]) -> Table:
    """The policies side by side."""
    made = table("policy<", "right", "hit rate", "computed", "TTFT, s", "latency, s", "req/s")
    for burst in bursts:
        made.add_row(
            burst.policy,
            "-" if burst.right is None else accuracy(burst.right, burst.requests),
            f"{burst.hit_rate:.0%}",
            f"{burst.computed_tokens:,}",
            str(burst.ttft),
            str(burst.latency),
            f"{burst.requests_per_second:.1f}",
        )
    return made
