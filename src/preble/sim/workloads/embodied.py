"""Embodied agent: examples of a type of task, then one episode of it, longer by a step with every request."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from preble.sim.workloads.conversation import Conversation
from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.prompts import Segment
from preble.sim.workloads.sessions import Session
from preble.sim.workloads.workload import Means, Workload

EXAMPLES = Skewed(1_785, 0.15, 1_000, 3_000)
EPISODE = Conversation(
    opening=Skewed(110, 0.3, 40, 300),
    answer=Skewed(16, 0.6, 3, 120),
    message=Skewed(24, 0.6, 3, 150),
    pause=Skewed(0.3, 0.5, 0.05, 3),
    turns=Skewed(16.5, 0.5, 3, 50),
    context=8_192,
)


def _sessions(draws: Draws) -> Iterator[Session]:
    examples = draws.lengths(EXAMPLES)
    for number in count():
        task = draws.prefix()
        yield EPISODE.session(number, (Segment(("task", task), examples[task]),), draws.sessions)


EMBODIED = Workload(
    name="embodied",
    summary="examples of a type of task, shared by its episodes; every step's prompt extends the one before",
    source="ALFWorld as measured for Preble (arXiv 2407.00023)",
    prefixes=200,
    requests=3_600,
    rate=15,
    block_size=16,
    means=Means(prompt_tokens=2_285, output_tokens=16, shared=0.97, requests_per_key_portion=48),
    sessions=_sessions,
)
