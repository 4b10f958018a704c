"""What E2 does about load that is out of balance: rebalance, replicate, relieve, and let requests wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from e2_paper_world import DOCUMENT, PerToken, World, ask, tokens

from preble.sched import Placement, ReplicaDown, ReplicaUp, Waiting

# Rebalancing


def overload(**switches: Any) -> tuple[World, int, int]:
    """Three replicas of which one has all documents; returns it, and the one with the least to do."""
    world = World(3, cost=PerToken(0.01), patience=float("inf"), late_binding=False, autoscaling=False, **switches)
    home = world.run(DOCUMENT).replica
    loads = {home}
    for length in (200, 300):  # so that the other two have loads of 2 and 3 s
        loads.add(world.run(tokens(900_000 + 1000 * length, length)).replica)
    assert loads == {0, 1, 2}
    light = min(range(3), key=world.load)
    for number in range(50, 62):
        assert world.run(ask(number, 200)).replica == home
    return world, home, light


def test_what_would_exploit_a_heavy_replica_goes_to_the_light_one_until_the_gap_closes() -> None:
    world, home, light = overload()
    before = world.submit(ask(10))
    assert (before.replica, before.reason) == (home, "exploit"), "nobody has looked yet"
    world.now = 0.9
    assert world.submit(ask(10)).reason == "exploit", "once a second is enough"
    world.now = 1.0
    moved = world.submit(ask(11))
    assert (moved.replica, moved.reason) == (light, "rebalance")
    reasons, gap = [], 0.0
    for number in range(40):
        world.now += 0.9
        gap = world.load(home) / min(map(world.load, range(3)))
        document = tokens(2_000_000 + 10_000 * number, 200)
        world.store(home, document)
        reasons.append(world.run([*document, number]).reason)
        if reasons[-1] == "exploit":
            break
    assert len(reasons) > 5
    assert set(reasons[:-1]) == {"rebalance"}
    assert gap < 1.5


def test_rebalancing_ends_when_there_is_nothing_left_to_balance() -> None:
    world, home, light = overload()
    world.now = 1.0
    assert world.submit(ask(11)).replica == light
    world.now = 102.0
    world.store(home, tokens(3_000_000, 200))
    assert world.submit(tokens(3_000_000, 201)).replica == home, "all load lies before the window"


def test_rebalancing_has_a_threshold_and_a_switch() -> None:
    for switches in ({"rebalancing": False}, {"th_bal": 30.0}):
        world, home, _ = overload(**switches)
        world.now = 1.0
        assert world.submit(ask(11)).replica == home


def test_an_idle_cluster_is_in_balance_whatever_the_ratio() -> None:
    world = World(2)
    home = world.run(DOCUMENT[:100]).replica
    world.now = 2.0
    assert world.submit(DOCUMENT[:100]).replica == home


def test_rebalancing_forgets_a_replica_that_leaves() -> None:
    world, _, light = overload()
    world.now = 1.0
    assert world.submit(ask(11)).replica == light
    world.scheduler.remove_replica(light, now=1.0)
    assert world.submit(ask(12)).replica != light
    world.scheduler.check()


# Autoscaling of a prefix


def hot(replicas: int = 3, **switches: Any) -> tuple[World, int]:
    """A document whose requests queued 0.5 s in one half window, and 4 s in the next."""
    world = World(replicas, window=40.0, patience=float("inf"), rebalancing=False, late_binding=False, **switches)
    home = world.run(ask(0)).replica
    wait_for(world, 0.5, first=1)
    world.now = 25.0
    wait_for(world, 4.0, first=20)
    return world, home


def wait_for(world: World, seconds: float, first: int) -> None:
    placements = [world.submit(ask(first + number)) for number in range(10)]
    world.now += seconds
    for placement in placements:
        world.finish(placement)


def test_a_prefix_whose_queueing_time_doubles_gets_one_copy_per_half_window() -> None:
    world, home = hot()
    copied = world.submit(ask(40))
    assert copied.reason == "replicate"
    assert copied.replica != home
    assert copied.cached_tokens == 0
    world.finish(copied)
    assert world.submit(ask(41)).reason == "exploit", "one per half window"
    world.scheduler.check()


@pytest.mark.parametrize("switches", [{"autoscaling": False}, {"th_auto": 10.0}])
def test_autoscaling_has_a_threshold_and_a_switch(switches: dict[str, Any]) -> None:
    world, home = hot(**switches)
    assert (world.submit(ask(40)).reason, world.submit(ask(41)).replica) == ("exploit", home)


def test_waiting_less_than_a_copy_costs_makes_no_copy() -> None:
    world = World(2, window=40.0, patience=float("inf"), rebalancing=False)
    home = world.run(ask(0)).replica
    wait_for(world, 0.01, first=1)
    world.now = 25.0
    wait_for(world, 0.5, first=20)
    assert (world.submit(ask(40)).replica, world.submit(ask(41)).reason) == (home, "exploit")


def test_a_copy_retires_when_the_prefix_cools_and_comes_back_first_when_it_is_hot_again() -> None:
    world, home = hot()
    copy = world.run(ask(40)).replica
    world.now = 45.0
    wait_for(world, 0.01, first=50)
    world.run(ask(70))
    assert {world.run(ask(number)).replica for number in range(71, 90)} == {home}, "the copy is there, and not used"
    world.now = 65.0
    wait_for(world, 5.0, first=100)
    again = world.submit(ask(140))
    assert (again.replica, again.reason, again.cached_tokens) == (copy, "replicate", 1000)


@pytest.mark.parametrize("cooled", [False, True])
def test_a_restarted_replica_has_no_copy_to_use_or_to_retire(cooled: bool) -> None:
    world, home = hot()
    copy = world.run(ask(40)).replica
    world.now = 45.0
    if cooled:
        wait_for(world, 0.01, first=50)
        world.run(ask(70))
        assert {world.run(ask(number)).replica for number in range(71, 90)} == {home}, "the copy is retired"
    world.scheduler.apply(ReplicaDown(copy), now=world.now)
    world.scheduler.apply(ReplicaUp(copy), now=world.now)
    world.sequences[copy] = 0
    assert world.run(ask(90)).replica == home
    world.store(copy, DOCUMENT)
    wait_for(world, 0.01, first=100)
    world.run(ask(110))
    assert world.run(ask(111)).replica == copy, "it has the least load of those that have the document"
    world.scheduler.check()


# Leaving a replica that is too busy


def busy_home(**switches: Any) -> tuple[World, int]:
    """The document's replica has 0.5 s of prefill queued behind it."""
    world = World(2, rebalancing=False, autoscaling=False, **switches)
    home = world.run(DOCUMENT).replica
    for number in range(5):
        assert world.submit(ask(number, 100)).replica == home
    return world, home


def test_a_replica_is_left_when_waiting_costs_more_than_computing_again() -> None:
    world, home = busy_home()
    assert world.books(home).queued_prefill_seconds == pytest.approx(0.5)
    stays = world.submit(ask(10, 10))
    assert (stays.replica, stays.reason) == (home, "exploit"), "0.5 s of waiting against 1 s of prefill"
    for number in range(11, 27):
        stays = world.submit(ask(number, 100))
    assert (stays.replica, stays.reason) == (1 - home, "relieve"), "more than twice what computing it again costs"
    assert world.books(home).queued_prefill_seconds == pytest.approx(2.0, abs=0.15)


def test_patience_counts_what_is_missed_where_the_request_would_go() -> None:
    """The runner-up misses little, but is as busy as the holder; the idle replica misses everything."""
    world = World(3, rebalancing=False, autoscaling=False, prefill_decode_balance=False)
    home = world.run(DOCUMENT).replica
    runner_up = next(one for one in range(3) if one != home)
    world.store(runner_up, DOCUMENT[:900])
    idle = 3 - home - runner_up
    for document in (tokens(700_000, 900), DOCUMENT):
        if document is not DOCUMENT:
            world.store(runner_up, document)
        for number in range(12):
            world.submit(ask(number, 100, document))
    assert world.books(idle).queued_prefill_seconds == 0
    assert world.books(home).queued_prefill_seconds == pytest.approx(1.2)
    assert world.books(runner_up).queued_prefill_seconds == pytest.approx(1.2)
    assert world.submit(ask(50)).replica == home, "1.2 s of waiting against 1 s of prefill, at a patience of 2"


def test_relief_counts_seconds_rather_than_tokens() -> None:
    world = World(2, rebalancing=False, autoscaling=False, prefill_decode_balance=False)
    fast = world.scheduler.add_replica(cost=PerToken(0.0001))
    for number in range(3):
        assert world.submit(tokens(100_000 * (number + 1), 2000)).replica == fast
    world.store(0, DOCUMENT)
    placements = [world.submit(ask(number)) for number in range(12)]
    relieved = [one.replica for one in placements if one.reason == "relieve"]
    assert relieved, "1.2 s of waiting"
    assert relieved[0] == fast, "6,000 tokens queue there, and are computed before 1,100 elsewhere"


def test_of_two_holders_a_saturated_one_gets_nothing() -> None:
    world = World(3, patience=float("inf"), rebalancing=False, autoscaling=False)
    other = world.run(tokens(500_000, 8000)).replica
    world.run(tokens(600_000, 7000))
    home = world.run(DOCUMENT).replica
    for number in range(5):
        assert world.submit(ask(number, 900)).replica == home
    world.store(other, DOCUMENT)
    assert world.load(home) < world.load(other)
    placement = world.submit(ask(10))
    assert (placement.replica, placement.reason) == (other, "exploit")


def test_endless_patience_never_leaves() -> None:
    world, home = busy_home(patience=float("inf"), late_binding=False)
    assert {world.submit(ask(number, 100)).replica for number in range(10, 60)} == {home}


# Late binding


def test_when_every_replica_is_saturated_requests_wait_in_order() -> None:
    world = World(2)
    placed = [world.submit(tokens(10_000 * number, 3000)) for number in range(1, 5)]
    assert Counter(one.replica for one in placed) == {0: 2, 1: 2}
    late = [world.try_to(tokens(10_000 * number, 100), priority=number % 2) for number in range(10, 14)]
    assert [one.reason for one in late if isinstance(one, Waiting)] == [
        "every replica is busy",
        *["others wait before it"] * 3,
    ]
    released = world.finish(placed[0])
    assert {one.replica for one in released} == {placed[0].replica}
    assert [one.request_id for one in released] == ["r6", "r8", "r5", "r7"], "priority, then age"
    world.scheduler.check()


def test_without_late_binding_nothing_waits() -> None:
    world = World(2, late_binding=False)
    assert all(isinstance(world.try_to(tokens(10_000 * n, 5000)), Placement) for n in range(1, 20))


def test_a_saturated_holder_is_left_for_a_free_replica() -> None:
    world = World(2, patience=float("inf"), rebalancing=False)
    home = world.run(DOCUMENT).replica
    big = [world.submit(ask(number, 900)) for number in range(5)]
    assert {one.replica for one in big} == {home}
    other = world.submit(ask(10))
    assert (other.replica, other.reason) == (1 - home, "relieve")


def test_a_replica_without_room_for_more_pages_gets_nothing_while_requests_queue_there() -> None:
    world = World(1, capacity_tokens=1000, cost=PerToken(0.0))
    first = [world.submit(tokens(10_000 * number, 400)) for number in range(1, 4)]
    waiting = world.try_to(tokens(90_000, 400))
    assert isinstance(waiting, Waiting)
    assert world.start(first[0]) == [], "nothing has left"
    assert [one.request_id for one in world.finish(first[0])] == [waiting.request_id]
