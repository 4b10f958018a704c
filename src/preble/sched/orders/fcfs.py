"""First come, first served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Set
from typing import Any, ClassVar

from preble.sched.cost import CostModel
from preble.sched.invariants import require
from preble.sched.orders.base import WaitingOrder
from preble.sched.sequence import Sequence


def by_age(sequence: Sequence) -> int:
    """The key by which the oldest request comes first; a preempted one keeps its age."""
    return sequence.serial


def take_out(ordered: list[Sequence], sequence: Sequence, key: Callable[[Sequence], Any]) -> None:
    """Remove a request from a list in the order of a key that no two requests share, without a walk through the list:
    thousands may be cancelled at once."""
    at = bisect_left(ordered, key(sequence), key=key)
    assert ordered[at] is sequence, "it is not here, or its key has changed"
    del ordered[at]


class FirstComeFirstServed(WaitingOrder):
    """The oldest first.

    Bound: a request that finds m older ones waiting is among the next m + 1 admissions.
    """

    name: ClassVar[str] = "fcfs"
    oldest_every: ClassVar[int] = 1

    def __init__(self, cost: CostModel) -> None:
        super().__init__(cost)
        self._oldest_first: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        insort(self._oldest_first, sequence, key=by_age)

    def remove(self, sequence: Sequence) -> None:
        take_out(self._oldest_first, sequence, by_age)

    def update(self, sequence: Sequence) -> None:
        pass

    def next(self, now: float, passing: Set[Sequence]) -> Sequence | None:
        return next((one for one in self._oldest_first if one not in passing), None)

    def check(self, waiting: list[Sequence]) -> None:
        require(self._oldest_first == sorted(waiting, key=by_age), "fcfs: not the waiting requests by age")
