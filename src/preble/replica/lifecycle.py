"""When a replica that failed is started again: backoff, and a circuit breaker. Knows no clock: time comes in."""

from __future__ import annotations

from typing import Literal, TypeAlias

State: TypeAlias = Literal["starting", "probing", "serving", "waiting"]

FIRST_DELAY = 0.5
"""Seconds before the restart that follows a second failure in a row; the first is followed by one at once."""
LONGEST_DELAY = 30.0
OPENS_AFTER = 4
"""Failures in a row that open the breaker."""
FORGIVEN_AFTER = 30.0
"""Seconds of service after which earlier failures no longer count."""


class Lifecycle:
    """What a replica is doing, from its first start to its last.

    It starts, and serves. After a failure it waits (not at all at first, then twice as long each time), starts again,
    and has to answer one request of the cluster's own, the probe, before it is given anybody else's. After several
    failures in a row the breaker is open: the waits are at their longest, and each of them ends in one attempt, with
    one probe. Only faults of the replica itself count: what a request is to blame for never reaches this place.

    Args:
        now: seconds; it is starting from here.
    """

    def __init__(self, now: float) -> None:
        self.state: State = "starting"
        self.since = now
        """When it came into this state."""
        self.failures = 0
        """In a row, at the last one."""
        self.restarts = 0
        self.retry_at = 0.0
        """When it may start again, while it waits."""

    @property
    def open(self) -> bool:
        """Whether the breaker is open: the last failures came too close to each other."""
        return self.failures >= OPENS_AFTER and self.state != "serving"

    def loaded(self, now: float) -> None:
        """It takes requests: anybody's in its first life, the probe in later ones."""
        assert self.state == "starting"
        self._become("probing" if self.failures else "serving", now)

    def proved(self, now: float) -> None:
        """It answered the probe."""
        assert self.state == "probing"
        self._become("serving", now)

    def failed(self, now: float) -> None:
        """It could not start, crashed, hung or was killed."""
        assert self.state != "waiting"
        self.failures = self.recent_failures(now) + 1
        self.retry_at = now + self._delay()
        self._become("waiting", now)

    def recent_failures(self, now: float) -> int:
        """Failures in a row that are not forgiven."""
        return 0 if self.state == "serving" and now - self.since >= FORGIVEN_AFTER else self.failures

    def may_restart(self, now: float) -> bool:
        """Whether it waited long enough."""
        return self.state == "waiting" and now >= self.retry_at

    def restarted(self, now: float) -> None:
        """A new life of it begins."""
        assert self.state == "waiting"
        self.restarts += 1
        self._become("starting", now)

    def _become(self, state: State, now: float) -> None:
        self.state = state
        self.since = now

    def _delay(self) -> float:
        if self.failures == 1:
            return 0.0
        if self.failures >= OPENS_AFTER:
            return LONGEST_DELAY
        return min(FIRST_DELAY * 2.0 ** (self.failures - 2), LONGEST_DELAY)
