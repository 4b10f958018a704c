"""The fitted cost model: it learns each preset from noisy timings, and nothing it is fed makes it negative or fall."""

from __future__ import annotations

import json
import math
import pickle
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_mix import Step, check_growth, growing_steps, mixed_step, timed

from preble.errors import InvalidRequest
from preble.sched import PRESETS, CostModel, FittedCost, StepTimed
from preble.sched.cost import PiecewiseCost
from preble.sched.cost_fit import _nonnegative_least_squares

GENERIC, A6000 = PRESETS["generic"], PRESETS["mistral-7b-a6000"]


def play(
    model: FittedCost, truth: CostModel, steps: int, random: Random, *, times: float = 1.0, chunks: int = 1, **more: Any
) -> None:
    """Show the model steps that took `times` what `truth` says, give or take 5 %."""
    for _ in range(steps):
        step = mixed_step(random, chunks)
        model.observe(timed(step, times * truth.step_seconds(*step) * (1 + random.gauss(0, 0.05)), **more))


def error(model: CostModel, truth: CostModel, *, times: float = 1.0, chunks: int = 1, quantile: float = 0.5) -> float:
    """Relative error on 300 steps that no model was shown: the median, or another quantile."""
    random = Random("unseen")
    unseen = [mixed_step(random, chunks) for _ in range(300)]
    errors = sorted(abs(model.step_seconds(*step) / (times * truth.step_seconds(*step)) - 1) for step in unseen)
    return errors[int(quantile * len(errors))]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("start", ["generic", "llama-3-70b-2xa100"])
def test_it_learns_every_preset_in_200_noisy_steps(preset: str, start: str) -> None:
    for seed in range(3):
        model = FittedCost(PRESETS[start])
        play(model, PRESETS[preset], 200, Random(seed))
        assert error(model, PRESETS[preset]) < 0.05
        assert model.steps == 200


@pytest.mark.parametrize("preset", PRESETS)
def test_fifty_steps_do_for_a_rough_idea(preset: str) -> None:
    model = FittedCost(GENERIC)
    play(model, PRESETS[preset], 50, Random(7))
    assert error(model, PRESETS[preset]) < 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_it_learns_without_pairs_and_with_several_chunks(preset: str) -> None:
    truth = PRESETS[preset]
    without, several = FittedCost(GENERIC), FittedCost(GENERIC)
    play(without, truth, 200, Random(1), pairs_known=False)
    assert error(without, truth) < 0.06
    play(several, truth, 200, Random(1), chunks=3)
    assert error(several, truth, chunks=3) < 0.06


@pytest.mark.parametrize(("pairs_known", "tolerance"), [(True, 0.01), (False, 0.07)])
def test_pairs_tell_prefills_from_the_decodes_beside_them(pairs_known: bool, tolerance: float) -> None:
    truth = PRESETS["llama-3-70b-2xa100"]
    random = Random(3)
    model = FittedCost(GENERIC)
    for _ in range(200):
        step = mixed_step(random)
        model.observe(timed(step, truth.step_seconds(*step), pairs_known=pairs_known))
    assert error(model, truth, quantile=0.9) < tolerance


def test_short_chunks_attend_to_less_than_a_long_one() -> None:
    truth = PiecewiseCost("mine", (0, 1), (0.01, 0.01), per_prefill_context=2e-6, per_pair=2e-8)
    shapes = [
        Step(((new, attended),) * chunks, decodes, 1000 * decodes)
        for new, attended, chunks in ((256, 256, 1), (256, 256, 16), (4096, 4096, 1), (256, 8192, 1))
        for decodes in (0, 1, 8)
    ]
    model = FittedCost(GENERIC)
    for step in shapes * 12:
        model.observe(timed(step, truth.step_seconds(*step)))
    for step in shapes:
        assert model.step_seconds(*step) == pytest.approx(truth.step_seconds(*step), rel=0.05)


def test_it_begins_as_its_start() -> None:
    random = Random(0)
    model = FittedCost(A6000)
    assert model.name == "fitted (from mistral-7b-a6000)"
    for shown in range(8):
        for _ in range(20):
            step = mixed_step(random)
            assert model.step_seconds(*step) == A6000.step_seconds(*step)
        assert model.prefill_seconds(100, 900) == A6000.prefill_seconds(100, 900)
        assert model.decode_seconds(3, 900) == A6000.decode_seconds(3, 900)
        assert model.steps == shown
        play(model, GENERIC, 1, random)
    assert model.decode_seconds(3, 900) < 0.8 * A6000.decode_seconds(3, 900)


def test_what_it_was_not_shown_keeps_the_proportions_of_the_start() -> None:
    model = FittedCost(GENERIC)
    for decodes in range(1, 101):
        step = Step((), decodes % 32 + 1, 1000 * (decodes % 32 + 1))
        model.observe(timed(step, 30 * GENERIC.step_seconds(*step)))
    for new, cached in ((512, 0), (2048, 0), (1024, 16_384)):
        assert model.prefill_seconds(new, cached) == pytest.approx(30 * GENERIC.prefill_seconds(new, cached), rel=0.15)


def test_a_rare_kind_of_step_is_not_forgotten() -> None:
    truth = PRESETS["llama-3-70b-2xh100"]
    random = Random(5)
    model = FittedCost(GENERIC)
    play(model, truth, 200, random)
    for _ in range(1000):
        decodes = random.randint(1, 64)
        step = Step((), decodes, 1000 * decodes)
        model.observe(timed(step, truth.step_seconds(*step) * (1 + random.gauss(0, 0.05))))
    assert error(model, truth) < 0.05


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_far_off_do_no_harm(preset: str) -> None:
    truth = PRESETS[preset]
    for seed in range(3):
        random = Random(seed)
        model = FittedCost(GENERIC)
        for shown in range(200):
            step = mixed_step(random)
            seconds = truth.step_seconds(*step) * (1 + random.gauss(0, 0.05))
            if shown == 0 or random.random() < 0.05:
                seconds *= 100
            elif random.random() < 0.05:
                seconds /= 100
            model.observe(timed(step, seconds))
            if shown == 20:
                assert error(model, truth) < 0.25
        assert error(model, truth) < 0.06


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("before", "after"), [(1.0, 2.0), (2.0, 1.0)])
def test_a_lasting_change_of_speed_is_followed(preset: str, before: float, after: float) -> None:
    random = Random(11)
    model = FittedCost(GENERIC)
    play(model, PRESETS[preset], 1000, random, times=before)
    play(model, PRESETS[preset], 300, random, times=after)
    assert error(model, PRESETS[preset], times=after) < 0.1


ABSURD = st.builds(
    StepTimed,
    replica=st.just(0),
    new_tokens=st.integers(-2, 10**12),
    decodes=st.integers(-2, 10**12),
    context_tokens=st.integers(-2, 10**12),
    seconds=st.floats(),
    attended_pairs=st.integers(-2, 10**24),
)
ODD = st.builds(
    lambda new, decodes, context, seconds, pairs: StepTimed(0, new + decodes, decodes, new + context, seconds, pairs),
    st.integers(0, 10**6),
    st.integers(0, 1000),
    st.integers(1000, 10**8),
    st.one_of(st.floats(1e-6, 3600), st.sampled_from([1e-6, 0.01, 3600.0])),
    st.integers(0, 10**14),
)
"""Steps that are believed, whose times have nothing to do with what they computed."""


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(st.one_of(ABSURD, ODD), max_size=80),
    repeats=st.integers(1, 4),
    start=st.sampled_from(sorted(PRESETS)),
    growths=st.lists(growing_steps(), min_size=1, max_size=8),
)
def test_nothing_makes_it_negative_or_fall(
    events: list[StepTimed], repeats: int, start: str, growths: list[tuple[Step, Step]]
) -> None:
    model = FittedCost(PRESETS[start])
    for event in events * repeats:
        model.observe(event)
    for small, large in growths:
        check_growth(model, small, large)
    again = FittedCost.from_dict(json.loads(json.dumps(model.to_dict(), allow_nan=False)))
    for small, large in growths:
        check_growth(again, small, large)


def test_no_work_is_free() -> None:
    model = FittedCost(GENERIC)
    for seconds in (1e-6, 3600.0) * 200:
        model.observe(timed(Step((), 1 if seconds < 1 else 64, 64_000), seconds))
    assert min(model.decode_seconds(1, 1), model.prefill_seconds(1)) >= 1e-6


@pytest.mark.parametrize("pairs", [0, 1, 499, 500, 501, 900, 2500, 2501, 10**30])
def test_pairs_that_do_not_fit_the_other_sums_are_not_believed(pairs: int) -> None:
    model = FittedCost(GENERIC)
    for _ in range(50):
        model.observe(StepTimed(0, new_tokens=5, decodes=4, context_tokens=500, seconds=0.02, attended_pairs=pairs))
    assert model.step_seconds(((1, 100),), 4, 400) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("seed", range(30))
def test_least_squares_without_negative_numbers(seed: int) -> None:
    """As good as the best of all ways to hold some numbers at 0."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(12, 5)) + random.uniform(0, 2)
    target = random.normal(size=12)
    gram, moment = features.T @ features, features.T @ target

    def loss(x: Any) -> float:
        return float(np.sum((features @ x - target) ** 2))

    best = loss(np.zeros(5))
    for size in range(1, 6):
        for free in map(list, combinations(range(5), size)):
            x = np.zeros(5)
            x[free] = np.linalg.lstsq(features[:, free], target, rcond=None)[0]
            if np.all(x >= 0):
                best = min(best, loss(x))
    for guess in (np.zeros(5), np.ones(5), random.uniform(0, 1, 5)):
        found = _nonnegative_least_squares(gram, moment, guess)
        assert np.all(found >= 0)
        assert loss(found) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    "event",
    [
        *(StepTimed(0, 10, 2, 500, seconds, 900) for seconds in (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-9, 1e9)),
        StepTimed(0, 0, 0, 0, 0.1),
        StepTimed(0, 5, 6, 500, 0.1),
        StepTimed(0, 5, -1, 500, 0.1),
        StepTimed(0, 5, 5, 4, 0.1),
        StepTimed(0, 5, 5, 10**10, 0.1),
    ],
)
def test_what_cannot_be_true_is_ignored(event: StepTimed) -> None:
    model, untouched = FittedCost(GENERIC), FittedCost(GENERIC)
    play(model, A6000, 30, Random(2))
    play(untouched, A6000, 30, Random(2))
    for _ in range(100):
        model.observe(event)
    assert model.steps == 30
    assert model.to_dict() == untouched.to_dict()


def test_it_learns_on_in_bounded_memory_and_always_the_same() -> None:
    random, twin_random = Random(4), Random(4)
    model, twin = FittedCost(A6000), FittedCost(A6000)
    play(model, GENERIC, 400, random)
    early = len(pickle.dumps(model))
    play(model, GENERIC, 1600, random)
    assert len(pickle.dumps(model)) < 1.3 * early
    play(twin, GENERIC, 2000, twin_random)
    assert twin.to_dict() == model.to_dict()


@pytest.mark.parametrize("shown", [0, 7, 200])
@pytest.mark.parametrize("start", PRESETS)
def test_it_can_be_written_and_read(start: str, shown: int) -> None:
    model = FittedCost(PRESETS[start])
    play(model, A6000, shown, Random(6))
    read = FittedCost.from_dict(json.loads(json.dumps(model.to_dict())))
    assert read.name == model.name == f"fitted (from {start})"
    if shown == 200 or start == "generic":
        assert all(
            read.step_seconds(*step) == model.step_seconds(*step)
            for step in (mixed_step(random) for random in map(Random, range(50)))
        )
    else:
        assert error(read, model) < 0.1
    assert FittedCost.from_dict(read.to_dict()).to_dict() == read.to_dict()
    play(read, GENERIC, 200, Random(8))
    assert error(read, GENERIC) < 0.05


def test_it_can_begin_with_what_another_learned() -> None:
    first = FittedCost(GENERIC)
    play(first, A6000, 200, Random(0))
    second = FittedCost(first)
    assert second.name == first.name
    before = second.decode_seconds(8, 8000)
    assert before == first.decode_seconds(8, 8000)
    play(first, A6000, 200, Random(1), times=3)
    assert second.decode_seconds(8, 8000) == before
    assert FittedCost.from_dict(second.to_dict()).decode_seconds(8, 8000) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "preble-cost-0"}, "format 'preble-cost-1'"),
        ({"start": None}, "start of a fitted cost model must be a name, not None"),
        ({"knots": "0, 1"}, "knots of a fitted cost model must be a list of numbers"),
        ({"knots": [0, "1"]}, "knots of a fitted cost model must be a list of numbers"),
        ({"base": None}, "base of a fitted cost model must be a list of numbers"),
        ({"base": [1.0]}, "1 values for 3 knots"),
        ({"base": [2.0, 1.0, 3.0]}, "never fall"),
        ({"per_pair": True}, "per_pair of a fitted cost model must be a number, not True"),
        ({"per_pair": -1}, "per_pair of cost model 'generic' must be seconds"),
        ({"prefill": math.nan}, "prefill of cost model 'generic' must be seconds"),
    ],
)
def test_what_was_not_written_by_it_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        FittedCost.from_dict({**FittedCost(GENERIC).to_dict(), **change})
    missing = FittedCost(GENERIC).to_dict()
    del missing[next(iter(change))]
    with pytest.raises(InvalidRequest, match=f"{next(iter(change))}"):
        FittedCost.from_dict(missing)


def test_only_mappings_are_read() -> None:
    not_a_mapping: Any = [1]
    with pytest.raises(InvalidRequest, match="must be a mapping"):
        FittedCost.from_dict(not_a_mapping)
