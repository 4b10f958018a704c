"""How many replicas a trace needs, and when none are enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.errors import InvalidRequest
from preble.sched import E2, POLICIES, PRESETS, Policy
from preble.sim.planner import Probe, plan, smallest
from preble.sim.settings import Failure, Settings
from preble.sim.simulate import simulate
from preble.sim.slo import SLO
from preble.sim.trace import Trace, TracedRequest

NOTHING_BOUND = SLO(ttft=float("inf"), tpot=float("inf"))


def trace(*requests: tuple[float, int, int], block_size: int = 64) -> Trace:
    """(arrival, prompt tokens, output tokens) of requests that share nothing."""
    blocks, made = 0, []
    for arrival, prompt, output in requests:
        count = -(-prompt // block_size)
        made.append(TracedRequest(arrival, prompt, output, np.arange(blocks, blocks + count, dtype=np.int32)))
        blocks += count
    return Trace("made up", block_size, tuple(made))


def steady(count: int, rate: float, prompt: int = 1000, output: int = 8) -> Trace:
    return trace(*((number / rate, prompt, output) for number in range(count)))


def attained(requests: Trace, settings: Settings, slo: SLO, replicas: int) -> float:
    """By a simulation of its own."""
    outcome = simulate(requests, replace(settings, replicas=replicas), slo=slo)[0]
    assert outcome.completed == len(requests.requests)
    return outcome.good / outcome.requests


@pytest.mark.parametrize("rate", [5.0, 40.0, 90.0, 150.0, 260.0])
@pytest.mark.parametrize("attain", [0.5, 0.99])
def test_the_answer_is_enough_and_one_less_is_not(rate: float, attain: float) -> None:
    requests, settings, slo = steady(150, rate), Settings(), SLO.parse("ttft=0.3,tpot=0.05")
    result = plan(requests, settings, slo, attain=attain)
    assert result.replicas is not None
    assert attained(requests, settings, slo, result.replicas) >= attain
    if result.replicas > 1:
        assert attained(requests, settings, slo, result.replicas - 1) < attain
    answer, fewer = result.probe(result.replicas), result.probe(result.replicas - 1)
    assert answer is not None
    assert answer.enough
    assert answer.attainment == attained(requests, settings, slo, result.replicas)
    assert fewer is None if result.replicas == 1 else fewer is not None and not fewer.enough


def test_more_traffic_needs_more() -> None:
    answers = [plan(steady(150, rate), Settings(), SLO.parse("ttft=0.3")).replicas for rate in (5.0, 90.0, 260.0)]
    slow, medium, fast = answers
    assert slow == 1
    assert medium is not None
    assert fast is not None
    assert 1 < medium < fast


@given(st.integers(1, 9), st.integers(0, 60), st.sets(st.integers(1, 70)))
def test_whatever_is_enough_the_answer_is_and_one_less_was_tried_and_is_not(
    fewest: int, more: int, enough: set[int]
) -> None:
    most = fewest + more
    tried: list[int] = []

    def is_enough(number: int) -> bool:
        tried.append(number)
        return number in enough

    answer = smallest(fewest, most, is_enough)
    assert len(tried) == len(set(tried)) <= 2 * most.bit_length()
    assert all(fewest <= number <= most for number in tried)
    if answer is None:
        assert most in tried
        assert not enough & set(tried)
    else:
        assert answer in enough
        assert answer == fewest or (answer - 1 in tried and answer - 1 not in enough)


@given(st.integers(1, 9), st.integers(0, 60), st.integers(1, 80))
def test_where_more_is_never_worse_the_answer_is_the_smallest(fewest: int, more: int, needed: int) -> None:
    answer = smallest(fewest, fewest + more, lambda number: number >= needed)
    assert answer == (max(fewest, needed) if needed <= fewest + more else None)


def test_not_enough_up_to_the_most() -> None:
    result = plan(steady(150, 260.0), Settings(), SLO.parse("ttft=0.3"), max_replicas=3)
    assert result.replicas is None
    assert not result.impossible
    assert [probe.replicas for probe in result.probes] == [1, 2, 3]
    assert not any(probe.enough for probe in result.probes)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("prompt", [1, 70, 2048, 5000])
def test_the_least_seconds_are_those_of_a_request_alone(preset: str, prompt: int) -> None:
    """With its own TTFT as the bound a request passes, with a little less it never can."""
    requests, settings = trace((0.0, prompt, 5)), Settings(cost=preset)
    outcome = simulate(requests, replace(settings, replicas=1))[0]
    for name, took in (("ttft", outcome.ttft), ("tpot", outcome.tpot), ("e2e", outcome.e2e)):
        generous = SLO.parse(f"{name}={took[0] * 1.001}")
        assert plan(requests, settings, generous).replicas == 1
        # TPOT is judged by the first decode, the cheapest.
        tight = plan(requests, settings, SLO.parse(f"{name}={took[0] * (0.999 if name == 'ttft' else 0.9)}"))
        assert (tight.replicas, tight.impossible, tight.hopeless, tight.too_long, tight.probes) == (
            None,
            True,
            1,
            0,
            (),
        )


def test_what_a_cache_can_spare_is_not_hopeless() -> None:
    shared = np.arange(64, dtype=np.int32)
    requests = Trace("shared", 64, tuple(TracedRequest(5.0 * n, 4096, 1, shared) for n in range(4)))
    cost = PRESETS["generic"]
    cold = 2 * cost.prefill_seconds(2048)
    result = plan(requests, Settings(), SLO(ttft=0.9 * cold), attain=0.75)
    assert (result.replicas, result.hopeless) == (1, 1)
    result = plan(requests, Settings(), SLO(ttft=0.9 * cold), attain=0.76)
    assert (result.replicas, result.hopeless, result.impossible) == (None, 1, True)


def test_in_a_closed_loop_the_recorded_order_proves_nothing() -> None:
    """The second turn comes first in the trace, and after the other session's request in truth."""
    shared, own = np.arange(64, dtype=np.int32), np.array([100], np.int32)
    turns = (
        TracedRequest(0.0, 10, 1, own, session="a"),
        TracedRequest(1.0, 4096, 1, shared, session="a", think=60.0),
        TracedRequest(2.0, 4096, 1, shared, session="b"),
    )
    requests = Trace("turns", 64, turns)
    slo = SLO(ttft=1.5 * PRESETS["generic"].prefill_seconds(2048))
    assert plan(requests, Settings(), slo).hopeless == 1
    assert plan(requests, Settings(closed_loop=True), slo).hopeless == 0


def test_a_slow_or_fast_replica_counts_for_what_is_possible() -> None:
    requests = trace((0.0, 2048, 1))
    slo = SLO(ttft=0.6 * PRESETS["generic"].prefill_seconds(2048))
    assert plan(requests, Settings(), slo).hopeless == 1
    assert plan(requests, Settings(slowness=(2.0,)), slo).hopeless == 1
    assert plan(requests, Settings(slowness=(0.5,)), slo).hopeless == 0


def test_what_is_longer_than_the_pages_fits_nowhere() -> None:
    requests = trace((0.0, 900, 10), (0.0, 1020, 4), (0.0, 1021, 4))
    result = plan(requests, Settings(capacity_tokens=1080), NOTHING_BOUND, attain=0.1)
    assert (result.replicas, result.impossible, result.hopeless, result.too_long) == (None, True, 1, 1)
    assert plan(requests.first(2), Settings(capacity_tokens=1080), NOTHING_BOUND).replicas == 1


@pytest.mark.parametrize(("attain", "replicas"), [(0.07, 1), (0.29, 1), (0.2901, None), (1.0, None)])
def test_the_share_is_counted_in_whole_requests(attain: float, replicas: int | None) -> None:
    good = 7 if attain == 0.07 else 29
    requests = trace(*((float(number), 100 if number < good else 4000, 1) for number in range(100)))
    result = plan(requests, Settings(), SLO(ttft=0.03), attain=attain)
    assert result.replicas == replicas
    assert result.hopeless == 100 - good


def test_requests_that_never_end_are_not_enough() -> None:
    requests = steady(20, 10.0)
    lost = plan(requests, Settings(failures=(Failure(0, 1.0),)), NOTHING_BOUND, attain=0.1, max_replicas=1)
    assert lost.replicas is None
    assert 0 < lost.probes[0].completed < 20
    saved = plan(requests, Settings(failures=(Failure(0, 1.0),)), NOTHING_BOUND, attain=0.1)
    assert saved.replicas == 2


def test_fleets_have_the_replicas_that_are_named() -> None:
    settings = Settings(slowness=(1.0, 1.0, 2.0))
    result = plan(steady(20, 5.0), settings, NOTHING_BOUND)
    assert [probe.replicas for probe in result.probes] == [3] == [result.replicas]
    failing = Settings(failures=(Failure(4, 1.0),), replicas=5)
    assert plan(steady(20, 5.0), failing, NOTHING_BOUND).replicas == 5
    with pytest.raises(InvalidRequest, match="max_replicas must be at least 5, the replicas that are named, not 4"):
        plan(steady(20, 5.0), failing, NOTHING_BOUND, max_replicas=4)


def test_arguments_out_of_range() -> None:
    for attain in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(InvalidRequest, match="attain must be a share"):
            plan(steady(2, 1.0), Settings(), NOTHING_BOUND, attain=attain)
    with pytest.raises(InvalidRequest, match="'made up' has no request"):
        plan(trace(), Settings(), NOTHING_BOUND)
    with pytest.raises(InvalidRequest, match="policy must be one of"):
        plan(steady(2, 1.0), Settings(), NOTHING_BOUND, policy="fastest")


def test_every_simulation_has_a_fresh_policy() -> None:
    made: list[Policy] = []

    def make() -> Policy:
        made.append(E2())
        return made[-1]

    requests, slo = steady(150, 90.0), SLO.parse("ttft=0.3")
    result = plan(requests, Settings(), slo, policy=make)
    assert len(made) >= len(result.probes) > 1
    assert result == plan(requests, Settings(), slo, policy="e2")


@pytest.mark.parametrize("policy", POLICIES)
def test_plans_for_every_policy(policy: str) -> None:
    result = plan(steady(100, 60.0), Settings(), SLO.parse("ttft=0.5"), policy=policy)
    assert result.policy == policy
    assert result.replicas is not None


def test_who_watches_sees_every_probe() -> None:
    seen: list[Probe] = []
    ended: dict[int, int] = {}

    class Watching:
        def __init__(self, replicas: int) -> None:
            self.replicas = replicas
            ended[replicas] = 0

        def __enter__(self) -> Callable[[], None]:
            return self.advance

        def __exit__(self, *error: object) -> None:
            assert len(seen) == len(ended) - 1

        def advance(self) -> None:
            ended[self.replicas] += 1

    result = plan(steady(150, 90.0), Settings(), SLO.parse("ttft=0.3"), probed=seen.append, watch=Watching)
    assert tuple(seen) == result.probes
    assert ended == dict.fromkeys([probe.replicas for probe in seen], 150)


def test_the_figures_are_those_of_the_simulation() -> None:
    requests, slo = steady(150, 90.0), SLO.parse("ttft=0.3,tpot=0.05")
    probe = plan(requests, Settings(), slo).probes[1]
    figures = simulate(requests, Settings(replicas=2), slo=slo)[0].to_dict()
    assert probe.to_dict() == {
        "replicas": 2,
        "completed": figures["completed"],
        "good": figures["good"],
        "attainment": figures["good"] / 150,
        "enough": probe.enough,
        "ttft_p99": figures["ttft"]["p99"],
        "tpot_p99": figures["tpot"]["p99"],
        "utilization": figures["utilization"],
    }
