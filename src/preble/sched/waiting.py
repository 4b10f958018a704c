"""The cluster's queue: requests that no replica can take now."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

from preble.sched.orders.queue import URGENT_AFTER
from preble.sched.request import Request

OFFERED = 32
"""How many waiting requests are offered the replicas at a time, where they may be overtaken, …"""

LOOKED_UP = 4
"""… and how many more, by turns, so that what is known of each stays fresh."""

OLDEST_EVERY = 64
"""Every so many turns it is the oldest one's."""


class WaitingQueue:
    """Requests in order of urgency: higher priority, then earlier deadline, then age. One that comes back after its
    replica was lost keeps its age.

    Where they may be overtaken (`Policy.overtakes`) they are not served in that order but as `offers` says. Of the
    requests of its priority class, one that finds m older ones waiting is then among the next 64 (m + 1) to be placed,
    were none of a higher class to come, as `insists` makes it take any replica that can.
    """

    def __init__(self) -> None:
        self._last_first: list[Request] = []
        self.empty = True
        """Whether nobody waits: asked at every event."""
        self._turns = 0
        """Requests served."""
        self._looked = 0
        """Where the next turn of look-ups begins."""

    def __iter__(self) -> Iterator[Request]:
        """Most urgent first."""
        return reversed(self._last_first)

    def push(self, request: Request) -> None:
        """Add a request."""
        request.insists = False
        insort(self._last_first, request, key=_lateness)
        self.empty = False

    def remove(self, request: Request) -> None:
        """Take out a request that is here."""
        at = bisect_left(self._last_first, _lateness(request), key=_lateness)
        assert self._last_first[at] is request
        del self._last_first[at]
        self.empty = not self._last_first

    def serve(self, request: Request) -> None:
        """Take out a request that is here, as it was placed."""
        self._turns += 1
        self.remove(request)

    def in_turn(self) -> Iterator[Request]:
        """The most urgent one, and after it has been served the next one."""
        while self._last_first:
            yield self._last_first[-1]

    def offers(self, now: float) -> Iterator[Request]:
        """Who may take a replica now, first come first: those of the highest response ratio, and a few others by turns.
        Where a turn of the oldest begins, it comes before whoever is left, and insists."""
        waiting = self._last_first
        offered = heapq.nsmallest(OFFERED, waiting, key=lambda request: _overtaking(request, now))
        count = len(waiting)
        if count > OFFERED:
            self._looked %= count
            chosen = set(offered)
            offered += [one for one in islice(waiting, self._looked, self._looked + LOOKED_UP) if one not in chosen]
            self._looked += LOOKED_UP
        oldest: Request | None = None
        for request in offered:
            # Asked before each: those before it may have been served meanwhile.
            if oldest is None and (self._turns + 1) % OLDEST_EVERY == 0:
                oldest = min(waiting, key=lambda request: (-request.priority, request.number))
                oldest.insists = True
                yield oldest
            if request is not oldest:
                yield request


def _lateness(request: Request) -> tuple[float, float, int]:
    priority, deadline, number = request.urgency
    return -priority, -deadline, -number


def _overtaking(request: Request, now: float) -> tuple[float, float, float, int]:
    """Sorts by priority, then those whose deadline presses by deadline, then by response ratio, then by age."""
    waited = now - request.submitted
    deadline = request.deadline
    presses = waited >= URGENT_AFTER * (deadline - request.submitted)
    return -request.priority, deadline if presses else math.inf, -waited / request.service_seconds, request.number
