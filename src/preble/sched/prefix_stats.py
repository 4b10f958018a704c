"""What requests that share a key portion experienced."""

from __future__ import annotations

from collections.abc import Collection

RECENT = 16
"""Means follow about the last this many requests."""


class PrefixStats:
    """Observed at one node of the prefix tree by the requests whose *key portion* ends there: how long they queued, by
    halves of the window H, and how much they generated. Autoscaling (E2) keeps its copies here too.

    Args:
        now: seconds; the halves are counted from here.
    """

    __slots__ = (
        "__weakref__",
        "copies",
        "half",
        "mean_output",
        "outputs",
        "retired",
        "scaled",
        "since",
        "wait",
        "waits",
    )

    def __init__(self, now: float) -> None:
        self.outputs = 0
        self.mean_output = 0.0
        self.since = now
        self.half = 0
        """Which half window is running, counted from `since`."""
        self.waits = [0, 0]
        """Requests admitted in the half before this one, and in this one."""
        self.wait = [0.0, 0.0]
        """Seconds they queued, summed, in the same order."""
        self.copies: tuple[int, ...] = ()
        """Replicas that were given a copy because the prefix was hot, in order."""
        self.retired: tuple[int, ...] = ()
        """Replicas whose copy is not used any more since it cooled, in order."""
        self.scaled = -1
        """The half window in which a copy was last given or retired."""

    def keep_copies(self, replicas: Collection[int]) -> None:
        """Forget the copies, retired ones too, that are on none of these replicas."""
        self.copies = tuple([one for one in self.copies if one in replicas])
        self.retired = tuple([one for one in self.retired if one in replicas])

    def ended(self, output_tokens: int) -> None:
        """A request ended, having generated this much."""
        self.outputs += 1
        self.mean_output += (output_tokens - self.mean_output) / min(self.outputs, RECENT)

    def waited(self, seconds: float, now: float, window: float) -> None:
        """A request was admitted after this long in the queue."""
        half = self.half_at(now, window)
        if half > self.half:
            recent = half == self.half + 1
            self.waits = [self.waits[1] if recent else 0, 0]
            self.wait = [self.wait[1] if recent else 0.0, 0.0]
            self.half = half
        self.waits[1] += 1
        self.wait[1] += seconds

    def half_at(self, now: float, window: float) -> int:
        """The number of the half window that `now` lies in."""
        return int((now - self.since) / (window / 2)) if window > 0 else 0

    def means(self, now: float, window: float) -> tuple[float, int, float, int]:
        """Mean seconds queued and number of requests: in the half window before the running one, and in the running
        one."""
        (before, this), (waited_before, waited_this) = self.waits, self.wait
        late = self.half_at(now, window) - self.half
        if late == 1:
            before, waited_before, this, waited_this = this, waited_this, 0, 0.0
        elif late > 1:
            before, waited_before, this, waited_this = 0, 0.0, 0, 0.0
        return (
            waited_before / before if before else 0.0,
            before,
            waited_this / this if this else 0.0,
            this,
        )
