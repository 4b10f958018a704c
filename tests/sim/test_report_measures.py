"""What the plots of a report show, against the plain sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_outcomes import made_outcomes, made_trace

from preble.sched import HotPrefix
from preble.sim.html import Cell
from preble.sim.outcome import Outcome
from preble.sim.report.figures import common_limit, legend_columns
from preble.sim.report.history import PARTS, busy_share, hit_rate, in_system, recent
from preble.sim.report.hottest import hottest_tables, ranges
from preble.sim.report.latency import POINTS, distribution_function
from preble.sim.report.policies import seconds
from preble.sim.settings import Failure


@pytest.fixture(scope="module")
def run() -> Outcome:
    (outcome,) = made_outcomes(["e2"], made_trace(60), replicas=3, failures=(Failure(1, 3.0),))
    return outcome


# Distributions


@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=3 * POINTS))
@settings(max_examples=60, deadline=None)
def test_a_distribution_function_has_few_steps_and_none_of_them_is_wrong(values: list[float]) -> None:
    at, shares = distribution_function(np.array(values))
    assert len(at) == len(shares) <= POINTS + 1
    assert (np.diff(at) >= 0).all()
    assert (np.diff(shares) > 0).all()
    assert (at[0], shares[0]) == (min(values), 0.0)
    assert (at[-1], shares[-1]) == (max(values), 1.0)
    for value, share in zip(at[1:], shares[1:], strict=True):
        below, up_to = (
            sum(test) / len(values) for test in zip(*((one < value, one <= value) for one in values), strict=True)
        )
        assert below < share <= up_to


def test_few_values_are_all_steps() -> None:
    at, shares = distribution_function(np.array([3.0, 1.0, 2.0, 2.0]))
    assert at.tolist() == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert shares.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert not len(distribution_function(np.empty(0))[0])


# Over time


def test_a_recent_sum_goes_back_a_twentieth_and_not_before_the_start() -> None:
    total = np.arange(1.0, 41.0) ** 2
    assert PARTS == 20
    assert recent(total).tolist() == [total[at] - (total[at - 2] if at >= 2 else 0) for at in range(40)]
    assert recent(np.array([2.0, 5.0, 5.0])).tolist() == [2.0, 3.0, 0.0]
    assert recent(np.empty(0)).tolist() == []


def test_requests_in_the_system_have_arrived_and_not_ended(run: Outcome) -> None:
    lives = list(zip(run.arrived.tolist(), (run.arrived + run.e2e).tolist(), strict=True))
    expected = [sum(arrived <= time < ended for arrived, ended in lives) for time in run.samples.times]
    assert in_system(run).tolist() == expected
    assert max(expected) > 3


def test_hit_rates_are_of_what_was_recently_begun(run: Outcome) -> None:
    back = len(run.samples.times) // PARTS
    cached, prompts = (run.samples.column(name) for name in ("cached_tokens", "prompt_tokens"))
    rates = hit_rate(run)
    seen = 0
    for at, rate in enumerate(rates):
        before = at - back
        begun = sum(prompts[at]) - (sum(prompts[before]) if before >= 0 else 0)
        if begun:
            hits = sum(cached[at]) - (sum(cached[before]) if before >= 0 else 0)
            assert rate == pytest.approx(hits / begun)
            seen += 0 < rate < 1
        else:
            assert np.isnan(rate)
    assert seen > 10


def test_busy_shares_are_of_all_replicas_and_never_more_than_all(run: Outcome) -> None:
    back, times = len(run.samples.times) // PARTS, run.samples.times
    busy = run.samples.column("busy_seconds").sum(axis=1)
    shares = busy_share(run)
    for at in range(back, len(times)):
        expected = (busy[at] - busy[at - back]) / (3 * (times[at] - times[at - back]))
        assert shares[at] == pytest.approx(min(expected, 1.0))
    assert (shares >= 0).all()
    assert 0.1 < shares.max() <= 1.0


# Prefixes


def test_replica_numbers_are_written_as_ranges() -> None:
    assert ranges([]) == []
    assert ranges([0, 1, 2, 4, 6, 7]) == ["0-2", "4", "6-7"]


def test_a_part_of_a_prefix_is_told_apart_from_all_of_it(run: Outcome) -> None:
    def holders(replicas: dict[int, int]) -> str | Cell:
        hot = HotPrefix("tenant", 100, 300, 0xABCDEF0123456789, 5, replicas)
        ((name, text, *numbers),) = hottest_tables({"e2": replace(run, hottest=[hot])})[0].rows
        assert name == "tenant:abcdef01"
        assert numbers == ["100-300", "5", "800"]
        return text

    assert holders({}) == "none"
    assert holders({0: 200, 1: 200, 2: 50}) == "3 of 3: 0-1, 2 (25%)"
    assert holders(dict.fromkeys(range(0, 40, 2), 200)) == "20 of 3: 0, 2, 4, 6, 8, 10, 12, 14, …"


# Numbers and axes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.00004, "0.0000"),
        (0.01234, "0.0123"),
        (0.5, "0.5000"),
        (1.23456, "1.235"),
        (12.3456, "12.35"),
        (123.456, "123.5"),
        (12345.6, "12,346"),
    ],
)
def test_seconds_have_four_digits_down_to_a_tenth_of_a_millisecond(value: float, text: str) -> None:
    assert seconds(value) == text


def test_a_minority_does_not_stretch_the_axes() -> None:
    assert common_limit([10.0, 11.0, 500.0], 2.0) == 22.0
    assert common_limit([10.0, 12.0, 500.0, 600.0], 2.0) == 600.0
    assert common_limit([10.0, 500.0], 2.0) == 500.0, "of two none is the exception"
    assert common_limit([10.0], 2.0) == 10.0
    assert common_limit([0.0, 0.0, 5.0], 2.0) == 5.0


def test_long_names_leave_room_for_fewer_columns_of_a_legend() -> None:
    assert legend_columns(6.4, ["e2"]) == 1
    assert legend_columns(6.4, ["e2"] * 12) > legend_columns(6.4, ["prefix-affinity"] * 12) > 1
    assert legend_columns(6.4, ["x" * 100] * 3) == 1
