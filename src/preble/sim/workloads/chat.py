"""Chat: assistants with a system prompt each, and people who read, think and go on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from preble.sim.workloads.conversation import Conversation
from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.prompts import Segment
from preble.sim.workloads.sessions import Session
from preble.sim.workloads.workload import Means, Workload

SYSTEM = Skewed(400, 0.7, 50, 3_000)
TALK = Conversation(
    opening=Skewed(161, 1.1, 5, 4_000),
    answer=Skewed(338, 0.8, 5, 2_000),
    message=Skewed(161, 1.1, 5, 4_000),
    pause=Skewed(30, 0.9, 2, 300),
    turns=Skewed(4.6, 0.8, 1, 40),
    context=32_768,
)


def _sessions(draws: Draws) -> Iterator[Session]:
    systems = draws.lengths(SYSTEM)
    for number in count():
        assistant = draws.prefix()
        yield TALK.session(number, (Segment(("assistant", assistant), systems[assistant]),), draws.sessions)


CHAT = Workload(
    name="chat",
    summary="conversations of some turns, each prompt with the history and all answers; people think in between",
    source="lengths of ShareGPT as in vLLM's paper (arXiv 2309.06180), turns of ShareChat (arXiv 2512.17843)",
    prefixes=100,
    requests=3_600,
    rate=6,
    block_size=16,
    means=Means(prompt_tokens=1_650, output_tokens=335, shared=0.925, requests_per_key_portion=5.2),
    sessions=_sessions,
)
