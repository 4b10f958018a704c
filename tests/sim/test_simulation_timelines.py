"""What happens when, for a few requests whose times are worked out by hand.

A step takes 10 s and 1 s per token, and computes at most 8 tokens; pages and blocks have 4.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from made_fleets import ByHand, kinds, request, simulated, times, trace

from preble.errors import PrebleError
from preble.sched.cost import PiecewiseCost
from preble.sched.events import Event, Evicted, Finished, Progressed, ReplicaDown, ReplicaUp, StepTimed, Stored
from preble.sched.placement import Placement
from preble.sim import Failure


class Forgetful(ByHand):
    """Hears nothing."""

    def apply(self, event: Event, *, now: float) -> list[Placement]:
        return []


@pytest.fixture(params=[0.0, 30.0, 1e6], ids=["every step", "short leaps", "long leaps"])
def leaps(request: pytest.FixtureRequest) -> dict[str, Any]:
    """No time depends on how far replicas leap."""
    return {"leap_seconds": request.param}


def test_one_request(leaps: dict[str, Any]) -> None:
    simulation = simulated(trace(request(3.0, [1, 2], 3, prompt_tokens=6)), **leaps)
    (only,) = simulation.flights
    assert (only.arrived, only.placed, only.admitted) == (0.0, 0.0, 0.0), "the first arrival is the start"
    assert (only.first_token, only.ended) == (16.0, 16.0 + 2 * 11)
    assert (only.cached_tokens, only.computed_tokens) == (0, 6)
    assert simulation.replicas[0].busy_seconds == 38.0
    assert simulation.replicas[0].steps == 3


def test_a_long_prompt_is_computed_in_chunks(leaps: dict[str, Any]) -> None:
    simulation = simulated(trace(request(0.0, range(5), 1)), **leaps)
    assert times(simulation) == [(0.0, 18.0 + 18.0 + 14.0, 50.0)]


def test_a_prompt_that_ends_with_a_single_token(leaps: dict[str, Any]) -> None:
    simulation = simulated(trace(request(0.0, range(3), 4, prompt_tokens=9)), **leaps)
    assert times(simulation) == [(0.0, 18.0 + 11.0, 29.0 + 3 * 11)]
    assert simulation.flights[0].computed_tokens == 9


def test_decodes_take_their_share_of_a_step(leaps: dict[str, Any]) -> None:
    """The second comes while the first decodes its second token, from 14 to 25, and is admitted at 25."""
    simulation = simulated(trace(request(0.0, [1], 9), request(20.0, [5, 6, 7], 2)), **leaps)
    # 7 tokens of its prompt beside a decode, the other 5 beside the next one, then both decode.
    second = 25.0 + 18.0 + 16.0
    assert times(simulation) == [(0.0, 14.0, second + 12.0 + 4 * 11.0), (25.0, second, second + 12.0)]


def test_whole_pages_of_a_prefix_are_found_again(leaps: dict[str, Any]) -> None:
    simulation = simulated(
        trace(request(0.0, [1, 2], 1), request(100.0, [1, 2, 3], 1), request(200.0, [1, 2], 1), request(300.0, [2], 1)),
        **leaps,
    )
    assert [one.cached_tokens for one in simulation.flights] == [0, 8, 4, 0], "the last token is never taken from it"
    assert [one.computed_tokens for one in simulation.flights] == [8, 4, 4, 4]
    assert [one.first_token - one.arrived for one in simulation.flights] == [18.0, 14.0, 14.0, 14.0]


def test_what_others_generate_is_no_prefix(leaps: dict[str, Any]) -> None:
    simulation = simulated(trace(request(0.0, [1], 9), request(500.0, [1], 9), request(900.0, [1, 9, 10], 1)), **leaps)
    assert [one.cached_tokens for one in simulation.flights] == [0, 0, 4]


def test_a_request_waits_for_those_before_it(leaps: dict[str, Any]) -> None:
    simulation = simulated(
        trace(request(0.0, [1], 3), request(1.0, [2], 1), request(2.0, [3], 1)), max_running=1, **leaps
    )
    assert times(simulation) == [(0.0, 14.0, 36.0), (36.0, 50.0, 50.0), (50.0, 64.0, 64.0)]


def test_replicas_work_at_the_same_time(leaps: dict[str, Any]) -> None:
    made = trace(request(0.0, [1], 1), request(1.0, [2], 1), request(2.0, [3], 1))
    simulation = simulated(made, ByHand(0, 1, 0), replicas=2, **leaps)
    assert times(simulation) == [(0.0, 14.0, 14.0), (1.0, 15.0, 15.0), (14.0, 28.0, 28.0)]
    assert [one.replica for one in simulation.flights] == [0, 1, 0]
    assert [one.busy_seconds for one in simulation.replicas] == [28.0, 14.0]


def test_a_slow_replica(leaps: dict[str, Any]) -> None:
    made = trace(request(0.0, [1], 3), request(0.0, [2], 3))
    simulation = simulated(made, ByHand(0, 1), replicas=2, slowness=(2.5,), **leaps)
    assert times(simulation) == [(0.0, 35.0, 90.0), (0.0, 14.0, 36.0)]


TURNS = (
    request(0.0, [1], 2, session="a"),
    request(1.0, [50], 1, session="b"),
    request(4.0, [1, 2], 1, session="a", think=7.0),
    request(5.0, [1, 2, 3], 1, session="a", think=9.0),
)


def test_an_open_loop_sends_at_the_recorded_times(leaps: dict[str, Any]) -> None:
    simulation = simulated(trace(*TURNS), **leaps)
    assert [one.arrived for one in simulation.flights] == [0.0, 1.0, 4.0, 5.0]


def test_a_closed_loop_thinks_after_each_answer(leaps: dict[str, Any]) -> None:
    made = trace(*TURNS)
    simulation = simulated(made, ByHand(0, 1, 0, 0), replicas=2, closed_loop=True, **leaps)
    assert [one.ended for one in simulation.flights] == [25.0, 15.0, 32.0 + 14.0, 55.0 + 14.0]
    assert [one.arrived for one in simulation.flights] == [0.0, 1.0, 32.0, 55.0]
    assert [one.cached_tokens for one in simulation.flights] == [0, 0, 4, 8]


def test_what_a_router_is_told() -> None:
    router = ByHand(0, 0)
    simulated(
        trace(request(0.0, [1, 3], 2, prompt_tokens=6, session="x"), request(1.0, [2], 90)), router, max_tokens=50
    )
    assert router.submitted == [("0", [1, 1, 1, 1, 3, 3], 50, "x"), ("1", [2, 2, 2, 2], 90, None)]


def test_a_router_hears_late(leaps: dict[str, Any]) -> None:
    made = trace(request(0.0, [1], 1), request(30.0, [2], 1))
    for delay in (0.0, 5.0):
        router = ByHand(0, 0)
        simulation = simulated(made, router, event_delay=delay, **leaps)
        assert [one.ended for one in simulation.flights] == [14.0, 44.0]
        assert kinds(router.heard, Finished) == ([14.0, 44.0] if not delay else [19.0])  # then everything has ended


def test_a_policy_that_waits_for_events_hears_late(leaps: dict[str, Any]) -> None:
    """The second request is placed when the scheduler has heard that the first one ended."""

    class OneAtATime(ByHand):
        def submit(self, request_id: str, *args: Any, **options: Any) -> Any:
            return super().submit(request_id, *args, **options) if request_id == "0" else None

        def apply(self, event: Any, *, now: float) -> Any:
            first = isinstance(event, Finished) and event.request_id == "0"
            return super().apply(event, now=now) + ([self._placed("1", 0)] if first else [])

    made = trace(request(0.0, [1], 1), request(2.0, [2], 1))
    simulation = simulated(made, OneAtATime(0, 0), event_delay=5.0, **leaps)
    assert simulation.flights[1].placed == 19.0
    assert times(simulation)[1] == (19.0, 33.0, 33.0)


@pytest.mark.parametrize("delay", [0.0, 3.0])
def test_a_request_outlives_its_replica(delay: float, leaps: dict[str, Any]) -> None:
    """At 40 it has three tokens, and the step that began at 36 is lost. Prompt and output are computed elsewhere."""
    router = ByHand(0)
    made = trace(request(0.0, [1], 5))
    simulation = simulated(made, router, replicas=2, failures=(Failure(0, 40.0),), event_delay=delay, **leaps)
    (only,) = simulation.flights
    assert (only.replica, only.moves, only.placed, only.cached_tokens) == (1, 1, 0.0, 0)
    assert times(simulation) == [(0.0, 14.0, 40.0 + delay + 17.0 + 11.0)]
    assert only.computed_tokens == 4 + 7
    assert [one.busy_seconds for one in simulation.replicas] == [40.0, 28.0]
    assert kinds(router.heard, ReplicaDown) == [40.0 + delay]
    heard = sum(len(event.new_tokens) for _, event in router.heard if isinstance(event, Progressed))
    assert heard == (4 if delay else 5), "of the last step nobody hears, as then everything has ended"


@pytest.mark.parametrize("delay", [0.0, 3.0])
def test_a_replica_comes_back_without_its_pages(delay: float, leaps: dict[str, Any]) -> None:
    """The only replica fails at 20. What comes while it is down waits, or is lost with it and placed anew."""
    router = ByHand(0, 0, 0, replicas=1)
    simulation = simulated(
        trace(request(0.0, [1], 3), request(21.0, [2], 1), request(100.0, [1, 2], 1)),
        router,
        failures=(Failure(0, 20.0, 5.0),),
        event_delay=delay,
        **leaps,
    )
    back = 25.0 + delay
    assert kinds(router.heard, ReplicaDown) == [20.0 + delay]
    assert kinds(router.heard, ReplicaUp) == [back]
    # Both begin in one step: 4 + 1 tokens of the first, then 3 of the second, whose last token follows beside a decode.
    assert times(simulation) == [
        (0.0, 14.0, back + 18.0 + 12.0),
        (back, back + 30.0, back + 30.0),
        (100.0, 114.0, 114.0),
    ]
    assert [one.moves for one in simulation.flights] == [1, 1, 0] if delay else [1, 0, 0]
    assert simulation.flights[2].cached_tokens == 4, "from after the failure"


def test_a_failure_of_all_leaves_requests_unended() -> None:
    simulation = simulated(trace(request(0.0, [1], 1), request(1.0, [2], 1)), replicas=1, failures=(Failure(0, 15.0),))
    assert simulation.flights[0].ended == 14.0
    assert math.isnan(simulation.flights[1].ended)


def test_a_replica_that_is_down_fails_no_second_time() -> None:
    made = trace(request(0.0, [1], 1), request(200.0, [2], 1))
    failures = (Failure(0, 100.0, 50.0), Failure(0, 120.0, 500.0))
    simulation = simulated(made, failures=failures)
    assert simulation.flights[1].ended == 214.0


def test_a_step_in_flight_at_a_failure_changes_nothing_afterwards() -> None:
    """The step from 0 to 14 is lost at 5; at 14 the replica is back and works on something else."""
    simulation = simulated(trace(request(0.0, [1], 1)), failures=(Failure(0, 5.0, 1.0),))
    assert times(simulation) == [(0.0, 20.0, 20.0)]
    assert simulation.replicas[0].steps == 1
    assert simulation.replicas[0].busy_seconds == 5.0 + 14.0


def test_what_the_scheduler_learns_of_steps(leaps: dict[str, Any]) -> None:
    router = ByHand(0, 0)
    simulated(trace(request(0.0, [1, 2], 4), request(5.0, [1, 2, 3, 4], 1, prompt_tokens=13)), router, **leaps)
    steps = [event for _, event in router.heard if isinstance(event, StepTimed)]
    assert steps[0] == StepTimed(0, 8, 0, 8, 18.0, 64)
    # 8 of its 13 tokens are cached. With the other 5, one decode.
    assert steps[1] == StepTimed(0, 6, 1, 9 + 13, 16.0, 9 + 5 * 13)
    assert steps[-1] == StepTimed(0, 1, 1, 11, 11.0, 11)


def test_of_a_leap_the_last_step_is_told() -> None:
    made = trace(request(0.0, [1, 2], 20), request(3.0, [3], 12))
    cost = PiecewiseCost("by context", (0, 1), (10.0, 11.0), per_decode_context=0.5)
    told = {}
    for leap_seconds in (0.0, 30.0, 1e6):
        router = ByHand(0, 0)
        simulated(made, router, cost=cost, leap_seconds=leap_seconds)
        told[leap_seconds] = [event for _, event in router.heard if isinstance(event, StepTimed)]
    each = told.pop(0.0)
    for some in told.values():
        assert len(some) < len(each)
        assert set(some) <= set(each)
        assert some[-1] == each[-1]


def test_a_replica_numbers_its_cache_events_through_all_its_lives() -> None:
    router = ByHand(0, 0, replicas=1)
    simulated(trace(request(0.0, [1, 2], 1), request(100.0, [3], 1)), router, failures=(Failure(0, 50.0, 5.0),))
    events = [event for _, event in router.heard if isinstance(event, Stored | Evicted | ReplicaUp)]
    before, up, after = [event.sequence for event in events]
    assert before <= up == after - 1


def test_requests_that_no_replica_can_hold_are_left_out() -> None:
    made = trace(
        request(0.0, range(5), 20),
        request(1.0, range(5), 21, session="a"),
        request(2.0, [7], 1, session="a", think=99.0),
    )
    simulation = simulated(made, capacity_tokens=43, closed_loop=True)
    assert simulation.refused == [1]
    assert [one.generated for one in simulation.flights] == [20, 0, 1]
    assert simulation.flights[2].arrived == 2.0


def test_nobody_waits_for_ever_unnoticed() -> None:
    with pytest.raises(PrebleError, match="'by-hand' left 1 of 2 requests waiting"):
        simulated(
            trace(request(0.0, [1], 1), request(0.5, [1], 9)), Forgetful(1, 0), replicas=2, failures=(Failure(0, 10.0),)
        )


@pytest.mark.parametrize(("replica", "why"), [(2, "does not exist"), (-1, "does not exist"), (0, "is down")])
def test_a_router_that_places_on_nothing(replica: int, why: str) -> None:
    made = trace(request(0.0, [1], 1), request(50.0, [1], 1))
    with pytest.raises(PrebleError, match=f"'by-hand' placed request 1 on replica {replica}, which {why}"):
        simulated(made, Forgetful(1, replica), replicas=2, failures=(Failure(0, 10.0),))
