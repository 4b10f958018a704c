"""Made workloads against the paper's study, with the statistics written down anew from their definitions."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest

from preble.sim.trace import Trace, TracedRequest
from preble.sim.workloads import WORKLOADS, make_workload

PAPER = {
    "tool-use": (1_835, 43, 0.85, 39),
    "embodied": (2_285, 16, 0.97, 48),
    "programming": (3_871, 190, 0.97, 126),
    "video-qa": (9_865, 4, 0.88, 8.6),
    "long-document": (23_474, 16, 0.91, 18),
}
"""Mean prompt and output tokens, share of prompt tokens shared with other requests, requests per key portion."""


@dataclass
class Measured:
    shared: float
    """Share of the prompt tokens in blocks that another prompt has too."""
    hit_rate: float
    """Share of the prompt tokens in blocks that an earlier prompt had, which an endless cache would find."""
    per_key: float
    """Requests per distinct key portion."""


def measure(trace: Trace) -> Measured:
    """Reads a trace as a prefix tree of blocks. A block number has one predecessor only: it is a place in the tree."""
    size = trace.block_size
    prompts = [(request.prompt_tokens, request.blocks.tolist()) for request in trace.requests]
    users: Counter[int] = Counter()
    following: defaultdict[int, set[int]] = defaultdict(set)
    ends: set[int] = set()
    total = shared = found = 0
    for tokens, blocks in prompts:
        total += tokens
        ends.add(blocks[-1])
        for place, block in enumerate(blocks):
            if block in users:
                found += min(size, tokens - place * size)
            users[block] += 1
            if place:
                following[blocks[place - 1]].add(block)
    keys = set()
    for tokens, blocks in prompts:
        start = 0
        key = -1
        for place, block in enumerate(blocks):
            end = min((place + 1) * size, tokens)
            if users[block] > 1:
                shared += end - place * size
            if len(following[block]) != 1 or block in ends:  # the tree's node ends here
                if end - start > start:
                    key = block
                start = end
        keys.add(key)
    return Measured(shared / total, found / total, len(prompts) / len(keys))


def test_the_statistics_of_a_trace_counted_by_hand() -> None:
    def request(tokens: int, *blocks: int) -> TracedRequest:
        return TracedRequest(0.0, tokens, 1, np.array(blocks, np.int32))

    # Four tokens for all; then twelve for two, once repeated, against a short and a long tail of their own.
    trace = Trace("", 4, (request(16, 0, 1, 2, 3), request(16, 0, 1, 2, 3), request(7, 0, 4), request(12, 0, 5, 6)))
    measured = measure(trace)
    assert measured.shared == (16 + 16 + 4 + 4) / 51
    assert measured.hit_rate == (16 + 4 + 4) / 51
    assert measured.per_key == 4 / 3  # named after their last blocks: 3, 0 and 6


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PAPER)
def test_means_are_those_of_the_paper_at_its_sizes(name: str, seed: int) -> None:
    prompt, output, shared, per_key = PAPER[name]
    workload = WORKLOADS[name]
    aims = workload.means
    assert (aims.prompt_tokens, aims.output_tokens, aims.shared, aims.requests_per_key_portion) == PAPER[name]

    trace = make_workload(name, requests=workload.requests, rate=workload.rate, seed=seed)
    measured = measure(trace)
    assert np.mean([one.prompt_tokens for one in trace.requests]) == pytest.approx(prompt, rel=0.06)
    assert np.mean([one.output_tokens for one in trace.requests]) == pytest.approx(output, rel=0.06)
    assert measured.shared == pytest.approx(shared, rel=0.10)
    # What can be found again is what a scheduler lives on: it has to be there too.
    assert measured.hit_rate == pytest.approx(shared, rel=0.03)
    assert measured.per_key == pytest.approx(per_key, rel=0.15)


@pytest.mark.parametrize("name", ["chat", "agents", "unique"])
def test_means_are_what_the_description_says(name: str) -> None:
    workload = WORKLOADS[name]
    aims = workload.means
    trace = make_workload(name, requests=workload.requests, rate=workload.rate)
    measured = measure(trace)
    assert np.mean([one.prompt_tokens for one in trace.requests]) == pytest.approx(aims.prompt_tokens, rel=0.12)
    assert np.mean([one.output_tokens for one in trace.requests]) == pytest.approx(aims.output_tokens, rel=0.06)
    assert measured.shared == pytest.approx(aims.shared, rel=0.03)
    assert measured.per_key == pytest.approx(aims.requests_per_key_portion, rel=0.25)


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_are_skewed(name: str) -> None:
    trace = make_workload(name, requests=1_000, rate=WORKLOADS[name].rate)
    outputs = np.array([one.output_tokens for one in trace.requests])
    assert np.mean(outputs < np.mean(outputs)) > 0.53
    assert outputs.max() > 2.5 * np.mean(outputs)


def visits(trace: Trace) -> list[int]:
    """How often each prefix was chosen, most popular first. The first block tells the prefix."""
    chosen = {one.session: int(one.blocks[0]) for one in trace.requests}
    return sorted(Counter(chosen.values()).values(), reverse=True)


@pytest.mark.parametrize(("given", "exponent"), [(None, 1.1), (0.7, 0.7), (1.6, 1.6)])
def test_prefixes_are_as_popular_as_zipf_says(given: float | None, exponent: float) -> None:
    trace = make_workload("video-qa", requests=9_000, rate=3, prefixes=60, popularity=given)
    top = visits(trace)[:15]
    slope, _ = np.polyfit(np.log(np.arange(1, len(top) + 1)), np.log(top), 1)
    assert -slope == pytest.approx(exponent, abs=0.12)


def test_all_prefixes_are_alike_without_popularity() -> None:
    trace = make_workload("video-qa", requests=9_000, rate=3, prefixes=60, popularity=0)
    counts = visits(trace)
    assert len(counts) == 60
    # 6,000 visits, 100 each: five standard deviations of a Poisson count are 50
    assert counts[0] < 150
    assert counts[-1] > 50
