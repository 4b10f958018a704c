"""First come, first served."""

from __future__ import annotations

from bisect import insort
from collections.abc import Set
from typing import ClassVar

from preble.sched.cost import CostModel
from preble.sched.invariants import require
from preble.sched.orders.base import WaitingOrder
from preble.sched.sequence import Sequence


def by_age(sequence: Sequence) -> int:
    """The key by which the oldest request comes first; a preempted one keeps its age."""
    return sequence.serial


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
        self._oldest_first.remove(sequence)

    def update(self, sequence: Sequence) -> None:
        pass

    def next(self, now: float, passing: Set[Sequence]) -> Sequence | None:
        return next((one for one in self._oldest_first if one not in passing), None)

    def check(self, waiting: list[Sequence]) -> None:
        require(self._oldest_first == sorted(waiting, key=by_age), "fcfs: not the waiting requests by age")
