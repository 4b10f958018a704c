"""What a burst of requests cost, and how two placement policies compare: figures, tables, one sentence."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from preble.outputs import ClusterStats, GenerationOutput

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
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of one value at least."""
        return cls(statistics.fmean(seconds), max(seconds))

    def __str__(self) -> str:
        decimals = 2 if self.max < 10 else 1 if self.max < 100 else 0
        return f"{self.mean:.{decimals}f} / {self.max:.{decimals}f}"


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
    ttft: Spread
    latency: Spread
    seconds: float

    @classmethod
    def of(
        cls,
        policy: str,
        outputs: Sequence[GenerationOutput],
        before: ClusterStats,
        after: ClusterStats,
        seconds: float,
    ) -> Burst:
        """From the results of at least one request, and the statistics around them."""
        computed = {replica.replica: -replica.computed_tokens for replica in before.replicas}
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
        return cls(
            policy=policy,
            replicas=tuple(shares),
            ttft=Spread.of([output.timing.ttft for output in outputs]),
            latency=Spread.of([output.timing.total for output in outputs]),
            seconds=seconds,
        )

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
        return sum(one.requests for one in self.replicas) / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in seconds."""
        return {
            **asdict(self),
            "hit_rate": self.hit_rate,
            "computed_tokens": self.computed_tokens,
            "requests_per_second": self.requests_per_second,
        }


def replica_table(burst: Burst) -> Table:
    """What went where, and why."""
    table = _table("replica", "requests", "cached", "computed", "why<")
    for one in burst.replicas:
        table.add_row(
            str(one.replica),
            str(one.requests),
            f"{one.cached_tokens / max(one.prompt_tokens, 1):.0%}",
            f"{one.computed_tokens:,}",
            ", ".join(f"{count} {reason}" for reason, count in one.reasons.items()),
        )
    return table


def legend(burst: Burst) -> list[str]:
    """A line on each reason that its name does not tell."""
    used = {reason for one in burst.replicas for reason in one.reasons}
    return [f"{reason}: {meaning}" for reason, meaning in REASONS.items() if reason in used]


def policy_table(bursts: Sequence[Burst]) -> Table:
    """The policies side by side."""
    table = _table("policy<", "cached", "computed", "pages", "TTFT, s", "latency, s", "req/s")
    for burst in bursts:
        table.add_row(
            burst.policy,
            f"{burst.hit_rate:.0%}",
            f"{burst.computed_tokens:,}",
            f"{sum(one.pages_cached for one in burst.replicas):,}",
            str(burst.ttft),
            str(burst.latency),
            f"{burst.requests_per_second:.1f}",
        )
    return table


def verdict(burst: Burst, other: Burst) -> str:
    """One sentence on what the comparison shows, whichever way it went."""
    ratio = burst.computed_tokens / other.computed_tokens
    if round(ratio, 2) == 1:
        computed = f"as many tokens as {other.policy}"
    else:
        computed = f"{abs(1 - ratio):.0%} {'fewer' if ratio < 1 else 'more'} tokens than {other.policy}"
    speed = burst.requests_per_second / other.requests_per_second
    link = "and" if (ratio < 1) == (speed > 1) else "but"
    gain = "" if ratio < 1 or speed > 1 else ": no gain this time"
    return f"{burst.policy} computed {computed} {link} answered {speed:.1f} times as many questions per second{gain}."


def _table(*headings: str) -> Table:
    """Thin, one line a row; a heading that ends in `<` has its column to the left."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading.rstrip("<"), justify="left" if heading.endswith("<") else "right", no_wrap=True)
    return table
