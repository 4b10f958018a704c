"""What a simulation asks where a request goes."""

from __future__ import annotations

from typing import Protocol

from preble.sched.events import Event
from preble.sched.hashing import Tokens
from preble.sched.placement import Placement, Waiting


class Router(Protocol):
    """The part of `GlobalScheduler` that a simulation uses. Routers of others can be put behind it, to be measured."""

    @property
    def policy_name(self) -> str:
        """What outcomes call it."""

    def submit(
        self, request_id: str, token_ids: Tokens, *, now: float, max_tokens: int, session: str | None
    ) -> Placement | Waiting:
        """Place a request, or let it wait: then a later `apply` returns its placement. The arguments are as in
        `GlobalScheduler.submit`."""

    def apply(self, event: Event, *, now: float) -> list[Placement]:
        """Take in what a replica reports; returns the placements that this made possible. After `ReplicaDown` these are
        those of all requests that were in flight there, if not at once then with a later event."""
