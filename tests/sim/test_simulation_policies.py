"""Policies and routers that users bring."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_fleets import SETTINGS, ByHand, request, simulated, trace

from preble.errors import InvalidRequest
from preble.sched import Choice, GlobalScheduler, Policy, View
from preble.sim import Router, Simulation, simulate

MADE = trace(*(request(5.0 * number, [number], 2) for number in range(12)))


class Last(Policy):
    """Always the last replica."""

    name = "last"

    def choose(self, view: View) -> Choice:
        return Choice(len(view.replicas) - 1, "as always")


class OneEach(Policy):
    """A request waits in the cluster until a replica has nothing to do."""

    name = "one-each"

    def choose(self, view: View) -> Choice | None:
        for index, replica in enumerate(view.replicas):
            if not replica.in_flight:
                return Choice(index, "idle")
        return None


def test_a_policy_of_ones_own() -> None:
    outcomes = simulate(MADE, replace(SETTINGS, replicas=3), [Last(), "round-robin"])
    assert [one.policy for one in outcomes] == ["last", "round-robin"]
    assert outcomes[0].replica.tolist() == [2] * 12
    assert outcomes[0].reasons == {"as always": 12}
    assert outcomes[0].imbalance == 3.0
    assert sorted(outcomes[1].replica.tolist()) == sorted([0, 1, 2] * 4)
    assert outcomes[1].imbalance == pytest.approx(1.0)


def test_a_policy_that_lets_requests_wait_in_the_cluster() -> None:
    """Two replicas, 25 s a request, one every 5 s: each is placed when one of the two before it has ended."""
    simulation = simulated(MADE, OneEach(), replicas=2)
    flights = simulation.flights
    assert all(one.admitted == one.placed for one in flights)
    assert [one.placed for one in flights] == [25.0 * (number // 2) + 5.0 * (number % 2) for number in range(12)]


def test_a_router_of_ones_own() -> None:
    router: Router = ByHand(*[0, 1] * 6)
    (outcome,) = simulate(MADE, replace(SETTINGS, replicas=2), [router])
    assert outcome.policy == "by-hand"
    assert outcome.replica.tolist() == [0, 1] * 6
    assert outcome.reasons == {"by-hand": 12}
    assert outcome.hottest == []


def test_the_global_scheduler_is_a_router() -> None:
    """Given as it is, it does what its policy does by name."""
    settings = replace(SETTINGS, replicas=3, seed=4)
    scheduler: Router = GlobalScheduler(
        3,
        capacity_tokens=settings.kv_tokens,
        page_size=settings.page_size,
        max_batched_tokens=settings.max_batched_tokens,
        policy="e2",
        cost=settings.cost_model,
        seed=4,
    )
    by_router, by_name = simulate(MADE, settings, [scheduler, "e2"])
    assert by_router.to_dict() == by_name.to_dict()


def test_the_seed_decides_between_equals() -> None:
    def placements(seed: int) -> list[int]:
        return [one.replica for one in simulated(MADE, replicas=3, seed=seed).flights]

    assert placements(1) == placements(1)
    assert len({tuple(placements(seed)) for seed in range(8)}) > 1


def test_an_unknown_name() -> None:
    with pytest.raises(InvalidRequest, match="round-robin"):
        Simulation(MADE, SETTINGS, "round-robbin")
    with pytest.raises(InvalidRequest, match="hrrn"):
        Simulation(MADE, replace(SETTINGS, order="hrn"))
    with pytest.raises(InvalidRequest, match="generic"):
        replace(SETTINGS, cost="genric")


def test_schedulers_may_believe_in_another_cost() -> None:
    """What steps take is what they take."""
    true, believed = (
        simulated(MADE, "least-loaded", replicas=1, **changes)
        for changes in ({}, {"believed_cost": "llama-3-70b-2xa100"})
    )
    assert [one.ended for one in true.flights] == [one.ended for one in believed.flights]
    assert believed.replicas[0].local.cost.name == "fitted (from llama-3-70b-2xa100)"
    learned = believed.replicas[0].local.cost.step_seconds(((4, 4),), 0, 0)
    assert learned == pytest.approx(14.0, rel=0.1), "and the replica learns that from its steps"
