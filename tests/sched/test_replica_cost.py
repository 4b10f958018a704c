"""Replicas of a kind learn together what steps cost, and each how much slower it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.sched import GlobalScheduler, Placement, StepTimed
from preble.sched.cost_fit import FittedCost
from preble.sched.cost_presets import make_cost
from preble.sched.replica_cost import ReplicaCost

TRUTH = make_cost("mistral-7b-a100")


def step(random: np.random.Generator, slowness: float, replica: int = 0) -> StepTimed:
    """A step on a replica so much slower than an A100, with 3 % noise."""
    decodes, new = int(random.integers(0, 32)), int(random.choice([0, 64, 512, 1024]))
    if not decodes and not new:
        decodes = 1
    context, attended = decodes * 900, new + 2000 if new else 0
    seconds = TRUTH.step_seconds(((new, attended),) if new else (), decodes, context)
    seconds *= slowness * float(random.normal(1, 0.03))
    return StepTimed(replica, new + decodes, decodes, context + attended, seconds, new * attended + context)


def learned(slownesses: list[float], steps: int, start: str = "generic") -> list[ReplicaCost]:
    random = np.random.default_rng(1)
    kind = FittedCost(make_cost(start))
    costs = [ReplicaCost(kind) for _ in slownesses]
    for _ in range(steps):
        for cost, slowness in zip(costs, slownesses, strict=True):
            if slowness:
                cost.observe(step(random, slowness))
    return costs


def test_a_replica_that_has_not_run_is_taken_for_what_the_others_are() -> None:
    busy, idle = learned([20.0, 0.0], 100)
    expected = 20 * TRUTH.prefill_seconds(1024, 0)
    assert idle.prefill_seconds(1024) == pytest.approx(expected, rel=0.15)
    assert idle.prefill_seconds(1024) == pytest.approx(busy.prefill_seconds(1024), rel=0.1)


def test_a_slower_replica_is_known_for_it() -> None:
    costs = learned([1.0, 1.0, 1.0, 3.0], 300)
    for cost, slowness in zip(costs, [1.0, 1.0, 1.0, 3.0], strict=True):
        assert cost.prefill_seconds(1024) == pytest.approx(slowness * TRUTH.prefill_seconds(1024), rel=0.25)
        assert cost.decode_seconds(16, 14_400) == pytest.approx(slowness * TRUTH.decode_seconds(16, 14_400), rel=0.25)


def test_a_few_absurd_steps_do_not_brand_a_replica() -> None:
    costs = learned([1.0, 1.0], 200)
    for _ in range(3):
        costs[0].observe(StepTimed(0, 512, 0, 512, 3000.0, 512 * 512))
    for seconds in (float("nan"), 0.0, -1.0, float("inf")):
        costs[0].observe(StepTimed(0, 512, 0, 512, seconds, 512 * 512))
    assert costs[0].slowness < 1.1


@given(st.lists(st.tuples(st.floats(), st.integers(-5, 3000), st.integers(-5, 50)), max_size=80), st.integers(1, 4000))
def test_times_never_fall_and_are_never_negative(steps: list[tuple[float, int, int]], tokens: int) -> None:
    cost = ReplicaCost(FittedCost(make_cost("generic")))
    for seconds, new, decodes in steps:
        cost.observe(StepTimed(0, new, decodes, abs(new) + 100, seconds))
    assert 0 < cost.prefill_seconds(tokens) <= cost.prefill_seconds(tokens + 500) < float("inf")
    assert 0 < cost.decode_seconds(4, tokens) <= cost.decode_seconds(4, tokens + 500)
    assert cost.step_seconds((), 0, 0) == cost.prefill_seconds(0) == 0


def shares(policy: str) -> Counter[int]:
    """Of 180 requests, one at a time, on two replicas and one that is four times slower."""
    random = np.random.default_rng(2)
    scheduler = GlobalScheduler(3, capacity_tokens=1_000_000, page_size=16, policy=policy)
    for _ in range(200):
        for replica, slowness in enumerate([1.0, 1.0, 4.0]):
            scheduler.apply(step(random, slowness, replica), now=0.0)
    counts: Counter[int] = Counter()
    for number in range(180):
        prompt = np.arange(1000, dtype=np.int32) + 2000 * number
        answer = scheduler.submit(f"r{number}", prompt, now=1.0 + number, expected_tokens=8)
        assert isinstance(answer, Placement)
        counts[answer.replica] += 1
        scheduler.cancel(answer.request_id, now=1.0 + number)
    return counts


def test_a_throttled_replica_gets_less_to_do() -> None:
    counts = shares("e2-paper")
    assert counts[2] == pytest.approx(180 / 9, abs=6)
    assert counts[0] == pytest.approx(counts[1], abs=8)


def test_e2_does_without_a_throttled_replica_while_others_are_idle() -> None:
    assert shares("e2")[2] == 0


def test_replicas_of_different_kinds_learn_apart() -> None:
    random = np.random.default_rng(3)
    scheduler = GlobalScheduler(1, capacity_tokens=100_000, cost="mistral-7b-a100")
    other = scheduler.add_replica(cost="mistral-7b-a6000")
    for _ in range(100):
        scheduler.apply(step(random, 5.0, replica=0), now=0.0)
    fast, slow = scheduler.replicas
    assert fast.cost.prefill_seconds(1024) == pytest.approx(5 * TRUTH.prefill_seconds(1024), rel=0.2)
    assert slow.replica == other
    assert slow.cost.prefill_seconds(1024) == make_cost("mistral-7b-a6000").prefill_seconds(1024)
