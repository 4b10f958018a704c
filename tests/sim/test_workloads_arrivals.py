"""Arrival times: how many, how fast, how evenly."""

from __future__ import annotations

import numpy as np
import pytest

from preble.errors import InvalidRequest
from preble.sim.workloads.arrivals import ARRIVALS, BURSTINESS, arrival_times


def times(kind: str, count: int, rate: float = 5.0, seed: int = 0) -> np.ndarray:
    return arrival_times(kind, count, rate, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", ARRIVALS)
@pytest.mark.parametrize("count", [0, 1, 2, 1_000])
def test_as_many_as_asked_for_in_order_from_zero(kind: str, count: int) -> None:
    found = times(kind, count)
    assert found.shape == (count,)
    assert found.dtype == np.float64
    assert not found[:1].any()
    assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize("kind", ARRIVALS)
def test_fewer_are_the_beginning_of_more(kind: str) -> None:
    assert times(kind, 100).tolist() == times(kind, 5_000)[:100].tolist()


@pytest.mark.parametrize(("kind", "spread"), [("poisson", 1.0), ("bursty", BURSTINESS), ("uniform", 0.0)])
@pytest.mark.parametrize("rate", [0.25, 40.0])
def test_the_rate_and_the_spread_of_the_gaps_are_as_documented(kind: str, spread: float, rate: float) -> None:
    gaps = np.diff(times(kind, 100_000, rate))
    # One standard error of the mean is spread / sqrt(100,000), at most 1 %
    assert 1 / gaps.mean() == pytest.approx(rate, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.04, abs=1e-6)


def test_poisson_counts_vary_as_much_as_their_mean_and_bursty_ones_far_more() -> None:
    def dispersion(kind: str) -> float:
        found = times(kind, 100_000)
        counts = np.bincount((found / 20).astype(int))[:-1]  # 100 arrivals per 20 s, the last of them cut
        return float(counts.var() / counts.mean())

    assert dispersion("poisson") == pytest.approx(1, abs=0.2)
    assert dispersion("bursty") == pytest.approx(BURSTINESS**2, rel=0.2)


def test_at_once_is_at_zero() -> None:
    assert not times("at-once", 50).any()


@pytest.mark.parametrize(
    ("kind", "count", "rate", "message"),
    [
        ("often", 1, 1.0, "'often'; there are poisson, bursty, uniform, at-once"),
        ("poisson", -1, 1.0, "at least 0, not -1"),
        ("at-once", 1, -2.0, "positive number of requests per second, not -2.0"),
    ],
)
def test_a_wrong_argument_is_named(kind: str, count: int, rate: float, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        arrival_times(kind, count, rate, np.random.default_rng(0))
