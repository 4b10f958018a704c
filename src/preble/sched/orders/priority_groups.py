"""The paper's order: groups by the share of the prompt that is cached, served in proportion to it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Set
from typing import ClassVar

from preble.sched.cost import CostModel
from preble.sched.invariants import require
from preble.sched.orders.base import WaitingOrder
from preble.sched.orders.fcfs import by_age, take_out
from preble.sched.sequence import Sequence

GROUPS = 10
"""P in the paper."""
TURNS = 1
"""k: a round admits (g + 1) k requests of group g."""
ROUND = TURNS * GROUPS * (GROUPS + 1) // 2
"""Admissions in a round in which every group has enough."""


def group_of(sequence: Sequence) -> int:
    """ceil(hit ratio x P) - 1, where the hit ratio is the share of its tokens that is cached; 0 where nothing is."""
    return max(-(-sequence.matched * GROUPS // sequence.length) - 1, 0)


class PriorityGroups(WaitingOrder):
    """Ten groups by hit ratio, proportional service: each round admits up to g + 1 requests of group g, the highest
    group first, and within a group the oldest. A group with too few leaves the rest of its share to the others.

    Bound: a round has at most 55 turns and serves every group, so whoever stays in its group gets ahead each round. Hit
    ratios change though, and a request that moves whenever its group is to be served would miss every turn. So one of
    every 55 turns goes to the oldest of all, and a request that finds m older ones waiting is among the next 55 (m + 1)
    admissions.
    """

    name: ClassVar[str] = "preble"
    oldest_every: ClassVar[int] = ROUND

    def __init__(self, cost: CostModel) -> None:
        super().__init__(cost)
        self._groups: list[list[Sequence]] = [[] for _ in range(GROUPS)]
        """Each by age."""
        self._group: dict[Sequence, int] = {}
        self._turn = GROUPS - 1
        """The group being served."""
        self._left = GROUPS * TURNS
        """How many of it are still to be admitted in this round."""

    def add(self, sequence: Sequence) -> None:
        group = self._group[sequence] = group_of(sequence)
        insort(self._groups[group], sequence, key=by_age)

    def remove(self, sequence: Sequence) -> None:
        take_out(self._groups[self._group.pop(sequence)], sequence, by_age)

    def update(self, sequence: Sequence) -> None:
        if group_of(sequence) != self._group[sequence]:
            self.remove(sequence)
            self.add(sequence)

    def next(self, now: float, passing: Set[Sequence]) -> Sequence | None:
        for group in self._turns():
            for one in self._groups[group]:
                if one not in passing:
                    return one
        return None

    def served(self, sequence: Sequence) -> None:
        group = self._group[sequence]
        if group != self._turn or not self._left:
            self._turn, self._left = group, (group + 1) * TURNS
        self._left -= 1

    def _turns(self) -> Iterator[int]:
        """Groups in the order of their next turns: the rest of this round, then a whole one."""
        yield from range(self._turn if self._left else self._turn - 1, -1, -1)
        yield from range(GROUPS - 1, -1, -1)

    def check(self, waiting: list[Sequence]) -> None:
        members = [one for group in self._groups for one in group]
        require(sorted(members, key=by_age) == sorted(waiting, key=by_age), "preble: not the waiting requests")
        require(len(self._group) == len(members), "preble: a request that left is known")
        for number, group in enumerate(self._groups):
            require(group == sorted(group, key=by_age), f"preble: group {number} is not by age")
            for one in group:
                require(self._group[one] == number == group_of(one), f"preble: {one.request_id!r} is in group {number}")
        require(0 <= self._turn < GROUPS and 0 <= self._left <= (self._turn + 1) * TURNS, "preble: no such turn")
