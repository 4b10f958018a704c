"""The simulator against queueing theory."""

from __future__ import annotations

import numpy as np
import pytest
from made_fleets import ByHand

from preble.sched.cost import PiecewiseCost
from preble.sim import Settings, Simulation, Trace, TracedRequest

SERVICE = 1.0
"""Seconds of any step, whatever it computes; answers of one token take one."""
COUNT = 10_000
BATCHES = 20
STUDENT = 2.861
"""99.5 % quantile of Student's t with 19 degrees of freedom: both sides of a 99 % interval."""


def mean_wait(load: float, servers: int = 1) -> tuple[float, float]:
    """Mean seconds from arrival to service, and half the 99 % confidence interval, by batch means."""
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(SERVICE / (load * servers), COUNT))
    requests = tuple(TracedRequest(at, 4, 1, np.array([n], np.int32)) for n, at in enumerate(arrivals.tolist()))
    settings = Settings(
        replicas=servers,
        cost=PiecewiseCost("fixed", (0, 1), (SERVICE, SERVICE)),
        capacity_tokens=64,
        page_size=4,
        max_running=1,
        order="fcfs",
    )
    simulation = Simulation(Trace("poisson", 4, requests), settings, ByHand(*np.arange(COUNT) % servers))
    simulation.run()
    waits = np.array([one.admitted - one.arrived for one in simulation.flights])
    batches = waits[COUNT // 10 :].reshape(BATCHES, -1).mean(axis=1)
    return float(batches.mean()), STUDENT * float(batches.std(ddof=1)) / BATCHES**0.5


def theory_of_one(load: float) -> float:
    """M/D/1 (Pollaczek and Khinchine): load / (2 (1 - load)) service times."""
    return SERVICE * load / (2 * (1 - load))


@pytest.mark.parametrize("load", [0.6, 0.8])
def test_the_wait_for_a_fixed_service_time_is_that_of_theory(load: float) -> None:
    wait, margin = mean_wait(load)
    theory = theory_of_one(load)
    assert abs(wait - theory) < margin
    assert margin < 0.25 * theory, "or the test could not fail"


def test_dealing_requests_out_makes_arrivals_even() -> None:
    """Each of 8 replicas gets every 8th arrival: Erlang gaps, with which almost nobody waits."""
    dealt, _ = mean_wait(0.6, servers=8)
    assert dealt < 0.2 * theory_of_one(0.6)
