"""The waiting orders: what each prefers, and that each keeps the bound it states."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble.errors import InvalidRequest
from preble.sched.cost import PiecewiseCost
from preble.sched.orders import ORDERS, WaitingOrder, find_order
from preble.sched.orders.priority_groups import group_of
from preble.sched.orders.queue import WaitingQueue, urgent_from
from preble.sched.sequence import Sequence

LINEAR = PiecewiseCost("a second per token", (0, 1), (0.0, 1.0))
NONE: frozenset[Sequence] = frozenset()


class Waiting:
    """A queue by itself, and requests for it."""

    def __init__(self, order: str) -> None:
        self.queue = WaitingQueue(ORDERS[order], LINEAR)
        self.serial = 0

    def add(
        self, length: int, *, cached: int = 0, now: float = 0.0, priority: int = 0, deadline: float | None = None
    ) -> Sequence:
        self.serial += 1
        one = Sequence(
            f"{self.serial}: {length}, {cached} cached",
            np.zeros(length, np.int32),
            prompt_length=length,
            max_length=length + 1,
            priority=priority,
            deadline=deadline,
        )
        one.serial, one.arrived, one.matched = self.serial, now, cached
        self.queue.add(one)
        return one

    def serve(self, now: float = 0.0) -> Sequence:
        one = self.queue.next(now, NONE)
        assert one is not None
        assert self.queue.next(now, NONE) is one, "asking changes nothing"
        self.queue.serve(one)
        self.queue.check()
        return one


def test_an_order_is_found_by_its_name_or_suggested() -> None:
    assert list(ORDERS) == ["hrrn", "preble", "fcfs"]
    assert all(find_order(name).name == name for name in ORDERS)
    with pytest.raises(InvalidRequest, match=r"fcfs, hrrn, preble, not 'hrn'; did you mean 'hrrn'\?"):
        find_order("hrn")
    with pytest.raises(InvalidRequest, match="not 7"):
        find_order(7)  # type: ignore[arg-type]


def test_fcfs_goes_by_age() -> None:
    waiting = Waiting("fcfs")
    expected = [waiting.add(length, cached=length // 2) for length in (50, 1, 20, 3)]
    assert [waiting.serve() for _ in expected] == expected


def test_hrrn_serves_short_work_first_and_long_work_when_it_has_waited_in_proportion() -> None:
    waiting = Waiting("hrrn")
    long, cached = waiting.add(100), waiting.add(100, cached=90)
    assert waiting.serve(now=1.0) is cached, "ten tokens to compute"
    for now in (50.0, 99.0):
        # A ratio of (50 + 100) / 100 against (6 + 10) / 10, and of (99 + 100) / 100 against (10 + 10) / 10.
        short = waiting.add(10, now=now - (6 if now == 50.0 else 10))
        assert waiting.serve(now) is short
    short = waiting.add(10, now=95.0)
    assert waiting.serve(now=100.0) is long
    assert waiting.serve(now=100.0) is short


def test_hrrn_breaks_ties_by_length_then_age() -> None:
    waiting = Waiting("hrrn")
    lengths = [30, 10, 20, 10]
    requests = [waiting.add(length) for length in lengths]
    assert [waiting.serve() for _ in lengths] == [requests[index] for index in (1, 3, 2, 0)]


@given(data=st.data())
def test_hrrn_is_never_overtaken_by_what_is_longer_and_came_later(data: st.DataObject) -> None:
    """The docstring's claim: a later one with a share s of the work overtakes only if it came early enough."""
    waiting = Waiting("hrrn")
    now = 0.0
    for _ in range(data.draw(st.integers(2, 12))):
        now += data.draw(st.sampled_from([0.0, 1.0, 7.0]))
        waiting.add(data.draw(st.integers(1, 40)), now=now)
    now += data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    chosen = waiting.serve(now)
    for other in waiting.queue:
        if other.serial < chosen.serial:
            share, waited = chosen.length / other.length, now - other.arrived
            assert share < 1
            assert chosen.arrived - other.arrived <= (1 - share) * waited + 1e-9


def test_groups_are_by_the_share_that_is_cached() -> None:
    waiting = Waiting("preble")
    groups = [group_of(waiting.add(100, cached=cached)) for cached in (0, 1, 10, 11, 20, 55, 90, 91, 99)]
    assert groups == [0, 0, 0, 1, 1, 5, 8, 9, 9]


def test_a_round_serves_the_groups_in_proportion_and_each_by_age() -> None:
    waiting = Waiting("preble")
    requests: dict[int, list[Sequence]] = {group: [] for group in range(10)}
    for number in range(600):
        group = number % 10
        requests[group].append(waiting.add(100, cached=10 * group + 5))
    served = [waiting.serve() for _ in range(54)]
    assert [group_of(one) for one in served] == [group for group in range(9, 0, -1) for _ in range(group + 1)]
    # The 55th turn is the oldest's, whatever its group; here group 0 has it, and its own turn comes next.
    assert [waiting.serve() for _ in range(2)] == requests[0][:2]
    for group in range(1, 10):
        assert [one for one in served if group_of(one) == group] == requests[group][: group + 1]
    second = [waiting.serve() for _ in range(20)]
    assert [group_of(one) for one in second] == [9] * 10 + [8] * 9 + [7]


def test_groups_that_have_nobody_leave_their_share_to_the_others() -> None:
    waiting = Waiting("preble")
    low = [waiting.add(100) for _ in range(5)]
    high = [waiting.add(100, cached=35) for _ in range(9)]
    served = [waiting.serve() for _ in range(14)]
    assert served == [*high[:4], low[0], *high[4:8], low[1], high[8], *low[2:]]


def test_a_request_whose_hit_ratio_changes_moves() -> None:
    waiting = Waiting("preble")
    first, second = waiting.add(100), waiting.add(100)
    second.matched = 60
    waiting.queue.update(second)
    waiting.queue.check()
    assert [waiting.serve(), waiting.serve()] == [second, first]


@pytest.mark.parametrize("order", ORDERS)
def test_higher_classes_go_first_whatever_the_order(order: str) -> None:
    waiting = Waiting(order)
    requests = {priority: waiting.add(10, cached=5 - priority, priority=priority) for priority in (0, 5, -3, 2)}
    assert list(waiting.queue) == [requests[priority] for priority in (5, 2, 0, -3)]
    assert [waiting.serve() for _ in range(4)] == [requests[priority] for priority in (5, 2, 0, -3)]
    assert len(waiting.queue) == 0
    assert waiting.queue.next(0.0, NONE) is None


@pytest.mark.parametrize("order", ORDERS)
def test_pressing_deadlines_go_first_in_their_class_and_take_nobodys_turn(order: str) -> None:
    waiting = Waiting(order)
    requests = [waiting.add(10) for _ in range(3)]
    late, early = waiting.add(50, deadline=12.0), waiting.add(50, now=4.0, deadline=8.0)
    assert (urgent_from(late), urgent_from(early)) == (3.0, 5.0)
    calm = Waiting(order)
    assert [waiting.serve(now=5.0) for _ in range(2)] == [early, late]
    expected = [calm.add(10) for _ in range(3)]
    assert [one.serial for one in (waiting.serve(5.0), waiting.serve(5.0))] == [one.serial for one in expected[:2]]
    assert list(waiting.queue) == requests[2:]


def test_pressing_deadlines_do_not_bring_the_turn_of_the_oldest_nearer() -> None:
    waiting = Waiting("hrrn")
    oldest = waiting.add(1000)
    for _ in range(100):
        waiting.add(1, deadline=0.0)
    shorter = [waiting.add(10) for _ in range(20)]
    served = [waiting.serve() for _ in range(116)]
    assert served[100:115] == shorter[:15]
    assert served[115] is oldest


def test_a_deadline_that_has_passed_presses_at_once() -> None:
    waiting = Waiting("fcfs")
    waiting.add(1)
    over = waiting.add(1, now=10.0, deadline=3.0)
    assert waiting.serve(now=10.0) is over


class Watch:
    """Counts, for every waiting request, what its bound is made of."""

    def __init__(self, order: str) -> None:
        self.waiting = Waiting(order)
        self.every = ORDERS[order].oldest_every
        self.before: dict[Sequence, int] = {}
        """Older requests that waited when this one came or came back later, plus those it let pass."""
        self.admissions: dict[Sequence, int] = {}

    def add(self, one: Sequence) -> None:
        """`one` is in the queue now."""
        peers = [other for other in self.before if other.priority == one.priority]
        self.before[one] = sum(other.serial < one.serial for other in peers)
        self.admissions[one] = 0
        for other in peers:
            self.before[other] += one.serial < other.serial

    def serve(self, now: float, passing: frozenset[Sequence] = NONE) -> Sequence | None:
        queue = self.waiting.queue
        chosen = queue.next(now, passing)
        if chosen is None:
            assert passing >= set(queue)
            return None
        assert chosen not in passing
        queue.serve(chosen)
        queue.check()
        del self.before[chosen]
        turn = urgent_from(chosen) > now
        del self.admissions[chosen]
        for other in self.before:
            if other.priority == chosen.priority:
                self.before[other] += other in passing
                self.admissions[other] += turn
                assert self.admissions[other] < self.every * (self.before[other] + 1), "it waited beyond the bound"
        return chosen


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), few=st.booleans(), steps=st.integers(1, 400))
def test_nobody_waits_beyond_the_bound(order: str, seed: int, few: bool, steps: int) -> None:
    """Arrivals, hit ratios, deadlines, deferrals and preemptions at random, in two classes."""
    watch = Watch(order)
    rng = random.Random(seed)
    now = 0.0
    served: list[Sequence] = []
    for _ in range(steps):
        now += rng.random()
        for _ in range(rng.randrange(3)):
            length = rng.choice([1, 3, 40])
            deadline = now + rng.uniform(0, 60) if rng.random() < 0.1 else None
            watch.add(
                watch.waiting.add(
                    length, cached=rng.randrange(length), now=now, priority=rng.randrange(2), deadline=deadline
                )
            )
        members = list(watch.waiting.queue)
        for one in rng.sample(members, min(len(members), 5)):
            one.matched = rng.randrange(one.length)
            watch.waiting.queue.update(one)
        if few:
            while len(watch.before) > 2:
                watch.serve(now)
        passing = frozenset(rng.sample(members, min(len(members), rng.randrange(4)))) & frozenset(watch.before)
        chosen = watch.serve(now, passing)
        if chosen is not None:
            served.append(chosen)
        if served and rng.random() < 0.1:  # preempted
            back = served.pop(rng.randrange(len(served)))
            watch.waiting.queue.add(back)
            watch.add(back)


Adversary = Callable[[Waiting, Sequence, float], None]


def shorter_ones(waiting: Waiting, victim: Sequence, now: float) -> None:
    """Overload: more of the shortest work than can be served."""
    for _ in range(2):
        waiting.add(1, now=now)


def better_hits(waiting: Waiting, victim: Sequence, now: float) -> None:
    """Every newcomer is cached but for its last token."""
    for _ in range(2):
        waiting.add(100, cached=99, now=now)


def missed_turns(waiting: Waiting, victim: Sequence, now: float) -> None:
    """All groups are full, and the victim always leaves the one that is about to be served."""
    for group in range(10):
        waiting.add(100, cached=10 * group + 5, now=now)
    chosen = waiting.queue.next(now, NONE)
    if chosen is victim:
        victim.matched = 95 if victim.matched < 50 else 5
        waiting.queue.update(victim)


@pytest.mark.parametrize("adversary", [shorter_ones, better_hits, missed_turns])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("older", [0, 3])
def test_the_bound_holds_against_lasting_overload(order: str, adversary: Adversary, older: int) -> None:
    waiting = Waiting(order)
    for _ in range(older):
        waiting.add(1000)
    victim = waiting.add(1000)
    bound = ORDERS[order].oldest_every * (older + 1)
    for admission in range(1, bound + 1):
        adversary(waiting, victim, float(admission))
        if waiting.serve(now=float(admission)) is victim:
            return
    pytest.fail(f"not among the next {bound} admissions")


@pytest.mark.parametrize("order", ORDERS)
def test_the_bound_is_not_much_larger_than_needed(order: str) -> None:
    """In the worst case a request does wait for about as long as its bound allows."""
    waiting = Waiting(order)
    victim = waiting.add(1000)
    admissions = 0
    for now in range(1000):
        (missed_turns if order == "preble" else shorter_ones)(waiting, victim, float(now))
        admissions += 1
        if waiting.serve(now=float(now)) is victim:
            break
    assert admissions == ORDERS[order].oldest_every


@pytest.mark.parametrize("order", ORDERS)
def test_what_left_out_of_turn_is_forgotten(order: str) -> None:
    waiting = Waiting(order)
    requests = [waiting.add(length, deadline=length if length % 2 else math.inf) for length in range(1, 150)]
    for one in requests[::3]:
        assert one in waiting.queue
        waiting.queue.remove(one)
        assert one not in waiting.queue
        waiting.queue.check()
    left = [one for index, one in enumerate(requests) if index % 3]
    assert sorted((waiting.serve(now=1.0) for _ in left), key=lambda one: one.serial) == left


def test_an_order_of_ones_own_takes_the_protocol() -> None:
    """Whatever `next` prefers, the queue keeps its turns for the oldest."""

    class Longest(WaitingOrder):
        name = "longest"
        oldest_every = 4

        def __init__(self, cost: object) -> None:
            self.here: list[Sequence] = []

        def add(self, sequence: Sequence) -> None:
            self.here.append(sequence)

        def remove(self, sequence: Sequence) -> None:
            self.here.remove(sequence)

        def update(self, sequence: Sequence) -> None:
            pass

        def next(self, now: float, passing: object) -> Sequence | None:
            return max(self.here, key=lambda one: one.length)

        def check(self, waiting: list[Sequence]) -> None:
            assert set(self.here) == set(waiting)

    waiting = Waiting("fcfs")
    waiting.queue = WaitingQueue(Longest, LINEAR)
    for length in range(1, 9):
        waiting.add(length)
    assert [waiting.serve().length for _ in range(8)] == [8, 7, 6, 1, 5, 4, 3, 2]
