"""Unique prompts: nothing in common. Whatever a policy gains here, it does not gain by sharing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.prompts import Segment
from preble.sim.workloads.sessions import Session, Turn
from preble.sim.workloads.workload import Means, Workload

PROMPT = Skewed(2_000, 0.7, 100, 16_000)
ANSWER = Skewed(200, 0.8, 5, 2_000)


def _sessions(draws: Draws) -> Iterator[Session]:
    for number in count():
        path = (Segment(number, PROMPT.draw_tokens(draws.sessions)),)
        yield Session((Turn(path, ANSWER.draw_tokens(draws.sessions)),), waits=False)


UNIQUE = Workload(
    name="unique",
    summary="no two prompts have anything in common: the control",
    source="made up, of the size of the other short ones",
    prefixes=0,
    requests=3_600,
    rate=6,
    block_size=16,
    means=Means(prompt_tokens=2_000, output_tokens=200, shared=0, requests_per_key_portion=1),
    sessions=_sessions,
)
