"""Long documents: questions about them, with the passage that they refer to."""

from __future__ import annotations

from collections.abc import Iterator

from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.questions import Questions
from preble.sim.workloads.sessions import Session
from preble.sim.workloads.workload import Means, Workload

ASKED = Questions(
    about="document",
    subject=Skewed(22_524, 0.45, 6_000, 60_000),
    question=Skewed(950, 0.9, 20, 6_000),
    answer=Skewed(16, 0.8, 1, 150),
    reading=Skewed(20, 0.7, 2, 120),
    per_visit=2.5,
)


def _sessions(draws: Draws) -> Iterator[Session]:
    return ASKED.sessions(draws)


LONG_DOCUMENT = Workload(
    name="long-document",
    summary="a few long documents; readers ask about them, quoting the passage they mean",
    source="LooGLE as measured in Preble (arXiv 2407.00023)",
    prefixes=24,
    requests=393,
    rate=0.7,
    block_size=64,
    means=Means(prompt_tokens=23_474, output_tokens=16, shared=0.91, requests_per_key_portion=18),
    sessions=_sessions,
)
