"""What holds for every trace, policy, fleet and failure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_fleets import SETTINGS, one, request, simulated, trace

from preble.sched.cost_presets import GENERIC
from preble.sched.orders import ORDERS
from preble.sched.policies import POLICIES
from preble.sim import SLO, Failure, Simulation, Trace, simulate
from preble.sim.outcome import outcome_of

PLAIN: dict[str, Any] = {"cost": GENERIC, "capacity_tokens": 160, "max_batched_tokens": 32}


@st.composite
def traces(draw: st.DrawFn, most: int = 25) -> Trace:
    """Sessions and single requests over a small tree of prefixes; a partial last block is nobody else's."""
    requests = []
    arrival = 0.0
    for number in range(draw(st.integers(1, most))):
        arrival += draw(st.sampled_from([0.0, 0.0, 0.001, 0.05, 1.0]))
        stem = draw(st.sampled_from([(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (5,), (5, 6, 7)]))
        own = draw(st.integers(0, 4))
        blocks = [*stem, *(100 + 10 * number + position for position in range(own))]
        cut = draw(st.integers(0, 3)) if own else 0
        if not blocks:
            blocks, cut = [99], 0
        session = draw(st.sampled_from([None, "a", "b"]))
        think = draw(st.sampled_from([0.0, 0.3]))
        output = draw(st.sampled_from([1, 1, 2, 5, 30, 90]))
        tokens = 4 * len(blocks) - cut
        requests.append(request(arrival, blocks, output, prompt_tokens=tokens, session=session, think=think))
    return trace(*requests)


@st.composite
def failures(draw: st.DrawFn, replicas: int) -> tuple[Failure, ...]:
    """Some fail, some of them more than once; replica 0 always comes back."""
    return tuple(
        Failure(number, draw(st.floats(0, 2)), draw(st.sampled_from([0.0, 0.1, 1.0, *([math.inf] if number else [])])))
        for number in draw(st.lists(st.integers(0, replicas - 1), max_size=4))
    )


@st.composite
def fleets(draw: st.DrawFn) -> dict[str, Any]:
    replicas = draw(st.integers(1, 4))
    return {
        **PLAIN,
        "replicas": replicas,
        "failures": draw(failures(replicas)),
        "slowness": tuple(draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), max_size=replicas))),
        "event_delay": draw(st.sampled_from([0.0, 0.0, 0.02, 0.5])),
        "closed_loop": draw(st.booleans()),
        "max_running": draw(st.sampled_from([1, 3, 256])),
        "order": draw(st.sampled_from(list(ORDERS))),
        "max_tokens": draw(st.sampled_from([1, 4096])),
        "believed_cost": draw(st.sampled_from([None, "mistral-7b-a6000"])),
        "leap_seconds": draw(st.sampled_from([0.0, 0.2])),
        "seed": draw(st.integers(0, 3)),
    }


def repeated_tokens(made: Trace) -> int:
    """Prompt tokens that need not be computed if no prefix is computed twice, whoever is served first."""
    prefixes: dict[tuple[int, ...], int] = {}
    for traced in made.requests:
        blocks = tuple(traced.blocks.tolist())
        for stop in range(1, len(blocks) + 1):
            prefixes[blocks[:stop]] = min(4 * stop, traced.prompt_tokens) - 4 * (stop - 1)
    return sum(traced.prompt_tokens for traced in made.requests) - sum(prefixes.values())


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(made=traces(), fleet=fleets())
def test_every_request_is_completed_once(policy: str, made: Trace, fleet: dict[str, Any]) -> None:
    ended = 0

    def advance() -> None:
        nonlocal ended
        ended += 1

    simulation = simulated(made, policy, advance=advance, **fleet)
    usable = 160 // 4 * 4
    assert simulation.refused == [
        number for number, traced in enumerate(made.requests) if traced.prompt_tokens + traced.output_tokens > usable
    ]
    assert ended == len(made.requests) - len(simulation.refused)
    assert sum(flight.cached_tokens for flight in simulation.flights) <= repeated_tokens(made)
    for flight in simulation.flights:
        traced = flight.traced
        if flight.number in simulation.refused:
            assert math.isnan(flight.placed)
            assert not flight.generated
            continue
        assert flight.generated == traced.output_tokens
        assert flight.first_token > flight.arrived
        assert 0 <= flight.cached_tokens < traced.prompt_tokens
        assert flight.cached_tokens % 4 == 0 or flight.cached_tokens == traced.prompt_tokens - 1
        again = flight.preemptions or flight.moves
        assert flight.cached_tokens + flight.computed_tokens == traced.prompt_tokens or again
        assert flight.cached_tokens + flight.computed_tokens <= (1 + flight.preemptions + flight.moves) * 160
    if not fleet["failures"]:
        assert sum(one.moves for one in simulation.flights) == 0
    assert len(simulation.replicas) == fleet["replicas"]


@settings(max_examples=40, deadline=None)
@given(made=traces(), fleet=fleets())
def test_leaps_change_no_time(made: Trace, fleet: dict[str, Any]) -> None:
    """Round robin does not listen to reports, so that nothing may depend on how they are bundled."""
    fleet["believed_cost"] = None  # or a replica learns from other steps what steps take
    runs = []
    for leap_seconds in (0.0, 0.05, 0.2, 1e9):
        simulation = simulated(made, "round-robin", **{**fleet, "leap_seconds": leap_seconds})
        runs.append([one(flight) for flight in simulation.flights])
        assert sum(replica.steps for replica in simulation.replicas) >= bool(simulation.flights)
    for other in runs[1:]:
        np.testing.assert_equal(other, runs[0])


@settings(max_examples=30, deadline=None)
@given(made=traces(), fleet=fleets(), policy=st.sampled_from(list(POLICIES)))
def test_figures_add_up(made: Trace, fleet: dict[str, Any], policy: str) -> None:
    simulation = simulated(made, policy, **fleet)
    outcome = outcome_of(simulation, SLO(ttft=0.1, tpot=0.02, e2e=1.0))
    done = [flight for flight in simulation.flights if flight.number not in simulation.refused]
    assert outcome.requests == len(made.requests)
    assert outcome.completed == len(done) == outcome.requests - outcome.refused
    assert outcome.numbers.tolist() == [flight.number for flight in done]
    assert np.allclose(outcome.ttft, [flight.first_token - flight.arrived for flight in done])
    assert np.allclose(outcome.e2e, [flight.ended - flight.arrived for flight in done])
    assert (outcome.queueing < outcome.ttft).all() or not done
    assert (outcome.ttft <= outcome.e2e).all()
    for tpot, flight in zip(outcome.tpot, done, strict=True):
        if flight.generated == 1:
            assert math.isnan(tpot)
        else:
            assert tpot * (flight.generated - 1) == pytest.approx(flight.ended - flight.first_token)
    good = [
        flight.first_token - flight.arrived <= 0.1
        and flight.ended - flight.first_token <= 0.02 * (flight.generated - 1) * (1 + 1e-12)
        and flight.ended - flight.arrived <= 1.0
        for flight in done
    ]
    assert outcome.good == sum(good)
    assert outcome.makespan == max((flight.ended for flight in done), default=0.0)
    assert (outcome.busy_seconds <= simulation.now * (1 + 1e-9)).all()
    assert 1.0 <= outcome.imbalance <= fleet["replicas"] + 1e-9
    assert sum(outcome.reasons.values()) == outcome.completed
    assert outcome.hit_rate <= 1
    plain = outcome.to_dict()
    assert plain["cached_tokens"] == sum(flight.cached_tokens for flight in done)
    if not fleet["closed_loop"]:
        missed = [int(made.known_tokens[flight.number]) - flight.cached_tokens for flight in done]
        assert outcome.recomputed_tokens == sum(max(tokens, 0) for tokens in missed)


def test_an_ample_cache_on_one_replica_finds_all_that_is_known() -> None:
    """One at a time, on one replica that keeps everything, hits are those of the trace."""
    rng = np.random.default_rng(5)
    requests = []
    for number in range(40):
        path = [1, *(10 * depth + int(rng.integers(3)) for depth in range(1, 4))][: int(rng.integers(1, 5))]
        chained = [
            sum((value + 1) * 101**place for place, value in enumerate(path[: n + 1])) % 9973 for n in range(len(path))
        ]
        requests.append(request(1000.0 * number, [*chained, 20_000 + number], 3, prompt_tokens=4 * len(path) + 1))
    made = trace(*requests)
    (outcome,) = simulate(made, SETTINGS.__class__(replicas=1, page_size=4, capacity_tokens=100_000), ["least-loaded"])
    assert outcome.cached_tokens.tolist() == made.known_tokens.tolist()
    assert 0.3 < outcome.hit_rate < 1
    assert outcome.recomputed_tokens == 0
    assert outcome.evicted_tokens == 0


def test_a_small_cache_evicts() -> None:
    made = trace(*(request(1000.0 * number, [number % 3 * 8 + at for at in range(8)], 1) for number in range(9)))
    outcomes = {}
    for tokens in (64, 4096):
        (outcomes[tokens],) = simulate(made, SETTINGS.__class__(replicas=1, page_size=4, capacity_tokens=tokens))
    # 32 tokens a prompt, of which one page is never found; two prompts fit, and the third one takes their place.
    assert outcomes[4096].cached_tokens.tolist() == [0, 0, 0, *[28] * 6]
    assert outcomes[64].hit_rate < outcomes[4096].hit_rate
    assert outcomes[64].recomputed_tokens == sum(made.known_tokens) - outcomes[64].cached_tokens.sum() > 0
    assert outcomes[64].evicted_tokens >= 32 * 6 - 28 * 2
    assert outcomes[4096].evicted_tokens == 0


def test_no_prompt_is_kept_after_its_request() -> None:
    """What remains of requests is their flights, not their tokens."""
    made = trace(*(request(number, [number, 500 + number], 3) for number in range(50)))
    simulation = Simulation(made, SETTINGS, "e2")
    simulation.run()
    for replica in simulation.replicas:
        assert not replica.local.running
        assert not replica.local.waiting
        assert not replica.local._by_id
        assert not replica._inbox
    assert not simulation.router._requests  # type: ignore[attr-defined]
