"""Highest response ratio next."""

from __future__ import annotations

from collections.abc import Set
from typing import ClassVar

import numpy as np

from preble.sched.cost import CostModel
from preble.sched.invariants import require
from preble.sched.orders.base import WaitingOrder
from preble.sched.sequence import Sequence

SHORTEST = 1e-9
"""Seconds that any prefill takes, whatever the cost model says."""


class HighestResponseRatioNext(WaitingOrder):
    """The request with the highest (wait + p) / p first; p is what computing its uncached tokens takes, in seconds.

    Short work first, with ageing built in: nobody is overtaken by a request that came later and has as much to compute,
    and while it waits for w, by one that has a share s of its p to compute only if that came within the first
    (1 - s) w. Equal ratios go by p, then by age.

    Bound: as long as there is room for everybody in the long run, the ageing alone sees to it that each is served. In
    lasting overload it would not: the many short ones wait ever longer too, and their ratios grow faster. So one of
    every 16 turns goes to the oldest, and a request that finds m older ones waiting is among the next 16 (m + 1)
    admissions.
    """

    name: ClassVar[str] = "hrrn"
    oldest_every: ClassVar[int] = 16

    def __init__(self, cost: CostModel) -> None:
        super().__init__(cost)
        # The same requests thrice, without gaps, so that ranking thousands of them is a few operations.
        self._waiting: list[Sequence] = []
        self._arrived = np.empty(64)
        self._seconds = np.empty(64)
        self._rows: dict[Sequence, int] = {}

    def add(self, sequence: Sequence) -> None:
        row = len(self._waiting)
        if row == len(self._arrived):
            self._arrived = np.concatenate([self._arrived, np.empty(row)])
            self._seconds = np.concatenate([self._seconds, np.empty(row)])
        self._waiting.append(sequence)
        self._rows[sequence] = row
        self._arrived[row] = sequence.arrived
        self.update(sequence)

    def remove(self, sequence: Sequence) -> None:
        row = self._rows.pop(sequence)
        last = self._waiting.pop()
        if last is not sequence:
            end = len(self._waiting)
            self._waiting[row] = last
            self._rows[last] = row
            self._arrived[row] = self._arrived[end]
            self._seconds[row] = self._seconds[end]

    def update(self, sequence: Sequence) -> None:
        seconds = self.cost.prefill_seconds(sequence.length - sequence.matched, sequence.matched)
        self._seconds[self._rows[sequence]] = max(seconds, SHORTEST)

    def next(self, now: float, passing: Set[Sequence]) -> Sequence | None:
        count = len(self._waiting)
        if not count:
            return None
        seconds = self._seconds[:count]
        ratios = np.maximum(now - self._arrived[:count], 0.0) / seconds
        for one in passing:
            row = self._rows.get(one)
            if row is not None:
                ratios[row] = -1.0
        highest = ratios.max()
        if highest < 0:
            return None
        ties = np.flatnonzero(ratios == highest)
        return min(
            (self._waiting[row] for row in ties.tolist()), key=lambda one: (seconds[self._rows[one]], one.serial)
        )

    def check(self, waiting: list[Sequence]) -> None:
        require(set(self._waiting) == set(waiting), "hrrn: not the waiting requests")
        require(len(self._waiting) == len(waiting) == len(self._rows), "hrrn: a request is here twice")
        for row, one in enumerate(self._waiting):
            require(self._rows[one] == row, f"hrrn: {one.request_id!r} is in another row")
            require(self._arrived[row] == one.arrived, f"hrrn: {one.request_id!r} came at another time")
            require(self._seconds[row] > 0, f"hrrn: {one.request_id!r} costs nothing")
