"""The rules of other routers: cases worked out by hand, and each rule said a second time, in another way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_views import Asked, Books, Linear, view

from preble.sched import Policy, View
from preble.sched.policies import POLICIES
from preble.sched.policies.dynamo import Dynamo
from preble.sched.policies.llm_d import LlmD
from preble.sched.policies.ray import Ray
from preble.sched.policies.sglang import SGLang

RIVALS = ("sglang", "dynamo", "lmetric", "llm-d", "ray")


def chosen(policy: str | Policy, replicas: Iterable[Books], matched: Iterable[int] | None = None, **more: Any) -> Any:
    """The replica and the reason."""
    one = POLICIES[policy]() if isinstance(policy, str) else policy
    choice = one.choose(view(replicas, matched, **more))
    assert choice is not None
    return choice.chosen, choice.reason


def shares(policy: str, replicas: Iterable[Books], matched: Iterable[int] | None = None, **more: Any) -> Counter[int]:
    """How often each replica is chosen under 400 seeds."""
    books, cached = list(replicas), list(matched or [])
    return Counter(chosen(policy, books, cached, seed=seed, **more)[0] for seed in range(400))


@pytest.mark.parametrize("policy", RIVALS)
def test_a_single_replica_gets_everything(policy: str) -> None:
    for matched in (0, 50, 100):
        assert chosen(policy, [Books(3, 500, 10_000, decoding=400)], [matched])[0] == 0


# SGLang


def test_sglang_follows_the_match_while_queues_are_alike() -> None:
    assert chosen("sglang", [Books(in_flight=64), Books(in_flight=0)], [31, 0]) == (0, "exploit")
    assert chosen("sglang", [Books(in_flight=65), Books(in_flight=0)], [31, 0]) == (1, "shortest-queue")
    assert chosen("sglang", [Books(in_flight=65), Books(in_flight=0)]) == (1, "shortest-queue")


def test_sglang_needs_a_relative_difference_as_well() -> None:
    assert chosen("sglang", [Books(in_flight=300), Books(in_flight=200)], [100, 0]) == (0, "exploit")
    assert chosen("sglang", [Books(in_flight=301), Books(in_flight=200)], [100, 0]) == (1, "shortest-queue")


def test_sglang_needs_more_than_three_tenths_of_the_prompt() -> None:
    assert chosen("sglang", [Books(in_flight=1), Books(in_flight=2)], [0, 30]) == (0, "explore")
    assert chosen("sglang", [Books(in_flight=1), Books(in_flight=2)], [0, 31]) == (1, "exploit")


def test_sglang_gives_every_tie_to_the_first() -> None:
    assert shares("sglang", [Books(), Books(), Books()]) == {0: 400}
    assert shares("sglang", [Books(in_flight=3), Books(in_flight=9), Books()], [0, 40, 40]) == {1: 400}
    assert shares("sglang", [Books(in_flight=99), Books(), Books()]) == {1: 400}


def test_sglang_takes_other_thresholds() -> None:
    eager = SGLang(cache_threshold=0.1, balance_abs_threshold=4, balance_rel_threshold=1.1)
    assert chosen(eager, [Books(in_flight=4), Books()], [20, 0]) == (0, "exploit")
    assert chosen(eager, [Books(in_flight=5), Books()], [20, 0]) == (1, "shortest-queue")
    assert chosen(eager, [Books(in_flight=56), Books(in_flight=51)], [20, 0]) == (0, "exploit")
    assert chosen(eager, [Books(in_flight=57), Books(in_flight=51)], [20, 0]) == (1, "shortest-queue")


# Dynamo


def test_dynamo_adds_blocks_to_prefill_and_blocks_to_hold() -> None:
    """Prompt of 10 blocks; nobody in flight has any of it. Replica 0: 10 + 2 - 4 to prefill, 5 + 10 to hold, 23 in all.
    Replica 1: 10 + 0 - 0 to prefill and 2 + 10 to hold are 22, with a block more to hold 23, with two 24."""
    first = Books(queued_prefill_tokens=20, unique_pages=5)
    assert chosen("dynamo", [first, Books(unique_pages=2)], [40, 0]) == (1, "least-blocks")
    assert set(shares("dynamo", [first, Books(unique_pages=3)], [40, 0])) == {0, 1}
    assert chosen("dynamo", [first, Books(unique_pages=4)], [40, 0]) == (0, "least-blocks")


def test_dynamo_holds_blocks_in_use_only_once() -> None:
    """As above, but requests in flight have the first 30 tokens: 3 of the 4 blocks cached on 0 are held anyway."""
    first = Books(queued_prefill_tokens=20, unique_pages=5)
    used = [(0, 20, 4, 1), (20, 30, 1, 1), (30, 40, 0, 1)]
    costs = Dynamo().costs(view([first, Books()], [40, 0], stretches=used), 0)
    assert costs == {"prefill_blocks": 8, "decode_blocks": 5 + 10 - 3, "request_blocks": 0}
    assert Dynamo().costs(view([first, Books()], [40, 0], stretches=used), 1)["decode_blocks"] == 10
    assert Dynamo().costs(view([first], [20], stretches=used), 0)["decode_blocks"] == 5 + 10 - 2
    assert Dynamo().costs(view([first], [40]), 0)["decode_blocks"] == 15


def test_dynamo_counts_the_last_block_in_full() -> None:
    costs = Dynamo().costs(view([Books()], [90], asked=Asked(prompt_tokens=95)), 0)
    assert (costs["prefill_blocks"], costs["decode_blocks"]) == (0.5, 10)


def test_dynamo_is_blind_to_identical_load_unless_requests_count() -> None:
    """The whole prompt is in use on replica 0; repeats of it add neither blocks to prefill nor blocks to hold."""
    crowded, idle = Books(in_flight=200, decoding=100, unique_pages=10), Books()
    everything = [(0, 100, 200, 1)]
    assert chosen("dynamo", [crowded, idle], [100, 0], stretches=everything) == (0, "least-blocks")
    for weight, expected in ((0.04, 0), (0.06, 1)):
        weighed = Dynamo(decode_active_request_weight=weight)
        assert chosen(weighed, [crowded, idle], [100, 0], stretches=everything)[0] == expected
        assert weighed.costs(view([crowded], [100]), 0)["request_blocks"] == pytest.approx(200 * weight)


# LMetric


def test_lmetric_multiplies_tokens_by_requests() -> None:
    """(50 + 100 - 60) x 3 = 270 against 100 x 2 = 200, 100 x 3 = 300, and (35 + 100) x 2 = 270."""
    holder = Books(in_flight=2, queued_prefill_tokens=50)
    assert chosen("lmetric", [holder, Books(in_flight=1)], [60, 0]) == (1, "least-product")
    assert chosen("lmetric", [holder, Books(in_flight=2)], [60, 0]) == (0, "least-product")
    assert set(shares("lmetric", [holder, Books(in_flight=1, queued_prefill_tokens=35)], [60, 0])) == {0, 1}


def test_lmetric_counts_the_request_and_one_token_at_least() -> None:
    """Else every idle replica would score 0, and so would every full match."""
    assert chosen("lmetric", [Books(), Books()], [0, 10])[0] == 1
    assert chosen("lmetric", [Books(in_flight=30), Books(in_flight=20)], [100, 100])[0] == 1
    assert chosen("lmetric", [Books(in_flight=19), Books()], [100, 81])[0] == 1
    assert chosen("lmetric", [Books(in_flight=19), Books()], [100, 79])[0] == 0


# llm-d


def test_llm_d_sticks_to_those_that_have_four_fifths() -> None:
    busy = Books(queued_prefill_tokens=5000)
    assert chosen("llm-d", [busy, Books()], [80, 0]) == (0, "exploit")
    assert chosen("llm-d", [busy, Books()], [79, 0]) == (1, "explore")
    assert chosen("llm-d", [busy, Books()]) == (1, "explore")


def test_llm_d_gives_up_when_the_best_holder_is_later_by_more_than_the_budget() -> None:
    """A full step of 100 tokens takes 0.02 s, so 18 s are 90,000 tokens more than the best of the others has."""
    others = [Books(queued_prefill_tokens=10_000), Books(queued_prefill_tokens=20_000)]
    assert chosen("llm-d", [Books(queued_prefill_tokens=99_999), *others], [80, 0, 0]) == (0, "exploit")
    assert chosen("llm-d", [Books(queued_prefill_tokens=100_001), *others], [80, 0, 0]) == (1, "saturated")
    late = Books(queued_prefill_tokens=100_001)
    asked = Asked(prompt_tokens=200_000)
    assert chosen("llm-d", [late, *others], [160_000, 0, 0], asked=asked) == (0, "saturated"), "it still has the least"
    holders = [Books(queued_prefill_tokens=150_000), Books(queued_prefill_tokens=99_999)]
    assert chosen("llm-d", [*holders, *others], [100, 80, 0, 0]) == (1, "exploit")


def test_llm_d_measures_the_wait_by_each_replicas_own_cost() -> None:
    """Twice as fast a replica takes half as long over the same backlog."""
    fast = Linear(step=0.005, per_token=0.00005)
    holder = Books(queued_prefill_tokens=150_000, cost=fast)
    assert chosen("llm-d", [holder, Books()], [80, 0]) == (0, "exploit")
    assert LlmD().costs(view([holder], [80]), 0)["ttft_seconds"] == pytest.approx(15)
    assert chosen("llm-d", [Books(queued_prefill_tokens=150_000), Books(cost=fast)], [80, 0]) == (1, "saturated")
    longer_steps = Books(queued_prefill_tokens=99_000, max_batched_tokens=1_000)
    assert chosen("llm-d", [longer_steps, Books()], [80, 0]) == (0, "exploit"), "0.11 s for 1,000 tokens"


def test_llm_d_weighs_backlog_and_the_uncached_part_together() -> None:
    replicas = [Books(queued_prefill_tokens=10), Books(queued_prefill_tokens=20), Books(queued_prefill_tokens=40)]
    assert chosen("llm-d", replicas, [80, 95, 100])[0] == 1
    assert chosen("llm-d", replicas, [10, 30, 40])[0] == 1, "nobody has enough, and still it counts"
    assert set(shares("llm-d", replicas, [80, 90, 100])) == {0, 1}


def test_llm_d_does_not_see_decoding() -> None:
    busy = Books(in_flight=500, decoding=500, unique_pages=90_000, total_pages=90_000)
    assert chosen("llm-d", [busy, Books(queued_prefill_tokens=1)])[0] == 0


def test_llm_d_stops_counting_at_its_threshold() -> None:
    limit = 4_194_304
    full = Books(queued_prefill_tokens=limit - 100)
    assert chosen("llm-d", [full, Books(queued_prefill_tokens=limit - 101)])[0] == 1
    assert set(shares("llm-d", [full, Books(queued_prefill_tokens=limit * 2)])) == {0, 1}


def test_llm_d_without_a_budget_always_sticks() -> None:
    forever = LlmD(max_ttft_penalty_ms=0)
    assert chosen(forever, [Books(queued_prefill_tokens=4_000_000), Books()], [80, 0]) == (0, "exploit")
    assert chosen(LlmD(affinity_threshold=0.5), [Books(queued_prefill_tokens=9), Books()], [50, 0])[0] == 0


# Ray


def test_ray_follows_a_tenth_of_the_prompt() -> None:
    replicas = [Books(in_flight=9, resident_tokens=50), Books(in_flight=2, resident_tokens=10), Books(in_flight=1)]
    assert chosen("ray", replicas, [10, 0, 0]) == (0, "exploit")
    assert chosen("ray", replicas, [9, 0, 0]) == (2, "explore")


def test_ray_takes_the_shortest_queue_of_the_candidates() -> None:
    replicas = [Books(in_flight=3), Books(in_flight=5), Books(in_flight=4), Books(resident_tokens=1)]
    assert chosen("ray", replicas, [10, 40, 40, 0]) == (2, "exploit")
    assert chosen("ray", replicas) == (0, "explore"), "the fourth has fewer in flight but more in its cache"
    replicas = [Books(queued_prefill_tokens=30), Books(in_flight=3, resident_tokens=20, queued_prefill_tokens=9)]
    assert chosen("ray", replicas) == (1, "explore"), "29 tokens will soon be there"


def test_ray_draws_two_when_queues_differ_by_more_than_ten() -> None:
    assert chosen("ray", [Books(in_flight=12), Books(in_flight=2), Books(in_flight=2)], [90, 0, 0])[1] == "exploit"
    replicas = [Books(in_flight=13), Books(in_flight=8), Books(in_flight=2)]
    assert chosen("ray", replicas, [90, 0, 0])[1] == "power-of-two"
    counts = shares("ray", replicas, [90, 0, 0])
    assert counts[0] == 0, "one of two is always better"
    assert 220 < counts[2] < 310, "drawn in two of three cases"
    assert chosen("ray", [Books(in_flight=0), Books(in_flight=11)], [0, 90]) == (0, "power-of-two")
    assert chosen(Ray(imbalanced_threshold=math.inf), replicas, [90, 0, 0]) == (0, "exploit")
    assert chosen(Ray(match_rate_threshold=0.5), [Books(), Books()], [40, 0])[1] == "explore"


@pytest.mark.parametrize("policy", ["dynamo", "lmetric", "llm-d", "ray"])
def test_equals_are_drawn_by_lot(policy: str) -> None:
    replicas = [Books(in_flight=3, queued_prefill_tokens=40, resident_tokens=9) for _ in range(4)]
    for matched in ([0, 0, 0, 0], [80, 80, 80, 80]):
        counts = shares(policy, replicas, matched)
        assert set(counts) == {0, 1, 2, 3}
        assert max(counts.values()) < 150
    assert set(shares(policy, replicas, [0, 90, 0, 90])) == {1, 3}


# Every rule once more


@st.composite
def views(draw: st.DrawFn) -> View:
    """Small numbers, so that ties and thresholds are met."""
    prompt = draw(st.sampled_from([10, 50, 100]))
    load = st.one_of(st.integers(0, 3), st.sampled_from([10, 11, 64, 65, 100, 130]))
    tokens = st.sampled_from([0, 10, 20, 50, 100, 89_990, 90_010, 180_000])
    pages = st.integers(0, 4)
    books = [
        Books(number, draw(load), draw(tokens), resident_tokens=draw(pages), unique_pages=draw(pages))
        for number in range(draw(st.integers(1, 5)))
    ]
    matched = [min(draw(st.integers(0, 10)) * 10, prompt) for _ in books]
    longest, used = max(matched), draw(st.integers(0, 10)) * 10
    ends = sorted({0, min(used, longest), longest})
    stretches = [(start, end, 2 if end <= used else 0, 1) for start, end in pairwise(ends)]
    return view(books, matched, asked=Asked(prompt_tokens=prompt), stretches=stretches, seed=draw(st.integers(0, 9)))


def by_sglang(seen: View) -> set[int]:
    queue = {index: replica.in_flight for index, replica in enumerate(seen.replicas)}
    by_queue = sorted(queue, key=lambda index: (queue[index], index))
    by_match = sorted(queue, key=lambda index: (-seen.matched[index], index))
    low, high = queue[by_queue[0]], queue[by_queue[-1]]
    alike = high <= low + 64 or high <= low * 3 / 2
    return {by_match[0] if alike and 10 * seen.matched[by_match[0]] > 3 * seen.request.prompt_tokens else by_queue[0]}


def by_dynamo(seen: View) -> set[int]:
    costs = {}
    for index, replica in enumerate(seen.replicas):
        used = {block for stretch in seen.stretches if stretch.in_flight for block in range(*stretch[:2], 10)}
        cached = set(range(0, seen.matched[index], 10))
        prompt = set(range(0, seen.request.prompt_tokens, 10))
        prefill = replica.queued_prefill_tokens / 10 + len(prompt - cached)
        costs[index] = prefill + replica.unique_pages + len(prompt - (cached & used))
    return cheapest(costs)


def by_lmetric(seen: View) -> set[int]:
    costs = {}
    for index, replica in enumerate(seen.replicas):
        missed = seen.request.prompt_tokens - seen.matched[index]
        costs[index] = (replica.queued_prefill_tokens + (missed or 1)) * (1 + replica.in_flight)
    return cheapest(costs)


def by_llm_d(seen: View) -> set[int]:
    queued = [replica.queued_prefill_tokens for replica in seen.replicas]
    load = {index: queued[index] - seen.matched[index] for index in range(len(queued))}
    warm = {index for index in load if 5 * seen.matched[index] >= 4 * seen.request.prompt_tokens}
    cold = set(load) - warm
    if not warm or (cold and min(queued[i] for i in warm) - min(queued[i] for i in cold) > 90_000):
        return cheapest(load)
    return cheapest({index: load[index] for index in warm})


def by_ray(seen: View) -> set[int]:
    queue = [replica.in_flight for replica in seen.replicas]
    everybody = range(len(queue))
    if max(queue) > min(queue) + 10:
        pairs = [(one, other) for one in everybody for other in everybody if one != other]
        return {index for pair in pairs for index in cheapest({number: queue[number] for number in pair})}
    if 10 * max(seen.matched) >= seen.request.prompt_tokens:
        candidates = cheapest({index: -seen.matched[index] for index in everybody})
    else:
        soon = {index: seen.replicas[index].queued_prefill_tokens for index in everybody}
        candidates = cheapest({index: seen.replicas[index].resident_tokens + soon[index] for index in everybody})
    return cheapest({index: queue[index] for index in candidates})


def cheapest(costs: Mapping[int, float]) -> set[int]:
    return {index for index, cost in costs.items() if cost == min(costs.values())}


RULES: dict[str, Callable[[View], set[int]]] = {
    "sglang": by_sglang,
    "dynamo": by_dynamo,
    "lmetric": by_lmetric,
    "llm-d": by_llm_d,
    "ray": by_ray,
}


@pytest.mark.parametrize("policy", RIVALS)
@given(data=st.data())
def test_the_choice_is_one_that_the_rule_allows(policy: str, data: st.DataObject) -> None:
    seen = data.draw(views())
    choice = POLICIES[policy]().choose(seen)
    assert choice is not None
    assert choice.chosen in RULES[policy](seen)
