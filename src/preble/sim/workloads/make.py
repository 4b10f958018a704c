"""Traces made of a workload's description."""

from __future__ import annotations

from itertools import islice

import numpy as np

from preble.errors import InvalidRequest
from preble.sim.trace import Trace, TracedRequest
from preble.sim.workloads.agents import AGENTS
from preble.sim.workloads.arrivals import arrival_times
from preble.sim.workloads.chat import CHAT
from preble.sim.workloads.draws import Draws
from preble.sim.workloads.embodied import EMBODIED
from preble.sim.workloads.long_document import LONG_DOCUMENT
from preble.sim.workloads.programming import PROGRAMMING
from preble.sim.workloads.prompts import PromptBook
from preble.sim.workloads.sessions import interleave
from preble.sim.workloads.tool_use import TOOL_USE
from preble.sim.workloads.unique import UNIQUE
from preble.sim.workloads.video_qa import VIDEO_QA
from preble.sim.workloads.workload import Workload

WORKLOADS: dict[str, Workload] = {
    one.name: one for one in (TOOL_USE, EMBODIED, PROGRAMMING, VIDEO_QA, LONG_DOCUMENT, CHAT, AGENTS, UNIQUE)
}
"""Every workload by its name: the five of the Preble paper, two of today, and a control."""

POPULARITY = 1.1
"""Zipf's exponent in the paper's ablation."""


def make_workload(
    name: str,
    *,
    requests: int,
    rate: float,
    seed: int = 0,
    arrivals: str = "poisson",
    popularity: float | None = None,
    prefixes: int | None = None,
) -> Trace:
    """Makes traffic of one kind.

    The same arguments give the same trace. With all else equal, fewer requests are the beginning of more, and the
    kind of arrivals changes when requests come, not what is in them. The rate does: the more requests a second, the
    more sessions there are at a time, so that users' pauses keep their length.

    Args:
        name: One of `WORKLOADS`, which tells the sizes that each is meant for.
        requests: How many, at least 1.
        rate: Requests per second, over all sessions.
        seed: At least 0. Where all chance comes from (numpy's default generator).
        arrivals: One of `preble.sim.workloads.ARRIVALS`.
        popularity: Exponent of Zipf's law for the choice of prefixes, `POPULARITY` by default. 0 makes all alike.
        prefixes: How many different ones there are. By default as many as the workload's description says.

    Returns:
        A trace called `name`. Turns of a session carry its name and their think time; in an open loop they come at
        least that, and about the time of the answer before, after each other, as far as arrivals are even.

    Raises:
        InvalidRequest: No such workload or kind of arrivals, a number out of its range, or prefixes for a workload
            that has none.
    """
    if name not in WORKLOADS:
        raise InvalidRequest(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
    workload = WORKLOADS[name]
    if requests < 1:
        raise InvalidRequest(f"a workload has at least 1 request, not {requests}")
    if seed < 0:
        raise InvalidRequest(f"the seed must be at least 0, not {seed}")
    if not workload.prefixes and not (prefixes is None and popularity is None):
        raise InvalidRequest(f"the prompts of {name!r} share no prefix: leave out prefixes and popularity")
    if prefixes is not None and prefixes < 1:
        raise InvalidRequest(f"a workload has at least 1 prefix, not {prefixes}")
    if popularity is not None and not 0 <= popularity < float("inf"):
        raise InvalidRequest(f"the exponent of popularity must be at least 0 and finite, not {popularity}")

    contents, times = np.random.SeedSequence(seed).spawn(2)
    arrive = arrival_times(arrivals, requests, rate, np.random.default_rng(times)).tolist()
    draws = Draws(contents, prefixes or workload.prefixes or 1, POPULARITY if popularity is None else popularity)
    book = PromptBook(workload.block_size)
    sent = islice(interleave(workload.sessions(draws), rate), requests)
    return Trace(
        name,
        workload.block_size,
        tuple(
            TracedRequest(
                arrival=arrival,
                prompt_tokens=sum(segment.tokens for segment in turn.path),
                output_tokens=turn.output_tokens,
                blocks=book.blocks(turn.path),
                session=None if session is None else f"{name}-{session}",
                think=think,
            )
            for arrival, (session, turn, think) in zip(arrive, sent, strict=True)
        ),
    )
