"""Many requests cancelled at once, while many wait: nothing is lost, and those who wait are looked at once."""

from __future__ import annotations

import pytest

from preble.sched import Finished, GlobalScheduler
from preble.sched.policies import Choice, View
from preble.sched.policies.e2 import E2

REQUESTS = 400


class Counting(E2):
    """Counts how often a request is offered the replicas."""

    looks = 0

    def choose(self, view: View) -> Choice | None:
        self.looks += 1
        return super().choose(view)


def crowded() -> tuple[GlobalScheduler, Counting, list[str], list[str]]:
    """A scheduler on whose replicas there is room for a few, its policy, who was placed and who waits."""
    policy = Counting()
    one = GlobalScheduler(2, capacity_tokens=2048, page_size=16, policy=policy)
    for number in range(REQUESTS):
        one.submit(str(number), [number + 1] * 100, now=0.0, max_tokens=100)
    waiting = one.waiting
    placed = [str(number) for number in range(REQUESTS) if str(number) not in set(waiting)]
    assert len(placed) >= 10
    assert len(waiting) >= 300
    return one, policy, placed, waiting


def test_who_leaves_the_queue_makes_no_room() -> None:
    one, policy, _, waiting = crowded()
    one.poll(0.0)
    before = policy.looks
    for name in waiting[:200]:
        assert one.cancel(name, now=0.0) == []
    assert policy.looks == before
    one.check()
    assert one.waiting == waiting[200:]


def test_the_room_of_all_who_leave_is_given_away_in_one_go() -> None:
    one, policy, placed, _ = crowded()
    before = policy.looks
    for name in placed:
        assert one.cancel(name, now=0.0, place=False) == []
    assert policy.looks == before
    refilled = one.place_waiting(now=0.0)
    assert len(refilled) == len(placed)
    assert one.place_waiting(now=0.0) == [], "nothing has happened since"
    one.check()


def test_the_room_of_all_who_finish_is_given_away_in_one_go() -> None:
    one, policy, placed, _ = crowded()
    before = policy.looks
    for name in placed:
        for replica in (0, 1):
            assert one.apply(Finished(replica, name), now=0.0, place=False) == []
    assert policy.looks == before
    assert len(one.place_waiting(now=0.0)) >= len(placed) // 2
    assert one.place_waiting(now=0.0) == [], "nothing has happened since"
    one.check()


@pytest.mark.parametrize("at_once", [True, False])
def test_who_is_cancelled_one_by_one_makes_the_same_room(at_once: bool) -> None:
    one, _, placed, _ = crowded()
    refilled = []
    for name in placed:
        refilled += one.cancel(name, now=0.0, place=at_once)
        refilled += one.place_waiting(now=0.0)
    assert len(refilled) == len(placed)
    one.check()
