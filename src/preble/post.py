"""A replica's place in the cluster, which survives its lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from preble.health import ReplicaHealth, ReplicaState
from preble.replica.lifecycle import Lifecycle

if TYPE_CHECKING:
    import torch

    from preble.engine.messages import Ready
    from preble.outputs import ReplicaStats
    from preble.replica.base import Replica


@dataclass(slots=True)
class Post:
    """What the roster knows of a replica."""

    number: int
    device: torch.device
    lifecycle: Lifecycle
    life: Replica | None = None
    previous: Replica | None = None
    """A life that failed and has not ended yet: its memory is not free."""
    pages: int | None = None
    """KV pages that it is to get; before it is ready, as many as fit."""
    ready: Ready | None = None
    """What its first life said."""
    stats: ReplicaStats | None = None
    enlisted: bool = False
    """Whether its first life served: from then on it is started again when it fails."""
    alive_at: float = 0.0
    """When it last told something, or had nothing to tell."""
    told_at: float = 0.0
    """When it last told something."""
    last_error: str | None = None
    sent: int = 0
    """Commands sent in this life."""
    taken: int = 0
    """… of which the engine has taken in so many."""
    acknowledgements: list[tuple[int, anyio.Event]] = field(default_factory=list)
    """Events to set when so many commands are taken in, or the life ends."""

    def state(self, draining: bool) -> ReplicaState:
        """What the replica is doing, in a user's words."""
        cycle = self.lifecycle
        if cycle.open:
            return "broken"
        if cycle.state == "serving":
            return "draining" if draining else "serving"
        return "probing" if cycle.state == "probing" else "restarting"

    def health(self, now: float, *, in_flight: int, draining: bool) -> ReplicaHealth:
        """All about it."""
        cycle = self.lifecycle
        return ReplicaHealth(
            replica=self.number,
            device=str(self.device),
            state=self.state(draining),
            seconds=now - cycle.since,
            process_id=None if self.life is None else self.life.process_id,
            in_flight=in_flight,
            last_report=now - self.told_at,
            failures=cycle.recent_failures(now),
            restarts=cycle.restarts,
            last_error=self.last_error,
            retry_in=max(cycle.retry_at - now, 0.0) if cycle.state == "waiting" else None,
        )

    def acknowledge(self, taken: float) -> None:
        """Tell those who wait for the commands up to this one."""
        for count, event in self.acknowledgements:
            if count <= taken:
                event.set()
        self.acknowledgements = [(count, event) for count, event in self.acknowledgements if count > taken]


@dataclass(slots=True)
class Enlistment:
    """Replicas that start together: all of them come, or none."""

    posts: list[Post]
    settled: anyio.Event = field(default_factory=anyio.Event)
    error: BaseException | None = None
