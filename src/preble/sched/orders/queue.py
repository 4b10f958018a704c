"""A replica's waiting queue: priority classes, deadlines, and an order within."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Set
from typing import Any

from preble.sched.cost import CostModel
from preble.sched.invariants import require
from preble.sched.orders.base import WaitingOrder
from preble.sched.orders.fcfs import by_age, take_out
from preble.sched.sequence import Sequence

URGENT_AFTER = 0.25
"""A request becomes urgent when this share of the time to its deadline has passed since it came."""


def by_urgency(sequence: Sequence) -> tuple[float, int]:
    """The key by which whoever becomes urgent first comes first, and of equal ones the oldest."""
    return urgent_from(sequence), sequence.serial


def urgent_from(sequence: Sequence) -> float:
    """When the request becomes urgent, in seconds on the caller's clock; infinity without a deadline."""
    return sequence.arrived + max(URGENT_AFTER * (sequence.deadline - sequence.arrived), 0.0)


def by_deadline(sequence: Sequence) -> tuple[float, int]:
    """The key by which the earliest deadline comes first, and of equal ones the oldest."""
    return sequence.deadline, sequence.serial


class WaitingQueue:
    """Who is served next: the highest priority first; within a class the urgent ones by deadline, then the others as
    the order says.

    A request with a deadline is urgent once a quarter of its time has passed. Until then it is one like the others:
    were all deadlines to go first, an application that sets a timeout on everything would have no other order left.

    Within a class, one of every `oldest_every` turns of the order goes to the oldest request instead. That bounds every
    wait: of the admissions of its class, urgent ones not counted, a request is among the next `oldest_every` x (m + 1),
    m being the older requests waiting when it came, plus those that came back by preemption, plus those it let pass
    itself (the scheduler limits these).
    """

    def __init__(self, order: type[WaitingOrder], cost: CostModel) -> None:
        self.order = order
        self._cost = cost
        self._classes: dict[int, _PriorityClass] = {}
        self._highest_last: list[int] = []

    def __len__(self) -> int:
        return sum(len(known) for known in self._classes.values())

    def __contains__(self, sequence: Sequence) -> bool:
        known = self._classes.get(sequence.priority)
        return known is not None and sequence in known

    def __iter__(self) -> Iterator[Sequence]:
        """By priority, then by age, whatever the order."""
        for priority in reversed(self._highest_last):
            yield from self._classes[priority].oldest_first

    def add(self, sequence: Sequence) -> None:
        """Queue a request whose `serial`, `arrived` and `matched` are set."""
        known = self._classes.get(sequence.priority)
        if known is None:
            known = self._classes[sequence.priority] = _PriorityClass(self.order(self._cost))
            insort(self._highest_last, sequence.priority)
        known.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a request that is here."""
        known = self._classes[sequence.priority]
        known.remove(sequence)
        if not len(known):
            del self._classes[sequence.priority]
            del self._highest_last[bisect_left(self._highest_last, sequence.priority)]

    def expired(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed."""
        return [one for known in self._classes.values() for one in known.expired(now)]

    def update(self, sequence: Sequence) -> None:
        """The `matched` of a request that is here may have changed."""
        self._classes[sequence.priority].order.update(sequence)

    def next(self, now: float, passing: Set[Sequence]) -> Sequence | None:
        """Who is to be served now, were those in `passing` not there; `None` if nobody is left."""
        for priority in reversed(self._highest_last):
            chosen = self._classes[priority].next(now, passing)
            if chosen is not None:
                return chosen
        return None

    def serve(self, sequence: Sequence) -> None:
        """Take out what `next` returned, as its turn."""
        self._classes[sequence.priority].served(sequence)
        self.remove(sequence)

    def check(self) -> None:
        """Prove from scratch that every request is where it belongs."""
        require(self._highest_last == sorted(self._classes), "waiting: the priority classes are out of order")
        for priority, known in self._classes.items():
            require(len(known) > 0, f"waiting: class {priority} is empty and still known")
            require(all(one.priority == priority for one in known.oldest_first), f"waiting: wrong class {priority}")
            known.check()


class _PriorityClass:
    """The waiting requests of one priority."""

    def __init__(self, order: WaitingOrder) -> None:
        self.order = order
        self.oldest_first: list[Sequence] = []
        self._turns = 0
        """Served since somebody waits in this class, urgent ones not counted."""
        self._calm: list[Sequence] = []
        """Those with a deadline that are not urgent yet, the first to become so first."""
        self._urgent: list[Sequence] = []
        """By deadline."""

    def __len__(self) -> int:
        return len(self.oldest_first)

    def __contains__(self, sequence: Sequence) -> bool:
        return _is_in(self.oldest_first, sequence, by_age)

    def add(self, sequence: Sequence) -> None:
        insort(self.oldest_first, sequence, key=by_age)
        self.order.add(sequence)
        if sequence.deadline < math.inf:
            insort(self._calm, sequence, key=by_urgency)

    def remove(self, sequence: Sequence) -> None:
        take_out(self.oldest_first, sequence, by_age)
        self.order.remove(sequence)
        if _is_in(self._urgent, sequence, by_deadline):
            take_out(self._urgent, sequence, by_deadline)
        elif sequence.deadline < math.inf:
            take_out(self._calm, sequence, by_urgency)

    def expired(self, now: float) -> list[Sequence]:
        self._become_urgent(now)
        return self._urgent[: bisect_right(self._urgent, now, key=lambda one: one.deadline)]

    def next(self, now: float, passing: Set[Sequence]) -> Sequence | None:
        self._become_urgent(now)
        urgent = _first(self._urgent, passing)
        if urgent is not None:
            return urgent
        if self._is_turn_of_the_oldest:
            return _first(self.oldest_first, passing)
        return self.order.next(now, passing)

    def served(self, sequence: Sequence) -> None:
        """`next` returned this one, and it is admitted."""
        if _is_in(self._urgent, sequence, by_deadline):
            return
        if not self._is_turn_of_the_oldest:
            self.order.served(sequence)
        self._turns += 1

    def _become_urgent(self, now: float) -> None:
        while self._calm and urgent_from(self._calm[0]) <= now:
            insort(self._urgent, self._calm.pop(0), key=by_deadline)

    @property
    def _is_turn_of_the_oldest(self) -> bool:
        return (self._turns + 1) % self.order.oldest_every == 0

    def check(self) -> None:
        waiting = self.oldest_first
        require(waiting == sorted(waiting, key=by_age), "waiting: not by age")
        require(len({one.serial for one in waiting}) == len(waiting), "waiting: a request waits twice")
        require(self._calm == sorted(self._calm, key=by_urgency), "waiting: not by when they become urgent")
        require(self._urgent == sorted(self._urgent, key=by_deadline), "waiting: urgent ones not by deadline")
        with_deadline = sorted([*self._calm, *self._urgent], key=by_age)
        require(with_deadline == [one for one in waiting if one.deadline < math.inf], "waiting: a deadline is lost")
        self.order.check(waiting)


def _first(sequences: list[Sequence], passing: Set[Sequence]) -> Sequence | None:
    return next((one for one in sequences if one not in passing), None)


def _is_in(ordered: list[Sequence], sequence: Sequence, key: Callable[[Sequence], Any]) -> bool:
    at = bisect_left(ordered, key(sequence), key=key)
    return at < len(ordered) and ordered[at] is sequence
