"""Cost models: the authors' formulas worked out by hand, and what all cost models promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from step_mix import Step, check_growth, growing_steps

from preble.errors import InvalidRequest
from preble.sched import PRESETS, CostModel, make_cost
from preble.sched.cost import PiecewiseCost

A6000, A100, TWO_A100, TWO_H100 = "mistral-7b-a6000", "mistral-7b-a100", "llama-3-70b-2xa100", "llama-3-70b-2xh100"

WORKED_OUT = [
    # 22 + 0.32; then 22 + 0.000186 x 128,000 + 0.159
    (A6000, Step((), 1, 100), 22.32 / 0.9),
    (A6000, Step((), 64, 128_000), 45.967 / 0.9),
    # flat below 192; -118 + 240 - 94.37184 there, -118 + 250 - 102.4 at 200; then the peak, -118 + 1.25² / 0.01024,
    # until 383; 0.10842571 x 384 + 4.209777
    (A6000, Step(((191, 191),), 0, 0), 22.32 / 0.9),
    (A6000, Step(((192, 192),), 0, 0), 27.94816 / 0.9),
    (A6000, Step(((200, 200),), 0, 0), 29.92 / 0.9),
    (A6000, Step(((300, 300),), 0, 0), 34.907890625 / 0.9),
    (A6000, Step(((383, 383),), 0, 0), 34.907890625 / 0.9),
    (A6000, Step(((384, 384),), 0, 0), 46.16524964 / 0.9),
    # 2^20 pairs are not above 2^20, and a context of 1,024 is not above 1,024: 115.23770404 + 0.32
    (A6000, Step(((1024, 1024),), 0, 0), 115.55770404 / 0.9),
    # 115.34612975 + 0.34965 + (1.15825 + 1.79375 + 2.30086875)
    (A6000, Step(((1025, 1025),), 0, 0), 120.9486485 / 0.9),
    # 632 tokens 72.73482572, 44,396 of context 8.416656, the first chunk's extra 0.57856 + 7.168 + 4.59276288
    (A6000, Step(((512, 4096), (100, 300)), 20, 40_000), 93.4908046 / 0.9),
    (A100, Step((), 63, 200_000), 8.96 / 0.85),
    (A100, Step((), 64, 200_000), 10.5 / 0.85),
    (A100, Step(((255, 255),), 0, 0), 10.5 / 0.85),
    (A100, Step(((256, 256),), 0, 0), 18.38621972 / 0.85),
    # 57.02688788 + (0.123864 - 0.763247616 + 1.761512448 + 1.428850475)
    (A100, Step(((1024, 1024),), 0, 0), 59.577867187 / 0.85),
    # 632 tokens 37.30404684; 0.123864 - 0.381623808 + 7.046049792 + 2.857700950 for the first chunk
    (A100, Step(((512, 4096), (100, 300)), 20, 40_000), 46.950037774 / 0.85),
    # fixed + tokens + context + pairs, as published for one request
    (TWO_A100, Step(((1000, 4000),), 0, 0), 28.931389 + 182.233431 + 16.014604 + 10.202004),
    (TWO_H100, Step(((1000, 4000),), 0, 0), 18.667307 + 79.87911 + 10.741264 + 2.9773796),
    # the fixed part once per step, and 0.1004 or 0.0611 µs for a token of the decodes' context
    (TWO_A100, Step((), 32, 64_000), 28.931389 + 5.831469792 + 6.4256),
    (TWO_H100, Step((), 32, 64_000), 18.667307 + 2.55613152 + 3.9104),
    (TWO_A100, Step(((1000, 4000), (10, 10)), 32, 64_000), 28.931389 + 189.887235 + 16.05464051 + 10.20225905 + 6.4256),
    ("generic", Step((), 1, 100), 8.0078125 + 0.005),
    ("generic", Step(((2048, 2048),), 0, 0), 52 + 1 + 6.291456),
]


@pytest.mark.parametrize(("preset", "step", "milliseconds"), WORKED_OUT)
def test_the_presets_are_the_published_formulas(preset: str, step: Step, milliseconds: float) -> None:
    assert PRESETS[preset].step_seconds(*step) * 1000 == pytest.approx(milliseconds, rel=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
@given(growth=growing_steps())
@example(growth=(Step(((383, 383),), 0, 0), Step(((384, 384),), 0, 0)))
@example(growth=(Step(((243, 243),), 0, 0), Step(((250, 250),), 0, 0)))
@example(growth=(Step(((4096, 4096),), 0, 0), Step(((4097, 4097),), 0, 0)))
def test_presets_never_fall(preset: str, growth: tuple[Step, Step]) -> None:
    check_growth(PRESETS[preset], *growth)


def test_a_step_pays_the_fixed_part_once() -> None:
    for preset in (TWO_A100, TWO_H100):
        model = PRESETS[preset]
        assert model.decode_seconds(64, 64_000) < 2 * model.decode_seconds(1, 1000)
        both = model.step_seconds(((500, 500), (500, 500)), 0, 0)
        assert both < 2 * model.prefill_seconds(500)


def test_presets_go_by_name() -> None:
    assert set(PRESETS) == {A6000, A100, TWO_A100, TWO_H100, "generic"}
    for name, model in PRESETS.items():
        assert model.name == name
        assert make_cost(name) is model
    mine = PiecewiseCost("mine", (0, 1), (1.0, 1.0))
    assert make_cost(mine) is mine


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ("mistral-7b-a600", "did you mean 'mistral-7b-a6000'"),
        ("zzz", "must be one of generic, llama-3-70b-2xa100, .*CostModel, not 'zzz'$"),
        (None, "not None$"),
        (PiecewiseCost, "not <class"),
    ],
)
def test_other_names_are_refused(cost: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_cost(cost)


PRICES: dict[str, float] = {
    "prefill": 3.0,
    "per_prefill_token": 0.5,
    "per_prefill_context": 0.25,
    "per_pair": 0.125,
    "per_decode": 7.0,
    "per_decode_context": 0.0625,
}


def test_a_piecewise_cost_is_the_sum_of_its_terms() -> None:
    model = PiecewiseCost("mine", (0, 10, 20), (100.0, 110.0, 140.0), **PRICES)
    # 4 decodes and chunks of 2 and 6: 12 tokens, 2 beyond the second knot
    expected = (110 + 6) + (7 * 4 + 0.0625 * 80) + (3 + 0.5 * 8 + 0.25 * 40 + 0.125 * (2 * 10 + 6 * 30))
    assert model.step_seconds(((2, 10), (6, 30)), 4, 80) == expected
    assert model.decode_seconds(5, 80) == 105 + 35 + 5
    assert model.decode_seconds(30, 80) == (140 + 30) + 210 + 5
    assert model.prefill_seconds(10, 30) == 110 + 3 + 5 + 10 + 50


@given(growth=growing_steps())
def test_a_piecewise_cost_never_falls(growth: tuple[Step, Step]) -> None:
    check_growth(PiecewiseCost("mine", (0, 3, 700), (0.1, 0.3, 0.3), **PRICES), *growth)


@pytest.mark.parametrize(
    ("knots", "base", "prices", "message"),
    [
        ((0,), (1.0,), {}, "at least two numbers rising from 0"),
        ((1, 2), (1.0, 1.0), {}, "at least two numbers rising from 0"),
        ((0, 5, 5), (1.0, 1.0, 1.0), {}, "at least two numbers rising from 0"),
        ((0, math.nan), (1.0, 1.0), {}, "at least two numbers rising from 0"),
        ((0, 5), (1.0,), {}, "1 values for 2 knots"),
        ((0, 5), (1.0, 0.5), {}, "never fall"),
        ((0, 5), (-1.0, 0.5), {}, "never fall"),
        ((0, 5), (0.5, math.inf), {}, "never fall"),
        ((0, 5), (0.5, math.nan), {}, "never fall"),
        ((0, 5), (0.5, 0.5), {"per_pair": -1e-9}, "per_pair of cost model 'mine'"),
        ((0, 5), (0.5, 0.5), {"per_decode": math.nan}, "per_decode of cost model 'mine'"),
        ((0, 5), (0.5, 0.5), {"prefill": math.inf}, "prefill of cost model 'mine'"),
    ],
)
def test_a_piecewise_cost_that_could_fall_is_refused(
    knots: tuple[int, ...], base: tuple[float, ...], prices: dict[str, float], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        PiecewiseCost("mine", knots, base, **prices)


class Doubled(CostModel):
    """A model that says no more than it must."""

    name = "doubled"

    def step_seconds(self, prefills: Any, decodes: int, decode_context: int) -> float:
        return 2 * PRESETS["generic"].step_seconds(prefills, decodes, decode_context)


@given(growth=growing_steps())
def test_one_method_makes_a_cost_model(growth: tuple[Step, Step]) -> None:
    check_growth(Doubled(), *growth)
