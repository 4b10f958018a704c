"""Coding agents: a large prompt of tools and rules, then long sessions that tool results let grow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from preble.sim.workloads.conversation import Conversation
from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.prompts import Segment
from preble.sim.workloads.sessions import Session
from preble.sim.workloads.workload import Means, Workload

TOOLS = Skewed(18_000, 0.2, 8_000, 32_000)
CODING = Conversation(
    opening=Skewed(4_000, 1.0, 200, 40_000),
    answer=Skewed(450, 1.0, 30, 6_000),
    message=Skewed(950, 1.2, 20, 16_000),
    pause=Skewed(10, 1.0, 0.5, 180),
    turns=Skewed(36, 0.8, 1, 150),
    context=131_072,
)


def _sessions(draws: Draws) -> Iterator[Session]:
    tools = draws.lengths(TOOLS)
    for number in count():
        release = draws.prefix()
        yield CODING.session(number, (Segment(("release", release), tools[release]),), draws.sessions)


AGENTS = Workload(
    name="agents",
    summary="a large tool prompt shared by sessions; long sessions that grow by answers and tool results",
    source="of the order of the recorded coding sessions of github.com/callanjfox/kv-cache-tester",
    prefixes=20,
    requests=1_200,
    rate=0.5,
    block_size=64,
    means=Means(prompt_tokens=45_000, output_tokens=450, shared=0.998, requests_per_key_portion=72),
    sessions=_sessions,
)
