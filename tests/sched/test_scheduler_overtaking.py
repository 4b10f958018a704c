"""The global scheduler where requests wait in the cluster and overtake each other, case by case."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from preble.sched import (
    E2,
    Admitted,
    Choice,
    Evicted,
    Finished,
    GlobalScheduler,
    Placement,
    Progressed,
    ReplicaDown,
    ReplicaUp,
    StepTimed,
    Stored,
    View,
    Waiting,
)
from preble.sched.hashing import page_hashes
from preble.sched.testing import TokenCost

PAGE = 10


class Counting(E2):
    """Counts how often it is asked."""

    asked = 0

    def choose(self, view: View) -> Choice | None:
        self.asked += 1
        return super().choose(view)


def scheduler(replicas: int = 1, *, policy: E2 | None = None, capacity_tokens: int = 100_000) -> GlobalScheduler:
    """Steps of 100 tokens take 1 s: a replica with more than 200 to compute has no room."""
    return GlobalScheduler(
        replicas,
        capacity_tokens=capacity_tokens,
        page_size=PAGE,
        max_batched_tokens=100,
        policy=policy or E2(),
        cost=TokenCost(0.01),
    )


def tokens(start: int, count: int) -> list[int]:
    return list(range(1000 * start, 1000 * start + count))


def names(prompt: list[int]) -> np.ndarray:
    return page_hashes(np.array(prompt, np.int32), PAGE)


def placed(answer: Placement | Waiting) -> Placement:
    assert isinstance(answer, Placement)
    return answer


def where(placements: list[Placement]) -> dict[str, int]:
    return {one.request_id: one.replica for one in placements}


def busy() -> GlobalScheduler:
    """One replica with 300 tokens to compute, for which another request waits."""
    one = scheduler()
    placed(one.submit("a", tokens(1, 300), now=0.0))
    assert isinstance(one.submit("b", tokens(2, 100), now=0.0), Waiting)
    return one


def faithful(policy: E2 | None = None) -> tuple[GlobalScheduler, int, int]:
    """A request waits for the replica that has all of its 900 tokens, while the other one is idle. Before it there is
    one that decodes and one with 300 tokens to compute."""
    one = scheduler(2, policy=policy)
    holder = placed(one.submit("first", tokens(3, 900), now=0.0)).replica
    one.apply(Admitted(holder, "first", 0), now=0.0)
    one.apply(Stored(holder, 1, "", names(tokens(3, 900))), now=0.0)
    one.apply(Progressed(holder, "first", 900, (7,)), now=0.0)
    assert placed(one.submit("second", [*tokens(3, 900), *tokens(4, 300)], now=0.0)).replica == holder
    assert isinstance(one.submit("faithful", [*tokens(3, 900), 1, 2, 3], now=0.0), Waiting)
    return one, holder, 1 - holder


# Overtaking


def test_a_long_prompt_is_overtaken_by_a_short_one_and_both_end() -> None:
    one = scheduler()
    placed(one.submit("a", tokens(1, 300), now=0.0))
    assert one.submit("long", tokens(20, 5000), now=0.0) == Waiting("long", "every replica is busy")
    assert one.submit("short", tokens(3, 250), now=2.0) == Waiting("short", "others wait before it")
    assert one.waiting == ["long", "short"]
    assert where(one.apply(Finished(0, "a"), now=5.0)) == {"short": 0}
    assert one.waiting == ["long"]
    one.check()
    assert where(one.apply(Finished(0, "short"), now=8.0)) == {"long": 0}
    assert one.apply(Finished(0, "long"), now=60.0) == []
    assert not one.waiting
    assert one.in_flight(0) == []
    one.check()


def test_one_that_waited_long_enough_is_overtaken_no_more() -> None:
    """5,000 tokens take 50 s, 250 take 2.5 s: after 100 and 4 s the ratios are 3 and 2.6."""
    one = scheduler()
    placed(one.submit("a", tokens(1, 300), now=0.0))
    one.submit("long", tokens(20, 5000), now=0.0)
    one.submit("short", tokens(3, 250), now=96.0)
    assert where(one.apply(Finished(0, "a"), now=100.0)) == {"long": 0}


def test_the_ratio_is_that_of_what_is_missed() -> None:
    """Most of the longer prompt is cached: it takes 0.5 s, the other one 3 s."""
    one = scheduler()
    placed(one.submit("a", tokens(3, 900), now=0.0))
    one.submit("whole", tokens(20, 300), now=0.0)
    one.submit("cached", [*tokens(3, 900), *tokens(5, 250)], now=0.0)
    assert [one._requests[name].service_seconds for name in ("whole", "cached")] == pytest.approx([3.0, 2.5])
    assert where(one.apply(Progressed(0, "a", 900, (7,)), now=1.0)) == {"cached": 0}


def test_several_are_placed_until_nobody_has_room() -> None:
    policy = Counting()
    one = scheduler(policy=policy)
    placed(one.submit("a", tokens(1, 300), now=0.0))
    for number in range(9):
        one.submit(f"r{number}", tokens(10 + number, 90), now=0.0)
    policy.asked = 0
    assert list(where(one.cancel("a", now=1.0))) == ["r0", "r1", "r2"]
    assert one.waiting == [f"r{number}" for number in range(3, 9)]
    assert policy.asked == 3, "nor is anybody else asked then"


def test_one_that_cannot_be_served_does_not_hold_up_those_behind_it() -> None:
    one, holder, other = faithful()
    assert placed(one.submit("new", tokens(30, 50), now=1.0)).replica == other
    assert one.waiting == ["faithful"]
    assert placed(one.submit("filler", tokens(31, 300), now=1.0)).replica == other
    assert isinstance(one.submit("behind", tokens(32, 250), now=1.0), Waiting)
    assert where(one.apply(Finished(other, "filler"), now=1.5)) == {"behind": other}
    assert one.waiting == ["faithful"]
    assert where(one.apply(Admitted(holder, "second", 1150), now=2.0)) == {"faithful": holder}


def test_late_binding_may_be_switched_off() -> None:
    one = scheduler(policy=E2(late_binding=False))
    for number in range(5):
        placed(one.submit(str(number), tokens(number, 900), now=0.0))


def test_the_oldests_turn_takes_any_room_and_is_over_when_its_replica_is_lost() -> None:
    one, holder, other = faithful()
    one._waiting._turns = 63
    (placement,) = one.poll(1.0)
    assert (placement.request_id, placement.replica, placement.reason) == ("faithful", other, "replicate")
    assert one._requests["faithful"].insists
    assert one.apply(ReplicaDown(other), now=2.0) == []
    assert one.waiting == ["faithful"]
    assert not one._requests["faithful"].insists
    assert one.apply(ReplicaUp(other), now=3.0) == [], "it waits for the holder again"
    assert where(one.apply(Finished(holder, "second"), now=4.0)) == {"faithful": holder}
    one.check()


# Explanations


def test_what_is_explained_while_others_wait_is_what_happens() -> None:
    one, holder, other = faithful()
    for name, prompt, expected in (
        ("new", tokens(30, 50), other),
        ("another", [*tokens(3, 900), 4, 5], None),
        ("third", tokens(40, 5), other),
        ("none", tokens(3, 900), None),
    ):
        before = one.explain(prompt, now=1.0)
        answer = one.submit(name, prompt, now=1.0)
        assert before.replica == expected
        assert (before.replica, before.reason) == (getattr(answer, "replica", None), answer.reason)
    assert before.reason == "others wait before it"
    assert before.candidates[holder].costs["score_seconds"] < before.candidates[other].costs["score_seconds"]
    assert one.waiting == ["faithful", "another", "none"]


# What makes placements possible


@pytest.mark.parametrize(
    "happens",
    [
        lambda one: one.apply(Admitted(0, "a", 100), now=1.0),
        lambda one: one.apply(Finished(0, "a"), now=1.0),
        lambda one: one.apply(Progressed(0, "a", 100, ()), now=1.0),
        lambda one: one.apply(Progressed(0, "a", 300, (7,)), now=1.0),
        lambda one: one.cancel("a", now=1.0),
    ],
    ids=["admitted", "finished", "prefill", "first token", "cancel"],
)
def test_a_waiting_request_is_placed_when(happens: Callable[[GlobalScheduler], list[Placement]]) -> None:
    one = busy()
    assert one.poll(0.5) == []
    assert where(happens(one)) == {"b": 0}
    one.check()


def test_too_little_progress_leaves_it_waiting() -> None:
    one = busy()
    assert one.apply(Progressed(0, "a", 99, ()), now=1.0) == []
    assert where(one.apply(Progressed(0, "a", 100, ()), now=1.0)) == {"b": 0}


def test_one_goes_elsewhere_when_the_replica_it_waits_for_is_lost() -> None:
    one, holder, other = faithful()
    back = where(one.apply(ReplicaDown(holder), now=1.0))
    assert back["faithful"] == other
    assert {"first", "second", "faithful"} == back.keys() | set(one.waiting)
    one.check()


def test_one_goes_elsewhere_when_the_replica_it_waits_for_drains_or_leaves() -> None:
    one, holder, other = faithful()
    drained = one.drain(holder, now=1.0)
    assert drained.request_ids == ("second",), "it works on the first"
    assert where(drained.placements)["faithful"] == other
    one, holder, other = faithful()
    removed = one.remove_replica(holder, now=1.0)
    assert removed.request_ids == ("first", "second")
    assert where(removed.placements)["faithful"] == other


def test_a_replica_that_comes_back_takes_those_who_wait() -> None:
    one = scheduler()
    one.apply(ReplicaDown(0), now=0.0)
    for number in range(2):
        assert one.submit(str(number), tokens(number, 150), now=0.0) == Waiting(str(number), "no replica is up")
    assert where(one.apply(ReplicaUp(0), now=1.0)) == {"0": 0, "1": 0}


def test_a_new_replica_takes_those_who_wait() -> None:
    one = busy()
    number = one.add_replica()
    assert where(one.poll(1.0)) == {"b": number}
    one = busy()
    one.add_replica()
    assert where(one.apply(Stored(0, 1, "", names(tokens(1, 300))), now=1.0)) == {"b": number}, "or the next event"


def test_steps_that_prove_short_make_room_at_the_next_poll() -> None:
    one = busy()
    for _ in range(50):
        assert one.apply(StepTimed(0, 100, 0, 100, 0.001, 10_000), now=0.5) == []
    assert where(one.poll(1.0)) == {"b": 0}


def test_what_matters_to_nobody_is_no_reason_to_ask() -> None:
    policy = Counting()
    one, holder, other = faithful(policy)
    one.poll(1.0)
    policy.asked = 0
    for number in range(5):
        assert one.apply(Progressed(holder, "first", 901 + number, (7,)), now=1.0) == []
    one.apply(Stored(holder, 2, "", names([*tokens(3, 900), *tokens(4, 100)])[90:]), now=1.0)
    one.apply(Evicted(holder, 3, "", names([*tokens(3, 900), *tokens(4, 100)])[90:]), now=1.0)
    one.apply(StepTimed(holder, 100, 1, 1000, 1.0), now=1.0)
    one.apply(Finished(other, "nobody here"), now=1.0)
    one.apply(Admitted(other, "nobody here", 0), now=1.0)
    one.apply(Progressed(other, "nobody here", 5, (7,)), now=1.0)
    assert policy.asked == 0
    one.apply(Progressed(holder, "second", 920, ()), now=1.0)
    assert policy.asked == 1, "prefill may make room"
    one.apply(Progressed(holder, "first", 906, (7,)), now=1.0)
    assert policy.asked == 1, "that was answered"
    one.poll(1.0)
    assert policy.asked == 2


def test_nobody_is_asked_where_nobody_has_room() -> None:
    policy = Counting()
    one = scheduler(policy=policy)
    placed(one.submit("a", tokens(1, 900), now=0.0))
    one.submit("b", tokens(2, 100), now=0.0)
    policy.asked = 0
    one.apply(Progressed(0, "a", 100, ()), now=1.0)
    one.poll(1.0)
    assert policy.asked == 0


def test_where_nobody_overtakes_every_event_is_a_reason() -> None:
    class Patient(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.overtakes = False

    policy = Patient()
    one, holder, _ = faithful(policy)
    one.poll(1.0)
    policy.asked = 0
    one.apply(Progressed(holder, "first", 901, (7,)), now=1.0)
    assert policy.asked == 1
    assert isinstance(one.submit("new", tokens(30, 50), now=1.0), Waiting), "others wait before it"


# What must be computed again


@pytest.mark.parametrize("uses", [2, 5])
def test_what_is_evicted_counts_half_and_once(uses: int) -> None:
    """Room for 1,200 tokens, of which 1,000 are cached. 400 tokens and an output need 41 pages: 21 must go, 2.1 s."""
    one = scheduler(capacity_tokens=1200)
    for number in range(uses):
        placed(one.submit(str(number), tokens(10, 1000), now=0.0))
        one.apply(Stored(0, number + 1, "", names(tokens(10, 1000))), now=0.0)
        one.apply(Finished(0, str(number)), now=0.0)

    def lost(count: int) -> float:
        (candidate,) = one.explain(tokens(20, count), now=0.0, expected_tokens=1).candidates
        return candidate.costs["eviction_seconds"]

    assert lost(400) == pytest.approx(2.1 / 2)
    assert lost(190) == 0, "there is room"
    assert lost(200) == pytest.approx(0.1 / 2)
    assert lost(5000) == pytest.approx(10.0 / 2), "more than all of it cannot go"
    one.poll(200.0)
    one.apply(Evicted(0, 99, "", names(tokens(10, 1000))[99:]), now=200.0)
    assert lost(400) == 0, "nobody used it within the window"
