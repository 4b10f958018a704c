"""The hottest prefixes, and which replicas have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from preble.sched.hot_prefixes import HotPrefix
from preble.sim.html import Table
from preble.sim.outcome import Outcome

MOST_RANGES = 8
"""Of replica numbers in one cell."""


def hottest_tables(runs: Mapping[str, Outcome]) -> list[Table]:
    """One per policy whose tree had a prefix that prompts share."""
    header = ("prefix", "replicas that have it", "positions", "prompts", "shared tokens")
    return [
        Table(header, [_row(hot, run.settings.replicas) for hot in run.hottest], caption=label, left=2)
        for label, run in runs.items()
        if run.hottest
    ]


def _row(hot: HotPrefix, replicas: int) -> list[str]:
    name = f"{hot.name:016x}"[:8]
    return [
        f"{hot.namespace}:{name}" if hot.namespace else name,
        f"{len(hot.replicas)} of {replicas}: {_holders(hot)}" if hot.replicas else "none",
        f"{hot.start:,}-{hot.end:,}",
        f"{hot.uses:,}",
        f"{hot.shared_tokens:,}",
    ]


def _holders(hot: HotPrefix) -> str:
    """`0-3, 7` have all of it; of the others the share: `5 (40 %)`."""
    whole = ranges(replica for replica, tokens in hot.replicas.items() if tokens == hot.tokens)
    parts = [
        f"{replica} ({tokens / hot.tokens:.0%})" for replica, tokens in hot.replicas.items() if tokens < hot.tokens
    ]
    cells = whole + parts
    more = len(cells) - MOST_RANGES
    return ", ".join(cells) if more <= 0 else f"{', '.join(cells[:MOST_RANGES])}, …"


def ranges(numbers: Iterable[int]) -> list[str]:
    """Rising numbers with neighbours as `3-5`."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
