"""The door: how many requests are served at once, and whose turn is next."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable

import anyio
import anyio.lowlevel

from preble.errors import ClusterOverloaded

OLDEST_EVERY = 16
"""One of so many turns of a priority class goes to its oldest request, whatever the deadlines of the others."""
LATE_AFTER = 0.5
"""A request that has waited for this share of its timeout lets those pass who have not."""
FIRST_GUESS = 1.0
"""Seconds that a request is assumed to take before any has ended."""
MEMORY = 16
"""Over about how many of the latest requests the time that one takes is averaged."""
SHORTEST_RETRY, LONGEST_RETRY = 0.01, 60.0
"""Seconds between which suggestions to try again lie."""


class Slot:
    """A request's place among those that are served, until it is released."""

    __slots__ = ("_door", "count", "taken")

    def __init__(self, door: Admission, count: int, taken: float) -> None:
        self._door: Admission | None = door
        self.count = count
        self.taken = taken
        """When, on the door's clock."""

    def release(self) -> None:
        """Let the next one in. Harmless when called again."""
        door, self._door = self._door, None
        if door is not None:
            door._released(self)


class Admission:
    """Lets `limit` requests in at a time; the others wait here, or are refused. Belongs to the event loop's thread.

    Whose turn it is: higher priority first, then earlier deadline, then age, as in the scheduler's own queue
    (`preble.sched.waiting`). Two rules see to it that nobody is forgotten and no work is wasted:

    - One of every `OLDEST_EVERY` turns of a priority class goes to its oldest request, so that a stream of requests
      with deadlines cannot keep out one without.
    - A request that has waited for half of its timeout is served only when nobody of its class is left who has not.
      In lasting overload the earliest deadline would otherwise always be one about to pass: everybody would be let in
      just too late to finish.

    Who is next and asks for more slots than are free is waited for.

    Args:
        limit: slots.
        refuses: whether a request that cannot be let in at once is refused instead of waiting.
        clock: seconds; deadlines are on it.
    """

    def __init__(self, limit: int, *, refuses: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.free = limit
        """Slots that nobody has."""
        self._refuses = refuses
        self._clock = clock
        self._classes: dict[int, _PriorityClass] = {}
        self._highest_last: list[int] = []
        self._arrivals = 0
        self._held = FIRST_GUESS
        """Seconds that a request keeps its slots, averaged over the latest ones."""
        self._measured = False
        self._changed = clock()
        """When a slot was taken or given back last."""
        self._promised = -math.inf
        """When the last of those refused was told to come back."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(map(len, self._classes.values()))

    async def enter(
        self, count: int = 1, *, priority: int = 0, deadline: float | None = None, patient: bool = False
    ) -> Slot:
        """Take slots, when it is this request's turn. A caller who is cancelled while waiting leaves nothing behind.

        Args:
            count: slots that the request takes, at most `limit`.
            priority: higher is served first.
            deadline: when the request has no use for them any more, in seconds on the clock.
            patient: wait also where others are refused.

        Raises:
            ClusterOverloaded: it would have to wait, and requests are refused here.
        """
        await anyio.lowlevel.checkpoint()
        now = self._clock()
        self._arrivals += 1
        caller = _Caller(count, priority, math.inf if deadline is None else deadline, self._arrivals, now)
        self._line_up(caller)
        self._let_in(now)
        if caller.slot is None:
            if self._refuses and not patient:
                self._step_out(caller)
                raise self._overloaded(count, now)
            try:
                await caller.called.wait()
            except BaseException:
                self._step_out(caller)
                raise
        assert caller.slot is not None
        return caller.slot

    def _line_up(self, caller: _Caller) -> None:
        known = self._classes.get(caller.priority)
        if known is None:
            known = self._classes[caller.priority] = _PriorityClass()
            insort(self._highest_last, caller.priority)
        known.add(caller)

    def _step_out(self, caller: _Caller) -> None:
        """A caller leaves, be it that its turn has just come."""
        if caller.slot is not None:
            caller.slot.release()
            return
        self._remove(caller)
        self._let_in(self._clock())  # it may have been waited for

    def _remove(self, caller: _Caller) -> None:
        known = self._classes[caller.priority]
        known.remove(caller)
        if not len(known):
            del self._classes[caller.priority]
            del self._highest_last[bisect_left(self._highest_last, caller.priority)]

    def _let_in(self, now: float) -> None:
        while (caller := self._next(now)) is not None and caller.count <= self.free:
            self._classes[caller.priority].turns += 1
            self._remove(caller)
            self.free -= caller.count
            self._changed = now
            caller.slot = Slot(self, caller.count, now)
            caller.called.set()

    def _next(self, now: float) -> _Caller | None:
        """Whose turn it is."""
        for priority in reversed(self._highest_last):
            caller = self._classes[priority].next(now)
            if caller is not None:
                return caller
        return None

    def _released(self, slot: Slot) -> None:
        now = self._clock()
        held = now - slot.taken
        self._held = self._held + (held - self._held) / MEMORY if self._measured else held
        self._measured = True
        self.free += slot.count
        self._changed = now
        self._let_in(now)

    def _overloaded(self, count: int, now: float) -> ClusterOverloaded:
        """Refuses a request, and suggests when to try again.

        By Little's law a slot comes free every `held / limit` seconds. Those refused are told to come back one after
        the other at that pace, so that they do not all come at once, but not later than when everybody who is in now
        will probably be gone. Where nothing has changed for longer than that, it will probably take as long again.
        """
        every = self._held / self.limit
        self._promised = min(max(self._promised, now) + count * every, now + self._held)
        wait = max(self._promised - now, now - self._changed, SHORTEST_RETRY)
        retry_after = min(wait, LONGEST_RETRY)
        return ClusterOverloaded(
            f"{self.limit - self.free} of max_pending={self.limit} requests are in flight; "
            f"try again in {retry_after:.2g} s, or let calls wait with overload='wait'",
            retry_after,
        )


class _Caller:
    """A request at the door."""

    __slots__ = ("called", "count", "deadline", "late", "late_from", "number", "priority", "slot")

    def __init__(self, count: int, priority: int, deadline: float, number: int, now: float) -> None:
        self.count = count
        self.priority = priority
        self.deadline = deadline
        self.number = number
        """Order of arrival."""
        self.late_from = now + LATE_AFTER * (deadline - now)
        self.late = False
        """Whether it lets those pass who are not."""
        self.slot: Slot | None = None
        self.called = anyio.Event()


class _PriorityClass:
    """The callers of one priority."""

    def __init__(self) -> None:
        self.turns = 0
        """How many were let in since somebody waits in this class."""
        self._by_deadline: list[_Caller] = []
        """Those that are not late."""
        self._by_age: OrderedDict[int, _Caller] = OrderedDict()
        """The same."""
        self._late: list[_Caller] = []
        """By deadline."""

    def __len__(self) -> int:
        return len(self._by_deadline) + len(self._late)

    def add(self, caller: _Caller) -> None:
        insort(self._by_deadline, caller, key=_by_deadline)
        self._by_age[caller.number] = caller

    def remove(self, caller: _Caller) -> None:
        callers = self._late if caller.late else self._by_deadline
        at = bisect_left(callers, _by_deadline(caller), key=_by_deadline)
        assert callers[at] is caller
        del callers[at]
        if not caller.late:
            del self._by_age[caller.number]

    def next(self, now: float) -> _Caller | None:
        """Whose turn it is; `None` if nobody is left whose time is not up."""
        while self._by_deadline:
            caller = self._by_deadline[0]
            if (self.turns + 1) % OLDEST_EVERY == 0:
                caller = next(iter(self._by_age.values()))
            if now < caller.late_from:
                return caller
            self.remove(caller)
            caller.late = True
            insort(self._late, caller, key=_by_deadline)
        if self._late and now < self._late[-1].deadline:
            return self._late[-1]  # who has most time left
        return None


def _by_deadline(caller: _Caller) -> tuple[float, int]:
    return caller.deadline, caller.number
