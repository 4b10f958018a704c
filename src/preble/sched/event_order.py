"""Which of a replica's cache statements are news, when events may come late, twice or out of order."""

from __future__ import annotations

import numpy as np

from preble.sched.hashing import Hashes

REORDERING = 1024
"""How many events may overtake a missing one before it is given up for lost."""


class EventOrder:
    """Filters one replica's `Stored` and `Evicted` events, numbered 1, 2, 3, …, so that the newest statement about a
    page wins.

    Events in order need no memory. One that arrives ahead of a missing number is applied at once, and its pages are
    remembered with its number until the gap before it closes: only then could an older statement still arrive. At most
    `REORDERING` events are ahead at any time; with one more, the missing ones are given up and ignored should they
    still come. So the memory is bounded by the pages of the last `REORDERING` events.

    Args:
        after: the number that counts as the last one seen.
    """

    __slots__ = ("_ahead", "_newest", "_seen")

    def __init__(self, after: int = 0) -> None:
        self._seen = after
        self._ahead: dict[int, list[int]] = {}
        self._newest: dict[int, int] = {}

    def news(self, sequence: int, hashes: Hashes) -> Hashes | None:
        """The pages of event number `sequence` about which nothing newer is known; `None` for a repeated event."""
        if sequence <= self._seen or sequence in self._ahead:
            return None
        newest = self._newest
        if newest:
            hashes = hashes[np.fromiter((newest.get(name, 0) < sequence for name in hashes.tolist()), np.bool_)]
        if sequence == self._seen + 1:
            self._seen = sequence
        else:
            self._ahead[sequence] = names = hashes.tolist()
            newest.update(dict.fromkeys(names, sequence))
            if len(self._ahead) > REORDERING:
                self._seen = min(self._ahead) - 1
        if self._ahead:
            self._close_gap()
        return hashes

    @property
    def remembered(self) -> int:
        """Pages whose last statement is kept, to tell whether an older one may still come."""
        return len(self._newest)

    def _close_gap(self) -> None:
        while (names := self._ahead.pop(self._seen + 1, None)) is not None:
            self._seen += 1
            for name in names:
                if self._newest.get(name) == self._seen:
                    del self._newest[name]
