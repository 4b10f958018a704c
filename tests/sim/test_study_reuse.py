"""The curve of hit rates against an LRU cache that is simulated, one size at a time."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st
from study_traces import Prefix, prefixes, request, traces

from preble.sim.study import study
from preble.sim.study.prompt_tree import PromptTree
from preble.sim.study.reuse import TokensByRequest
from preble.sim.trace import Trace


def simulated_hits(trace: Trace, size: int) -> int:
    """Prompt tokens found in an LRU cache of `size` tokens that drops one block at a time."""
    cache: OrderedDict[Prefix, int] = OrderedDict()  # oldest first
    hits = 0
    for one in trace.requests:
        blocks = prefixes(trace, one)
        for prefix, tokens in blocks:
            if prefix not in cache:
                break
            hits += tokens
        for prefix, tokens in reversed(blocks):
            cache[prefix] = tokens
            cache.move_to_end(prefix)
            while sum(cache.values()) > size:
                cache.popitem(last=False)
        assert all(prefix[:-1] in cache or len(prefix) == 1 for prefix in cache), "a prefix is dropped from its end"
    return hits


@given(traces())
def test_a_pass_finds_the_hits_of_every_size(trace: Trace) -> None:
    reuse = PromptTree(trace).reuse
    for size in range(2 + study(trace).sharing.distinct_tokens):
        assert reuse.hit_tokens(size) == simulated_hits(trace, size), size


@given(traces())
def test_the_curve_ends_at_the_ideal_and_the_needed_caches_are_the_smallest(trace: Trace) -> None:
    result = study(trace)
    cache, reuse = result.cache, PromptTree(trace).reuse
    assert cache.curve[-1].hit_rate == result.sharing.ideal_hit_rate
    rates = [one.hit_rate for one in cache.curve]
    assert rates == sorted(rates)
    ideal = reuse.hit_tokens(cache.curve[-1].tokens)
    assert bool(cache.needed) == bool(ideal)
    for one in cache.needed:
        assert reuse.hit_tokens(one.cache.tokens) >= one.of_ideal * ideal > reuse.hit_tokens(one.cache.tokens - 1)
        assert one.cache.hit_rate == reuse.hit_tokens(one.cache.tokens) / result.prompt_tokens.total


def test_a_prompt_larger_than_the_cache_leaves_its_beginning() -> None:
    trace = Trace("long", 10, (request([0, 1, 2], 30), request([0, 1, 2], 30)))
    reuse = PromptTree(trace).reuse
    assert [reuse.hit_tokens(size) for size in (9, 10, 19, 20, 29, 30)] == [0, 10, 10, 20, 20, 30]


def test_prompts_in_turn_need_room_for_each_other() -> None:
    """A system prompt of 10 tokens that is always there, and two conversations of 20 more by turns."""
    one, other = request([0, 1, 2], 30), request([0, 3, 4], 30)
    reuse = PromptTree(Trace("turns", 10, (one, other, one, other))).reuse
    # The first to come back needs the system prompt, the other's 20 tokens, and then its own.
    assert [reuse.hit_tokens(size) for size in (10, 30, 39, 40, 49, 50)] == [30, 30, 30, 50, 50, 70]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-5, 100))))
def test_sums_over_later_requests(additions: list[tuple[int, int]]) -> None:
    counts = [0] * 10
    sums = TokensByRequest(10)
    for number, tokens in additions:
        counts[number] += tokens
        sums.add(number, tokens)
    assert [sums.after(number) for number in range(10)] == [sum(counts[number + 1 :]) for number in range(10)]
