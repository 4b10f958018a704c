"""No policy beats the bound, and where there is nothing to gain it is what happens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preble.errors import InvalidRequest
from preble.sched.cost import CostModel, PiecewiseCost
from preble.sched.cost_presets import PRESETS
from preble.sched.policies import POLICIES
from preble.sim.bound import StepFloor, bound, step_floor
from preble.sim.settings import Failure, Settings
from preble.sim.simulate import simulate
from preble.sim.trace import Trace, TracedRequest

BLOCK = 16
ROUNDING = 1e-9


def trace_of(*requests: tuple[float, int, int, list[int]]) -> Trace:
    """Arrival, prompt tokens, output tokens and blocks of each."""
    return Trace(
        "made",
        BLOCK,
        tuple(
            TracedRequest(arrival, prompt, output, np.array(blocks, np.int32))
            for arrival, prompt, output, blocks in requests
        ),
    )


def alone(tokens: int, output: int) -> Trace:
    return trace_of((0.0, tokens, output, list(range(-(-tokens // BLOCK)))))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Paths in a tree of few blocks, so that much is shared, each with an end of its own or none."""
    names: dict[tuple[int, ...], int] = {}
    requests = []
    time = 0.0
    for number in range(draw(st.integers(1, 14))):
        time += draw(st.sampled_from([0.0, 0.0, 0.01, 0.3]))
        path = draw(st.lists(st.integers(0, 1), min_size=1, max_size=30))
        blocks = [names.setdefault(tuple(path[: end + 1]), len(names)) for end in range(len(path))]
        rest = draw(st.integers(0, BLOCK - 1))
        if rest:
            blocks.append(10_000 + number)
        requests.append((time, len(path) * BLOCK + rest, draw(st.integers(1, 40)), blocks))
    return trace_of(*requests)


prices = st.floats(0, 1e-3)


@st.composite
def piecewise(draw: st.DrawFn) -> PiecewiseCost:
    """Any: flat, convex and concave bases, all terms."""
    knots = [0, *sorted(draw(st.sets(st.integers(1, 300), min_size=1, max_size=4)))]
    base = np.cumsum(draw(st.lists(st.floats(0, 0.05), min_size=len(knots), max_size=len(knots)))).tolist()
    return PiecewiseCost(
        "drawn",
        knots,
        base,
        prefill=draw(st.floats(0, 0.01)),
        per_prefill_token=draw(prices),
        per_prefill_context=draw(prices) / 10,
        per_pair=draw(prices) / 1000,
        per_decode=draw(prices),
        per_decode_context=draw(prices) / 10,
    )


costs = st.one_of(st.sampled_from(list(PRESETS.values())), piecewise())


@given(
    traces(),
    costs,
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["fcfs", "hrrn"]),
    st.integers(1, 3),
    st.sampled_from([32, 128, 2048]),
    st.sampled_from([640, 1200, 50_000]),
    st.sampled_from([(), (0.5,), (3.0,)]),
    st.booleans(),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_policy_beats_the_bound(
    trace: Trace,
    cost: CostModel,
    policy: str,
    order: str,
    replicas: int,
    largest: int,
    capacity: int,
    slowness: tuple[float, ...],
    fails: bool,
) -> None:
    fleet = Settings(
        replicas=replicas,
        cost=cost,
        capacity_tokens=capacity,
        page_size=BLOCK,
        max_batched_tokens=largest,
        order=order,
        slowness=slowness,
        max_tokens=64,
        failures=(Failure(0, 0.05, 0.2),) if fails else (),
    )
    (outcome,) = simulate(trace, fleet, [policy])
    limit = bound(trace, fleet)
    if not outcome.completed:
        assert limit.e2e_mean == 0
        return
    figures = outcome.to_dict()
    for name, least in (("ttft", limit.ttft_mean), ("e2e", limit.e2e_mean)):
        assert figures[name]["mean"] >= least * (1 - ROUNDING), name
    for name, least in (("ttft", limit.ttft_p99), ("e2e", limit.e2e_p99)):
        assert figures[name]["p99"] >= least * (1 - ROUNDING), name


class Jump(CostModel):
    """A second, and a hundred more for a large chunk that attends to much."""

    name = "jump"

    def __init__(self, new: int, attended: int) -> None:
        self.new, self.attended = new, attended

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        large = any(new >= self.new and attended >= self.attended for new, attended in prefills)
        return 101.0 if large else 1.0


jumps = st.builds(Jump, st.integers(1, 40), st.integers(1, 60))


@given(st.one_of(costs, jumps), st.integers(1, 60), st.sampled_from([1, 7, 32, 2048]))
@settings(deadline=None)
def test_no_way_to_cut_a_prompt_beats_the_bound(cost: CostModel, tokens: int, largest: int) -> None:
    """All ways, from the end to the start."""
    best = [0.0] * (tokens + 1)
    for start in reversed(range(tokens)):
        stops = range(start + 1, min(start + largest, tokens) + 1)
        best[start] = min(cost.prefill_seconds(stop - start, start) + best[stop] for stop in stops)
    limit = bound(alone(tokens, 1), Settings(replicas=1, cost=cost, max_batched_tokens=largest))
    assert limit.ttft_mean <= best[0] * (1 + ROUNDING)


@pytest.mark.parametrize("fit", range(40, 200))
def test_the_cheapest_size_of_chunk_may_be_any(fit: int) -> None:
    """So many tokens take a second, one more takes ages."""
    cost = PiecewiseCost("steep", (0, fit, fit + 1), (1.0, 1.0, 1000.0))
    limit = bound(alone(10 * fit, 1), Settings(replicas=1, cost=cost))
    assert 9 < limit.ttft_mean <= 10 * (1 + ROUNDING)


def test_output_is_priced_at_the_cheaper_way_to_compute_it() -> None:
    """A model by which decoding is dearer than to compute two tokens once more: who is preempted is done sooner."""
    cost = PiecewiseCost("odd", (0, 1), (0.0, 0.001), per_decode=1.0, per_decode_context=1.0)
    fleet = Settings(replicas=1, cost=cost)
    assert bound(alone(160, 3), fleet).e2e_mean == pytest.approx(0.160 + 2 * 0.002)
    pile = trace_of(*[(0.0, 160, 3, list(range(number * 10, number * 10 + 10))) for number in range(99)])
    assert bound(pile, fleet).e2e_mean == pytest.approx((0.160 + 2 * 0.002) * 50)


@given(
    costs,
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5000)), max_size=4),
    st.lists(st.integers(1, 5000), max_size=20),
    st.sampled_from([200, 2048]),
)
def test_a_step_takes_at_least_its_prices(
    cost: CostModel, chunks: list[tuple[int, int]], decodes: list[int], largest: int
) -> None:
    prefills = [(new, new + cached) for new, cached in chunks]
    floor = step_floor(cost, largest)
    new = sum(tokens for tokens, _ in prefills)
    least = (
        (new + len(decodes)) * floor.per_token
        + new * floor.per_prefill_token
        + sum(attended for _, attended in prefills) * floor.per_prefill_context
        + sum(tokens * attended for tokens, attended in prefills) * floor.per_pair
        + len(decodes) * floor.per_decode
        + sum(decodes) * floor.per_decode_context
    )
    assert cost.step_seconds(prefills, len(decodes), sum(decodes)) >= least * (1 - ROUNDING)


@pytest.mark.parametrize("cost", sorted(PRESETS))
def test_every_preset_has_prices(cost: str) -> None:
    assert step_floor(PRESETS[cost], 2048).per_token > 0


class Opaque(CostModel):
    """A model that nobody knows."""

    name = "opaque"

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return 1.0 if prefills or decodes else 0.0


def test_of_an_unknown_model_only_single_requests_are_bounded() -> None:
    assert step_floor(Opaque(), 2048) == StepFloor()
    limit = bound(alone(100, 3), Settings(replicas=1, cost=Opaque()))
    assert limit.ttft_mean == 1.0
    assert limit.e2e_mean == 3.0


@pytest.mark.parametrize("cost", ["mistral-7b-a6000", "llama-3-70b-2xh100"])
def test_a_request_by_itself_takes_just_that_long(cost: str) -> None:
    """One step of prefill, then decodes."""
    fleet = Settings(replicas=1, cost=cost)
    trace = alone(100, 30)
    (outcome,) = simulate(trace, fleet)
    limit = bound(trace, fleet)
    assert limit.ttft_mean == limit.ttft_p99 == pytest.approx(outcome.ttft[0])
    assert limit.e2e_mean == limit.e2e_p99 == pytest.approx(outcome.e2e[0], rel=2e-3)


@pytest.mark.parametrize("cost", ["mistral-7b-a6000", "llama-3-70b-2xh100"])
def test_a_long_prompt_by_itself_takes_little_longer(cost: str) -> None:
    fleet = Settings(replicas=1, cost=cost)
    trace = alone(20_000, 1)
    (outcome,) = simulate(trace, fleet)
    assert 1 <= outcome.ttft[0] / bound(trace, fleet).ttft_mean < 1.08


def test_what_an_earlier_request_has_is_not_computed_again() -> None:
    trace = trace_of((0.0, 1600, 1, list(range(100))), (100.0, 1600, 1, list(range(100))))
    fleet = Settings(replicas=1, cost="mistral-7b-a6000", page_size=BLOCK)
    first, again = bound(trace.first(1), fleet).ttft_mean, bound(trace, fleet).ttft_mean * 2
    assert again - first == pytest.approx(fleet.cost_model.prefill_seconds(1, 1599))


def test_a_pile_of_requests_is_bounded_by_the_work_of_all() -> None:
    """Equal requests, all at once, on a model without anything but a price per token: the k-th ends after k jobs."""
    cost = PiecewiseCost("linear", (0, 1), (0.0, 0.001))
    requests = [(0.0, 160, 1, list(range(number * 10, number * 10 + 10))) for number in range(200)]
    trace = trace_of(*requests)
    job, two = 0.16, bound(trace, Settings(replicas=2, cost=cost))
    assert two.ttft_mean == pytest.approx(job / 2 * 201 / 2)
    assert two.e2e_mean == pytest.approx(two.ttft_mean)
    assert two.ttft_p99 == pytest.approx(job / 2 * 198)
    half = Settings(replicas=2, cost=cost, slowness=(0.5,))
    assert bound(trace, half).ttft_mean == pytest.approx(job / 3 * 201 / 2)


def test_the_shortest_job_goes_first_and_interrupts() -> None:
    cost = PiecewiseCost("linear", (0, 1), (0.0, 0.001))
    long, short = list(range(100)), [200]
    trace = trace_of((5.0, 1600, 1, long), (5.1, 16, 1, short), (6.5, 16, 1, [201]))
    # 16 ms for the short one that comes after 100 ms, and the long one ends before the third comes, 16 ms late.
    fleet = Settings(replicas=1, cost=cost)
    assert bound(trace, fleet).ttft_mean == pytest.approx((1.6 + 0.016 + 0.016 + 0.016 + 0.016) / 3)


def test_requests_that_fit_nowhere_do_not_count() -> None:
    trace = trace_of((0.0, 1600, 1, list(range(100))), (0.0, 160, 1, list(range(200, 210))))
    fleet = Settings(replicas=1, cost="mistral-7b-a6000", capacity_tokens=320, page_size=BLOCK)
    only = trace_of((0.0, 160, 1, list(range(200, 210))))
    assert bound(trace, fleet) == bound(only, fleet)
    nothing = bound(trace.first(1), fleet)
    assert nothing.ttft_mean == nothing.e2e_p99 == 0


def test_a_closed_loop_has_no_bound() -> None:
    with pytest.raises(InvalidRequest, match="closed loop"):
        bound(alone(10, 1), Settings(closed_loop=True))
