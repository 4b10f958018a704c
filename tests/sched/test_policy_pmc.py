"""Projected marginal cost: each term worked out by hand, and the whole formula step by step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_views import Asked, Books, Linear, Traffic, view

from preble.sched import View
from preble.sched.policies.pmc import PMC

COST = Linear(step=1.0, per_token=0.01)
"""A step of 100 tokens takes 2 s."""
OMEGA = math.sqrt(0.5)


def costs(seen: View, index: int = 0) -> dict[str, float]:
    return dict(PMC().costs(seen, index))


def test_an_idle_replica_costs_the_requests_own_time() -> None:
    """150 tokens: steps of 100 and 50, 2 + 1.5 s; 10 tokens at 1.01 s."""
    found = costs(view([Books(cost=COST)], asked=Asked(150)))
    assert found == {
        "wait_seconds": pytest.approx(3.5),
        "pages_seconds": 0,
        "arrivals_seconds": 0,
        "stall_seconds": 0,
        "decode_seconds": pytest.approx(OMEGA * 10.1),
        "slowdown_seconds": 0,
        "copy_discount": 1,
        "score_seconds": pytest.approx(3.5 + OMEGA * 10.1),
    }


def test_a_busy_replica_term_by_term() -> None:
    """20 of 25 requests decode, so steps compute 80 of the 100 tokens beside them and take 2 s.

    x = 190: steps of 80, 80 and 30, 2 + 2 + 1.5 = 5.5 s. 60 of 160 prompt tokens are cached; the 100 missed ones fill
    the last step up to 80 and another of 50: 2 + 2 + 2 + 1.7 = 7.7 s, so Δp = 2.2 s in one more step. A step of the
    decodes alone takes 1.2 s: Δs = 1.0 s.
    """
    busy = Books(cost=COST, in_flight=25, decoding=20, queued_prefill_tokens=190, decode_context_tokens=5000)
    asked, traffic = Asked(160, expected_tokens=50), Traffic(arrival_rate=3, mean_ttft=2, mean_latency=16)
    seen = view([busy, Books(cost=COST)], [60, 0], asked=asked, traffic=traffic)
    omega = math.sqrt(2 / 18)
    decode = 50 * (1 + 26 * 0.01)
    assert costs(seen) == {
        "wait_seconds": pytest.approx(7.7),
        "pages_seconds": 0,
        "arrivals_seconds": pytest.approx(3 / 2 * 7.7 * 2.2),
        "stall_seconds": pytest.approx(omega * 25 * decode / (decode + 5.5) * 1.0),
        "decode_seconds": pytest.approx(omega * decode),
        "slowdown_seconds": pytest.approx(omega * 25 * 50 * 0.01),
        "copy_discount": 1,
        "score_seconds": pytest.approx(sum(list(costs(seen).values())[:6])),
    }


def test_attention_is_paid_for_the_context() -> None:
    """0.001 s per token attended to. T = 100, 10 decodes on 2,000 tokens: 2 s of every step on top of 1 s.

    60 tokens are cached. The backlog of 30 leaves 60 of the first step; then 90, whose last token attends to 210; then
    50. The contexts are 30, 120, 210 and 260. The 10 requests hold 30 pages of 10 tokens; the new one ends with 270.
    """
    cost = Linear(step=1.0, per_token=0.0, per_context=0.001)
    busy = Books(cost=cost, in_flight=10, decoding=10, queued_prefill_tokens=30, total_pages=30)
    busy.decode_context_tokens = 2000
    found = costs(view([busy], [60], asked=Asked(260)))
    assert found["wait_seconds"] == pytest.approx(3 + 0.03 + 0.12 + 0.21 + 0.26 + 3 * 2)
    assert found["decode_seconds"] == pytest.approx(OMEGA * 10 * (1 + 0.3 + 0.27))
    assert found["slowdown_seconds"] == pytest.approx(OMEGA * 10 * 10 * 0.27)
    stall = (3 + 0.03 + 0.12 + 0.21 + 0.26) - (1 + 0.03) - 2 * 1
    assert found["stall_seconds"] == pytest.approx(OMEGA * 10 * 15.7 / (15.7 + 1.03) * stall)


def test_middle_steps_attend_to_their_mean_context() -> None:
    """500 tokens in steps of 100, which attend to 100, 200, … 500."""
    cost = Linear(step=1.0, per_token=0.0, per_context=0.001)
    found = costs(view([Books(cost=cost)], asked=Asked(500)))
    assert found["wait_seconds"] == pytest.approx(5 + 1.5, abs=0.002)


def test_a_small_miss_behind_a_backlog_is_nearly_free() -> None:
    """It fits into a step that runs anyway; alone it would take a step of its own."""
    behind = view([Books(cost=COST, in_flight=1, queued_prefill_tokens=130)], asked=Asked(20))
    assert costs(behind)["wait_seconds"] == pytest.approx(2 + 1.5)
    assert costs(view([Books(cost=COST)], asked=Asked(20)))["wait_seconds"] == pytest.approx(1.2)


def test_a_full_match_computes_its_last_token() -> None:
    assert costs(view([Books(cost=COST)], [100]))["wait_seconds"] == pytest.approx(1.01)


def test_lack_of_pages_waits_for_their_release() -> None:
    """Four requests end with 44 pages of 10 tokens. The new one adds 100 + 10 tokens: 550 in all. They give 440 back
    within D = 10 (1 + 0.05) s and the 2 s of their backlog."""
    for capacity, lacking in ((550, 0), (500, 50)):
        busy = Books(cost=COST, in_flight=4, unique_pages=44, queued_prefill_tokens=100, capacity_tokens=capacity)
        found = costs(view([busy]))
        assert found["pages_seconds"] == pytest.approx(lacking * 12.5 / 440)
    assert costs(view([Books(cost=COST, capacity_tokens=50)]))["pages_seconds"] == 0, "nobody there to wait for"


def test_copying_a_hot_prefix_is_discounted() -> None:
    """Of 100 tokens, 5 requests in flight share 40 that one replica holds, and 2 share another 20; nobody has the rest.
    f = 1/5 and 1/2 and 1; its mean over all is (40/5 + 20/2 + 40) / 100 = 0.58, over the last 60: 50/60."""
    stretches = [(0, 40, 5, 1), (40, 60, 2, 1)]
    replicas = [Books(cost=COST, in_flight=8), Books(cost=COST, in_flight=2), Books(cost=COST, in_flight=9)]
    seen = view(replicas, [60, 0, 0], stretches=stretches)
    assert [costs(seen, index)["copy_discount"] for index in range(3)] == [
        1,
        pytest.approx(1 / (1 + (1 / 0.58 - 1) * (1 - 2 / 8))),
        1,
    ]
    seen = view(replicas, [60, 40, 0], stretches=stretches)
    assert costs(seen, 1)["copy_discount"] == pytest.approx(1 / (1 + (60 / 50 - 1) * (1 - 2 / 8)))
    idle = view([*replicas, Books(cost=COST)], [60, 0, 0, 0], stretches=stretches)
    assert costs(idle, 3)["copy_discount"] == pytest.approx(0.58)
    cold = view(replicas, [60, 0, 0], stretches=[(0, 40, 1, 1), (40, 60, 1, 2), (60, 80, 0, 0), (80, 90, 3, 0)])
    assert costs(cold, 1)["copy_discount"] == 1, "no more users than holders, or nobody to copy from"
    least = view([*replicas, Books(cost=COST, in_flight=2)], [60, 0, 0, 60], stretches=stretches)
    assert costs(least, 1)["copy_discount"] == 1, "a holder has as little to do"


def test_the_discount_lowers_what_others_pay() -> None:
    asked, traffic = Asked(100), Traffic(arrival_rate=2, mean_ttft=1, mean_latency=3)
    replicas = [Books(cost=COST, in_flight=8), Books(cost=COST, in_flight=2)]
    plain = costs(view(replicas, [100, 0], asked=asked, traffic=traffic), 1)
    hot = costs(view(replicas, [100, 0], asked=asked, traffic=traffic, stretches=[(0, 100, 5, 1)]), 1)
    discount = 1 / (1 + 4 * 0.75)
    assert hot["arrivals_seconds"] == pytest.approx(plain["arrivals_seconds"] * discount)
    assert hot["stall_seconds"] == pytest.approx(plain["stall_seconds"] * discount)
    assert hot["wait_seconds"] == plain["wait_seconds"]


def test_omega_before_the_first_request_ended_is_its_largest() -> None:
    started = costs(view([Books(cost=COST)], traffic=Traffic(mean_ttft=3)))
    assert started["decode_seconds"] == pytest.approx(OMEGA * 10.1)


def test_each_replica_is_judged_by_its_own_speed_and_load() -> None:
    slow = Linear(step=2.0, per_token=0.02)
    choice = PMC().choose(view([Books(cost=slow), Books(cost=COST), Books(cost=COST, in_flight=5)]))
    assert choice is not None
    assert (choice.chosen, choice.reason) == (1, "least-cost")


def test_stays_with_the_prefix_until_waiting_there_costs_more() -> None:
    """1,000 of 1,010 tokens are cached on 0. Elsewhere they take 20 s and more."""
    for backlog, expected in ((100, 0), (500, 0), (2500, 1)):
        holder = Books(cost=COST, in_flight=1, queued_prefill_tokens=backlog)
        choice = PMC().choose(view([holder, Books(cost=COST)], [1000, 0], asked=Asked(1010)))
        assert choice is not None
        assert choice.chosen == expected, backlog


def test_a_replica_is_not_dismissed_for_a_wait_that_is_long_but_the_shortest() -> None:
    """W = 2 + 2 s behind 100 tokens and 2 + 1.5 s behind 50; the rest of both scores is below a second."""
    replicas = [Books(cost=COST, in_flight=1, queued_prefill_tokens=backlog) for backlog in (100, 50)]
    seen = view(replicas, asked=Asked(100, expected_tokens=1))
    assert [costs(seen, index)["wait_seconds"] for index in (0, 1)] == [pytest.approx(4), pytest.approx(3.5)]
    choice = PMC().choose(seen)
    assert choice is not None
    assert choice.chosen == 1


def test_nobody_is_stalled_by_steps_that_are_shorter_than_decodes() -> None:
    class DearDecodes(Linear):
        def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
            return super().step_seconds(prefills, decodes, decode_context) + decodes

    replica = Books(cost=DearDecodes(step=1.0, per_token=0.0), in_flight=1)
    assert costs(view([replica]))["stall_seconds"] == 0


def test_time_may_cost_nothing() -> None:
    class FreeDecodes(Linear):
        def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
            return super().step_seconds(prefills, 0, 0)

    free = Books(cost=Linear(step=0.0, per_token=0.0), in_flight=3, decoding=1, unique_pages=9, capacity_tokens=10)
    assert costs(view([free]))["score_seconds"] == 0
    free.cost = FreeDecodes(step=1.0, per_token=0.0)
    assert costs(view([free]))["score_seconds"] == pytest.approx(2), "100 tokens, 99 per step"


def test_equals_are_drawn_by_lot() -> None:
    def drawn(seed: int) -> int:
        choice = PMC().choose(view([Books(cost=COST, in_flight=k) for k in (3, 1, 1, 1)], seed=seed))
        assert choice is not None
        return choice.chosen

    counts = Counter(drawn(seed) for seed in range(300))
    assert set(counts) == {1, 2, 3}
    assert max(counts.values()) < 150


# The formula once more, step by step


def run(cost: Linear, budget: int, decodes: int, backlog: int, new: int, cached: int) -> tuple[float, int]:
    """Seconds and steps to compute a backlog and then a request, `budget` tokens a step; decodes without context."""
    seconds, steps, done = 0.0, 0, 0
    while backlog or done < new:
        old = min(budget, backlog)
        own = min(budget - old, new - done)
        backlog, done, steps = backlog - old, done + own, steps + 1
        chunks = ([(old, old)] if old else []) + ([(own, cached + done)] if own else [])
        seconds += cost.step_seconds(chunks, decodes, 0)
    return seconds, steps


def score(seen: View, index: int) -> float:
    replica, request, traffic = seen.replicas[index], seen.request, seen.traffic
    cost = replica.cost
    assert isinstance(cost, Linear)
    n, d, output = replica.in_flight, replica.decoding, request.expected_tokens
    new = max(request.prompt_tokens - seen.matched[index], 1)
    cached = request.prompt_tokens - new
    budget = max(replica.max_batched_tokens - d, 1)
    drain, steps = run(cost, budget, d, replica.queued_prefill_tokens, 0, cached)
    with_new, all_steps = run(cost, budget, d, replica.queued_prefill_tokens, new, cached)
    wait = with_new + all_steps * (cost.decode_seconds(d, replica.decode_context_tokens) - cost.decode_seconds(d, 0))
    alone = cost.decode_seconds(max(d, 1), 0)
    stall = max((with_new - all_steps * alone) - (drain - steps * alone), 0)

    held = replica.total_pages * replica.page_size
    decode = output * cost.decode_seconds(n + 1, held + request.prompt_tokens + int(output))
    slower = decode - output * cost.decode_seconds(n, held)
    kept = replica.unique_pages * replica.page_size
    lacking = max(0, kept + new + output - replica.capacity_tokens)
    pages = lacking / (kept / (drain + decode)) if n else 0

    shares = []
    for position in range(cached, request.prompt_tokens):
        users, having = next(
            ((users, having) for start, end, users, having in seen.stretches if start <= position < end), (0, 0)
        )
        shares.append(1 / (1 + max(0, users - having) / having) if having else 1)
    mean = sum(shares) / len(shares)
    longest = max(seen.matched)
    there = [one.in_flight for one, m in zip(seen.replicas, seen.matched, strict=True) if m == longest > 0]
    fewest = min(there, default=0)
    relief = max(0, 1 - n / fewest) if fewest else 0
    phi = 1 / (1 + (1 / mean - 1) * relief)

    omega = math.sqrt(traffic.mean_ttft / (traffic.mean_ttft + traffic.mean_latency))
    arrivals = traffic.arrival_rate / len(seen.replicas) * wait * (with_new - drain) * phi
    return wait + pages + arrivals + omega * (n * decode / (decode + drain) * stall * phi + decode + n * slower)


@st.composite
def views(draw: st.DrawFn) -> View:
    cost = Linear(
        draw(st.sampled_from([0.5, 1.0])), draw(st.sampled_from([0.0, 0.01])), draw(st.sampled_from([0, 1e-4]))
    )
    prompt = draw(st.integers(1, 400))
    few = st.integers(0, 60)

    def books(number: int) -> Books:
        running, decoding = draw(st.integers(0, 5)), draw(st.integers(0, 20))
        return Books(
            number,
            running + decoding,
            draw(st.integers(0, 300)) if running else 0,
            decoding=decoding,
            decode_context_tokens=draw(few) * 10 if decoding else 0,
            total_pages=draw(few) if running + decoding else 0,
            unique_pages=draw(few) + 1 if running + decoding else 0,
            capacity_tokens=draw(st.sampled_from([300, 700, 10_000])),
            max_batched_tokens=draw(st.sampled_from([16, 50, 128])),
            cost=cost,
        )

    replicas = [books(number) for number in range(draw(st.integers(1, 4)))]
    matched = [draw(st.integers(0, prompt // 10)) * 10 for _ in replicas]
    edges = sorted({0, max(matched), *draw(st.lists(st.integers(0, prompt), max_size=3))})
    users = st.integers(0, 6)
    stretches = [(start, end, draw(users), draw(users)) for start, end in pairwise(edges)]
    seconds = st.sampled_from([0.5, 2.0, 9.0])
    traffic = Traffic(draw(st.sampled_from([0.0, 1.0, 8.0])), draw(seconds), draw(seconds))
    asked = Asked(prompt, expected_tokens=draw(st.sampled_from([1.0, 8.5, 45.0])))
    return view(replicas, matched, asked=asked, traffic=traffic, stretches=stretches, seed=draw(st.integers(0, 9)))


@given(views())
def test_the_score_is_the_formulas_and_the_smallest_wins(seen: View) -> None:
    """Up to rounding the mean context of middle steps to whole tokens."""
    scores = [score(seen, index) for index in range(len(seen.replicas))]
    for index, expected in enumerate(scores):
        assert costs(seen, index)["score_seconds"] == pytest.approx(expected, rel=5e-3)
    choice = PMC().choose(seen)
    assert choice is not None
    assert scores[choice.chosen] <= min(scores) * 1.01
    assert choice.costs == costs(seen, choice.chosen)
