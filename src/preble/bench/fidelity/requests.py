"""What is asked of the engine: prompts that begin with one of a few prefixes, at times of a Poisson process."""

from __future__ import annotations

import numpy as np

from preble.sched.hashing import Tokens
from preble.sim.trace import Trace, TracedRequest
from preble.sim.workloads import arrival_times
from preble.sim.workloads.prompts import PromptBook, Segment

BLOCK = 16
"""Tokens in a block of the trace."""
PREFIXES = 64
"""So many that some are used for the first time all along: were these few and early, the p99 of TTFT would be the luck
of a handful of steps."""
PREFIX_TOKENS = (256, 768)
OWN_TOKENS = (32, 160)
OUTPUT_TOKENS = (8, 48)
"""Least and most, all equally likely: short enough that a CPU answers a few requests in a second."""
FIRST_TOKEN = 16
"""Ids below are left to special tokens."""


def make_requests(count: int, rate: float, seed: int) -> Trace:
    """A trace of `count` requests, `rate` per second. The prefix of rank k is used in proportion to 1 / k."""
    lengths = np.random.default_rng(0).integers(*PREFIX_TOKENS, PREFIXES, endpoint=True).tolist()
    weights = 1 / np.arange(1, PREFIXES + 1)
    generator = np.random.default_rng(seed)
    times = arrival_times("poisson", count, rate, generator).tolist()
    book = PromptBook(BLOCK)
    made = []
    for number, arrival in enumerate(times):
        prefix = int(generator.choice(PREFIXES, p=weights / weights.sum()))
        own = int(generator.integers(*OWN_TOKENS, endpoint=True))
        output = int(generator.integers(*OUTPUT_TOKENS, endpoint=True))
        path = (Segment(("prefix", prefix), lengths[prefix]), Segment(number, own))
        made.append(TracedRequest(arrival, lengths[prefix] + own, output, book.blocks(path)))
    return Trace("shared prefixes", BLOCK, tuple(made))


def prompt_ids(trace: Trace, request: TracedRequest, vocabulary: int) -> Tokens:
    """int32 [prompt_tokens]: a prompt that a model can read; equal blocks are equal tokens, others are not."""
    parts = [
        np.random.default_rng(block).integers(FIRST_TOKEN, vocabulary, trace.block_size, dtype=np.int32)
        for block in request.blocks.tolist()
    ]
    return np.concatenate(parts)[: request.prompt_tokens]
