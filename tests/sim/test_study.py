"""Every number of a study, worked out by hand and by slower ways that cannot go wrong."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_traces import Prefix, prefixes, request, traces

from preble.errors import InvalidRequest
from preble.sim.study import study
from preble.sim.study.arrivals import Arrivals
from preble.sim.study.distribution import Distribution
from preble.sim.study.prompt_tree import PromptTree
from preble.sim.study.sharing import Sharing, key_portion
from preble.sim.study.study import cache_sizes
from preble.sim.trace import Trace, TracedRequest


def tiny() -> Trace:
    """Two prompts that begin with the same 8 tokens, and one by itself."""
    return Trace(
        "tiny",
        4,
        (
            request([1, 2, 3], 12, arrival=10.0, output=2, session="a"),
            request([1, 2, 4], 10, arrival=11.0, output=4, session="a"),
            request([5], 4, arrival=13.0, output=6, session="b"),
        ),
    )


def holders(trace: Trace) -> dict[Prefix, frozenset[int]]:
    """Which requests have a prefix."""
    found: defaultdict[Prefix, set[int]] = defaultdict(set)
    for number, one in enumerate(trace.requests):
        for prefix, _ in prefixes(trace, one):
            found[prefix].add(number)
    return {prefix: frozenset(numbers) for prefix, numbers in found.items()}


def runs(trace: Trace, one: TracedRequest) -> list[tuple[Prefix, int, int, frozenset[int]]]:
    """The nodes of the prefix tree on a prompt's path, as stretches of blocks with the same requests: where each ends,
    the tokens before it, its own, and the requests."""
    by_prefix = holders(trace)
    found: list[tuple[Prefix, int, int, frozenset[int]]] = []
    position = 0
    for prefix, size in prefixes(trace, one):
        if found and found[-1][3] == by_prefix[prefix]:
            _, start, own, numbers = found.pop()
            found.append((prefix, start, own + size, numbers))
        else:
            found.append((prefix, position, size, by_prefix[prefix]))
        position += size
    return found


def naive_key_portion(trace: Trace, one: TracedRequest) -> tuple[Prefix, int, int]:
    """Where it ends, the tokens before it and its own."""
    path = runs(trace, one)
    return [(end, start, own) for end, start, own, _ in path if own > start][-1]


def test_the_whole_study_of_a_tiny_trace() -> None:
    document = study(tiny()).as_json()
    assert document["trace"] == {"name": "tiny", "block_size": 4}
    assert document["requests"] == 3
    assert document["sessions"] == 2
    assert document["prompt_output_ratio"] == pytest.approx(26 / 12)
    arrivals = document["arrivals"]
    assert arrivals["duration_s"] == 3.0
    assert arrivals["requests_per_s"] == pytest.approx(2 / 3)
    assert arrivals["gap_variation"] == pytest.approx(1 / 3)
    assert arrivals["dispersion"] == []
    counts = arrivals["over_time"]["counts"]
    assert arrivals["over_time"]["slice_s"] == pytest.approx(0.03)
    assert len(counts) == 100
    assert {place: count for place, count in enumerate(counts) if count} == {0: 1, 33: 1, 99: 1}
    prompts = document["prompt_tokens"]
    assert prompts.pop("histogram") == {"edges": [*range(4, 14)], "counts": [1, 0, 0, 0, 0, 0, 1, 0, 1]}
    assert prompts == pytest.approx(
        {"total": 26, "mean": 26 / 3, "p50": 10, "p90": 11.6, "p95": 11.8, "p99": 11.96, "max": 12}
    )
    assert document["output_tokens"]["total"] == 12
    sharing = document["sharing"]
    assert sharing["shared"] == pytest.approx(16 / 26)
    assert sharing["ideal_hit_rate"] == pytest.approx(8 / 26)
    assert sharing["distinct_tokens"] == 18
    assert sharing["hottest"] == [
        {"start_token": 0, "tokens": 8, "requests": 2, "first_request": 1, "share_of_prompt_tokens": 16 / 26}
    ]
    keys = sharing["key_portions"]
    assert keys["count"] == 2
    assert keys["share_of_prompt_tokens"] == pytest.approx(20 / 26)
    assert keys["tokens"]["total"] == 12
    assert keys["requests"]["mean"] == 1.5
    hits = {1: 0, 2: 0, 3: 0, 5: 4, 7: 4, 10: 8, 15: 8, 18: 8}
    assert document["cache"]["curve"] == [{"tokens": size, "hit_rate": hit / 26} for size, hit in hits.items()]
    assert document["cache"]["needed"] == [
        {"of_ideal": 0.5, "tokens": 4, "hit_rate": 4 / 26},
        {"of_ideal": 0.9, "tokens": 8, "hit_rate": 8 / 26},
        {"of_ideal": 0.99, "tokens": 8, "hit_rate": 8 / 26},
    ]
    assert json.loads(json.dumps(document)) == study(tiny()).as_json() | {"prompt_tokens": prompts}


def test_a_trace_of_one_request() -> None:
    document = study(Trace("one", 16, (request([0], 5, arrival=7.0),))).as_json()
    assert document["sessions"] == 0
    assert document["arrivals"] == {
        "duration_s": 0.0,
        "requests_per_s": None,
        "gap_variation": None,
        "dispersion": [],
        "over_time": {"slice_s": 0.0, "counts": [1]},
    }
    assert document["prompt_tokens"]["histogram"] == {"edges": [5, 6], "counts": [1]}
    assert document["sharing"]["hottest"] == []
    assert document["cache"]["needed"] == []
    assert document["cache"]["curve"][-1] == {"tokens": 5, "hit_rate": 0.0}


def test_a_trace_without_requests_cannot_be_studied() -> None:
    with pytest.raises(InvalidRequest, match="'none' has no requests"):
        study(Trace("none", 16, ()))


def test_a_prompt_that_comes_again_is_all_hits() -> None:
    """Its partial block as well."""
    document = study(Trace("twice", 4, (request([0, 1], 7), request([0, 1], 7)))).as_json()
    assert document["sharing"]["ideal_hit_rate"] == 0.5
    assert document["sharing"]["shared"] == 1.0
    assert document["cache"]["curve"][-1] == {"tokens": 7, "hit_rate": 0.5}


def test_key_portions_follow_the_definition() -> None:
    """A system prompt of 2 blocks, a document of 3 below it that two prompts have, questions of 1 block."""
    trace = Trace(
        "documents",
        10,
        (
            request([0, 1, 10, 11, 12, 90], 60),
            request([0, 1, 10, 11, 12, 91], 60),
            request([0, 1, 20, 92], 40),
            request([0, 1, 20, 93], 40),
        ),
    )
    tree = PromptTree(trace)
    keys = [key_portion(prompt) for prompt in tree.prompts]
    assert [(key.start_token, key.own_tokens, key.requests) for key in keys] == [(20, 30, 2)] * 2 + [(0, 20, 4)] * 2
    summary = Sharing.of(tree).key_portions
    assert summary.count == 2
    assert summary.tokens.values.tolist() == [20, 30]
    assert summary.requests.values.tolist() == [2, 2], "by whose deepest it is, not by who has it"
    assert summary.share == pytest.approx((2 * 30 + 2 * 20) / 200)


def test_own_tokens_must_outnumber_those_before_not_just_equal_them() -> None:
    tree = PromptTree(Trace("even", 10, (request([0, 1], 20), request([0, 2], 20))))
    (common,) = set(map(key_portion, tree.prompts))
    assert (common.own_tokens, common.requests) == (10, 2)


@given(traces())
def test_sharing_is_what_looking_at_every_pair_of_prompts_finds(trace: Trace) -> None:
    by_prefix = holders(trace)
    total = shared = hits = 0
    portions: Counter[tuple[Prefix, int, int]] = Counter()
    for number, one in enumerate(trace.requests):
        for prefix, size in prefixes(trace, one):
            total += size
            shared += size * (len(by_prefix[prefix]) > 1)
            hits += size * (min(by_prefix[prefix]) < number)
        portions[naive_key_portion(trace, one)] += 1
    sharing = study(trace).sharing
    assert sharing.shared == pytest.approx(shared / total)
    assert sharing.ideal_hit_rate == pytest.approx(hits / total)
    assert sharing.distinct_tokens == total - hits
    keys = sharing.key_portions
    assert keys.tokens.values.tolist() == sorted(own for _, _, own in portions)
    assert keys.requests.values.tolist() == sorted(portions.values())
    assert keys.requests.total == len(trace.requests)
    assert keys.share == pytest.approx(sum(own * count for (_, _, own), count in portions.items()) / total)


@given(traces())
def test_the_hottest_are_the_shared_runs_with_most_prompt_tokens(trace: Trace) -> None:
    total = sum(one.prompt_tokens for one in trace.requests)
    nodes = {run for one in trace.requests for run in runs(trace, one) if len(run[3]) > 1}
    expected = sorted((own * len(numbers) for _, _, own, numbers in nodes), reverse=True)
    tree = PromptTree(trace)
    hottest = Sharing.of(tree, hottest=3).hottest
    assert [run.tokens * run.requests for run in hottest] == expected[:3]
    for run in hottest:
        assert run.share == pytest.approx(run.tokens * run.requests / total)
        assert any(
            (start, own, len(numbers), min(numbers) + 1) == (run.start, run.tokens, run.requests, run.first_request)
            for _, start, own, numbers in nodes
        )
    everything = Sharing.of(tree, hottest=1000)
    assert sum(run.share for run in everything.hottest) == pytest.approx(everything.shared)


@given(traces())
def test_the_tree_is_a_radix_tree(trace: Trace) -> None:
    PromptTree(trace).check()


def test_dispersion_over_windows_of_a_second() -> None:
    """Two requests in every other second: counts of 2 and 0, whose variance is 1 and so is their mean."""
    times = [second + part for second in range(0, 20, 2) for part in (0.0, 0.5)]
    arrivals = Arrivals(np.array([*times, 20.0]))
    assert [one.as_json() for one in arrivals.dispersion] == [{"window_s": 1.0, "windows": 20, "index": 1.0}]


def test_arrivals_by_the_clock_do_not_vary() -> None:
    arrivals = Arrivals(np.arange(0.0, 601.0))
    assert arrivals.rate == 1.0
    assert arrivals.variation == 0.0
    assert [(one.window, one.windows, one.index) for one in arrivals.dispersion] == [
        (1.0, 600, 0.0),
        (10.0, 60, 0.0),
        (60.0, 10, 0.0),
    ]


def test_poisson_arrivals_have_a_variation_and_a_dispersion_of_1() -> None:
    gaps = np.random.default_rng(0).exponential(0.5, 20_000)
    arrivals = Arrivals(np.cumsum(gaps) - gaps[0])
    assert arrivals.variation == pytest.approx(1, abs=0.03)
    assert [one.window for one in arrivals.dispersion] == [1.0, 10.0, 60.0, 600.0]
    assert [one.index for one in arrivals.dispersion] == pytest.approx([1, 1, 1, 1], abs=0.5)


@given(st.lists(st.integers(1, 10**6), min_size=1))
def test_a_distribution_counts_every_value_once(values: list[int]) -> None:
    distribution = Distribution.of(values)
    histogram = distribution.histogram()
    assert histogram.edges[0] == min(values)
    assert histogram.edges[-1] == max(values) + 1
    assert list(histogram.edges) == sorted(set(histogram.edges))
    assert len(histogram.edges) == len(histogram.counts) + 1 <= 31
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        assert count == sum(low <= value < high for value in values)
    assert (distribution.total, distribution.max) == (sum(values), max(values))


@given(st.integers(1, 10**9))
def test_cache_sizes_are_round_and_end_with_all_distinct_tokens(distinct: int) -> None:
    sizes = cache_sizes(distinct)
    assert sizes[-1] == distinct
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] <= max(1, distinct / 10)
    assert sizes[0] <= 10_000
    assert all(str(size).rstrip("0") in {"1", "15", "2", "3", "5", "7"} for size in sizes[:-1])
    if distinct >= 100_000:
        assert {10_000, 15_000, 20_000, 30_000, 50_000, 70_000} <= set(sizes)
