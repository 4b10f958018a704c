"""The cluster's queue: requests that no replica can take now."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from preble.sched.request import Request


def _lateness(request: Request) -> tuple[float, float, int]:
    priority, deadline, number = request.urgency
    return -priority, -deadline, -number


class WaitingQueue:
    """Requests in order of urgency: higher priority, then earlier deadline, then age. One that comes back after its
    replica was lost keeps its age."""

    def __init__(self) -> None:
        self._last_first: list[Request] = []
        self.empty = True
        """Whether nobody waits: asked at every event."""

    def __iter__(self) -> Iterator[Request]:
        """Most urgent first."""
        return reversed(self._last_first)

    def push(self, request: Request) -> None:
        """Add a request."""
        insort(self._last_first, request, key=_lateness)
        self.empty = False

    def first(self) -> Request:
        """The most urgent one; there must be one."""
        return self._last_first[-1]

    def remove(self, request: Request) -> None:
        """Take out a request that is here."""
        at = bisect_left(self._last_first, _lateness(request), key=_lateness)
        assert self._last_first[at] is request
        del self._last_first[at]
        self.empty = not self._last_first
