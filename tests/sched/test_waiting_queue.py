"""The cluster's queue by itself: who is offered the replicas, in what order, and for how long at most one is passed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.sched.request import Request
from preble.sched.waiting import LOOKED_UP, OFFERED, OLDEST_EVERY, WaitingQueue


def request(
    number: int,
    *,
    submitted: float = 0.0,
    service: float = 1.0,
    priority: int = 0,
    deadline: float | None = None,
) -> Request:
    one = Request(
        f"r{number}",
        np.array([1], np.int32),
        max_tokens=1,
        namespace="",
        priority=priority,
        deadline=deadline,
        session=None,
        hint=None,
        number=number,
        submitted=submitted,
    )
    one.service_seconds = service
    return one


def queue(*requests: Request) -> WaitingQueue:
    one = WaitingQueue()
    for each in requests:
        one.push(each)
    return one


def offered(one: WaitingQueue, now: float = 10.0) -> list[int]:
    """The numbers of those who are offered the replicas where nobody can take them."""
    return [each.number for each in one.offers(now)]


def serve(one: WaitingQueue, count: int, now: float = 10.0) -> list[int]:
    """So many times the first one that is offered a replica takes it."""
    served = []
    for _ in range(count):
        first = next(one.offers(now))
        one.serve(first)
        served.append(first.number)
    return served


# The order


def test_in_turn_serves_by_priority_then_deadline_then_age() -> None:
    one = queue(
        request(0), request(1, deadline=9.0), request(2, priority=1), request(3, deadline=8.0), request(4, priority=1)
    )
    order = [2, 4, 3, 1, 0]
    assert [each.number for each in one] == order
    served = []
    for first in one.in_turn():
        one.serve(first)
        served.append(first.number)
    assert served == order
    assert one.empty


def test_in_turn_repeats_one_that_was_not_served() -> None:
    turns = queue(request(0), request(1)).in_turn()
    assert [next(turns).number, next(turns).number] == [0, 0]


def test_the_highest_response_ratio_comes_first() -> None:
    """Waited 10, 9 and 1 s for 5, 3 and 0.1 s: 2, 3 and 10 times as long."""
    one = queue(
        request(0, submitted=0.0, service=5.0),
        request(1, submitted=1.0, service=3.0),
        request(2, submitted=9.0, service=0.1),
    )
    assert offered(one) == [2, 1, 0]
    assert offered(one, now=9.0) == [1, 0, 2], "the third has just come"
    assert [each.number for each in one] == [0, 1, 2], "which is not the order of urgency"


def test_equals_by_ratio_are_offered_by_age() -> None:
    assert offered(queue(request(2, service=2.0), request(0, service=2.0), request(1, service=2.0))) == [0, 1, 2]
    halves = [request(3, submitted=0.0, service=4.0), request(1, submitted=5.0, service=2.0)]
    assert offered(queue(*halves)) == [1, 3]


def test_priority_comes_before_everything_else() -> None:
    one = queue(request(0, service=0.01), request(1, deadline=10.0), request(2, priority=1, service=1e6))
    assert offered(one) == [2, 1, 0]


def test_deadlines_press_after_a_quarter_of_their_time() -> None:
    """Deadlines in 40 and 44 s: the second one presses a second later."""
    one = queue(request(0, service=0.1), request(1, deadline=44.0), request(2, deadline=40.0))
    for now, order in ((9.9, [0, 1, 2]), (10.0, [2, 0, 1]), (10.9, [2, 0, 1]), (11.0, [2, 1, 0])):
        assert offered(one, now) == order, now


def test_a_deadline_presses_from_when_the_request_came() -> None:
    one = queue(request(0, service=0.1), request(1, submitted=8.0, deadline=16.0))
    assert offered(one, 9.9) == [0, 1]
    assert offered(one, 10.0) == [1, 0]
    late = queue(request(0, service=0.1), request(1, submitted=8.0, deadline=5.0))
    assert offered(late, 8.0) == [1, 0], "it was too late already"


# Few at a time


def many(count: int) -> WaitingQueue:
    """The later, the longer they take: the first ones have the highest ratio."""
    return queue(*(request(number, service=1.0 + number) for number in range(count)))


@pytest.mark.parametrize("count", [1, OFFERED - 1, OFFERED])
def test_a_few_are_all_offered(count: int) -> None:
    one = many(count)
    for _ in range(3):
        assert offered(one) == list(range(count))


def test_of_many_the_best_are_offered_and_others_looked_up() -> None:
    one = many(200)
    for _ in range(60):  # more than a round
        found = offered(one)
        assert found[:32] == list(range(32))
        assert len(found) == len(set(found)) <= 32 + 4


@pytest.mark.parametrize("count", [OFFERED + 1, 100, 101, 102, 103])
def test_everybody_gets_looked_up_in_turn(count: int) -> None:
    one = many(count)
    seen: set[int] = set()
    for _ in range(math.ceil(count / LOOKED_UP)):
        seen.update(offered(one))
    assert seen == set(range(count))
    again: set[int] = set()
    for _ in range(count):  # a round may begin behind the last few
        again.update(offered(one))
    assert again == seen


def test_looking_up_goes_on_when_the_queue_became_short() -> None:
    one = many(120)
    for _ in range(25):
        offered(one)
    for each in list(one)[:80]:
        one.remove(each)
    seen: set[int] = set()
    for _ in range(40):
        seen.update(offered(one))
    assert seen == set(range(80, 120))


# The oldest


def aged(count: int) -> Iterator[Request]:
    """Number 0 is the oldest, and the last to be served by its ratio."""
    yield request(0, service=1e9)
    for number in range(1, count):
        yield request(number)


def test_every_so_many_turns_the_oldest_comes_first_and_insists() -> None:
    one = queue(*aged(200))
    oldest = next(iter(one))
    assert serve(one, OLDEST_EVERY - 1) == list(range(1, OLDEST_EVERY))
    assert not oldest.insists
    assert offered(one).count(0) == 1
    assert oldest.insists
    assert serve(one, OLDEST_EVERY) == [0, *range(OLDEST_EVERY, 2 * OLDEST_EVERY - 1)]
    assert [each.number for each in one if each.insists] == []
    assert serve(one, 1) == [2 * OLDEST_EVERY - 1], "its turn has come, and it insists"


def test_a_turn_that_begins_among_the_offers_is_the_oldests() -> None:
    """Several may be served at a time."""
    one = queue(*aged(200))
    serve(one, OLDEST_EVERY - 5)
    served = []
    for each in one.offers(10.0):
        one.serve(each)
        served.append(each.number)
    expected = list(range(OLDEST_EVERY - 4, OLDEST_EVERY - 4 + OFFERED))
    assert served[:4] == expected[:4]
    assert served[4] == 0
    assert served[5 : OFFERED + 1] == expected[4:]


def test_the_oldest_that_was_offered_before_is_asked_again_in_its_turn() -> None:
    one = queue(*(request(number, service=1.0 + number) for number in range(6)))
    one._turns = OLDEST_EVERY - 3
    order = []
    for each in one.offers(10.0):
        order.append((each.number, each.insists))
        if each.number or each.insists:  # the oldest waits for a replica unless it insists
            one.serve(each)
    assert order == [(0, False), (1, False), (2, False), (0, True), (3, False), (4, False), (5, False)]
    assert one.empty


def test_the_oldest_comes_once_though_it_was_not_served() -> None:
    one = many(5)
    one._turns = OLDEST_EVERY - 1
    for _ in range(2):
        assert offered(one) == [0, 1, 2, 3, 4]


def test_it_is_the_oldest_of_the_highest_priority() -> None:
    """Whatever the deadlines."""
    one = queue(
        request(0),
        request(1, priority=1, service=1e9),
        request(2, priority=1, deadline=1.0),
        request(3, priority=1, service=0.1),
    )
    one._turns = OLDEST_EVERY - 1
    assert offered(one) == [1, 2, 3, 0]
    assert [each.number for each in one if each.insists] == [1]


def test_turns_count_those_who_were_served_not_those_who_left() -> None:
    one = queue(*aged(300))
    serve(one, OLDEST_EVERY - 2)
    for each in [each for each in one if each.number >= 250]:
        one.remove(each)
    assert serve(one, 2) == [OLDEST_EVERY - 1, 0]


def test_who_comes_back_insists_no_more() -> None:
    one = many(3)
    one._turns = OLDEST_EVERY - 1
    (first, *_) = one.offers(10.0)
    assert first.insists
    one.serve(first)
    one.push(first)
    assert not first.insists
    assert [each.number for each in one] == [0, 1, 2], "it kept its age"


@given(
    older=st.integers(0, 6),
    served_before=st.integers(0, 200),
    per_offer=st.integers(1, 40),
    arrivals=st.integers(0, 3),
    refused=st.sets(st.integers(0, 6)),
    lower=st.integers(0, 40),
    cancelled=st.integers(0, 40),
)
def test_nobody_waits_longer_than_for_so_many_turns(
    older: int, served_before: int, per_offer: int, arrivals: int, refused: set[int], lower: int, cancelled: int
) -> None:
    """The worst case: it takes very long, finds `older` ones as bad, and there are always others that take no time.
    Some of them wait for a replica of their choice unless they insist; some of lower priority are older; some leave."""
    one = WaitingQueue()
    number = 0

    def come(service: float, priority: int = 1) -> Request:
        nonlocal number
        number += 1
        each = request(number, service=service, priority=priority)
        one.push(each)
        return each

    for _ in range(lower):
        come(1e-6, priority=0)
    for _ in range(served_before):
        come(1e-6)
        one.serve(next(one.offers(10.0)))
    stubborn = {come(1e9).number for place in range(older) if place in refused}
    for _ in range(older - len(stubborn)):
        come(1e9)
    last = come(1e9)
    if older in refused:
        stubborn.add(last.number)
    for _ in range(OFFERED + per_offer):
        come(1e-6)
    for _ in range(cancelled):
        one.remove(come(1e-6))
    turns = 0
    while last in set(one):
        served = 0
        for each in one.offers(10.0):
            if each.number in stubborn and not each.insists:
                continue
            one.serve(each)
            served += 1
            turns += 1
            if each is last:
                break
            for _ in range(arrivals):
                come(1e-6)
            if served == per_offer:
                break
        while sum(1 for _ in one) < OFFERED + per_offer:
            come(1e-6)
        assert turns <= OLDEST_EVERY * (older + 1)
