"""What the routers of others have in common behind the simulator's protocol: books of who is where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from preble.sched.events import Event, Evicted, Finished, Progressed, ReplicaDown, ReplicaUp, Stored
from preble.sched.hashing import Tokens
from preble.sched.placement import Placement


@dataclass(slots=True)
class Booked:
    """A request in flight."""

    request_id: str
    tokens: Tokens
    replica: int
    computed: bool = False
    """Its prompt is."""


class PeerRouter(ABC):
    """A `preble.sim.router.Router` that turns what the simulator reports into what another router is told.

    Subclasses decide in `choose`, and take what they care for of the rest. A request whose replica was lost is routed
    anew.
    """

    def __init__(self, name: str, replicas: int) -> None:
        self._name = name
        self.up = set(range(replicas))
        """Replicas that serve."""
        self.booked: dict[str, Booked] = {}
        """Requests in flight, by id."""

    @property
    def policy_name(self) -> str:
        return self._name

    def submit(
        self, request_id: str, token_ids: Tokens, *, now: float, max_tokens: int, session: str | None
    ) -> Placement:
        return self._route(request_id, token_ids, now)

    def apply(self, event: Event, *, now: float) -> list[Placement]:
        match event:
            case Stored() | Evicted():
                self.cached(event)
            case Progressed():
                booked = self.booked.get(event.request_id)
                if booked is not None and not booked.computed and event.computed_tokens >= len(booked.tokens):
                    booked.computed = True
                    self.computed(booked)
            case Finished():
                booked = self.booked.pop(event.request_id, None)
                if booked is not None:
                    self.finished(booked)
            case ReplicaDown():
                self.up.discard(event.replica)
                lost = [one for one in self.booked.values() if one.replica == event.replica]
                for one in lost:
                    del self.booked[one.request_id]
                    self.finished(one)
                self.left(event.replica)
                return [self._route(one.request_id, one.tokens, now) for one in lost]
            case ReplicaUp():
                self.up.add(event.replica)
                self.joined(event.replica)
        return []

    def in_flight(self) -> dict[int, int]:
        """Requests by replica that serves."""
        counts = dict.fromkeys(sorted(self.up), 0)
        for one in self.booked.values():
            counts[one.replica] += 1
        return counts

    @abstractmethod
    def choose(self, request_id: str, tokens: Tokens, now: float) -> tuple[int, str]:
        """A replica for a request, and the rule that decided. It counts as routed there at once."""

    def computed(self, booked: Booked) -> None:  # noqa: B027  # most keep nothing
        """The prompt of a request has been computed."""

    def finished(self, booked: Booked) -> None:  # noqa: B027  # most keep nothing
        """A request has ended, or its replica has."""

    def cached(self, event: Stored | Evicted) -> None:  # noqa: B027  # most keep nothing
        """A replica's cache has changed."""

    def left(self, replica: int) -> None:  # noqa: B027  # most keep nothing
        """A replica was lost, with its cache."""

    def joined(self, replica: int) -> None:  # noqa: B027  # most keep nothing
        """It is back."""

    def close(self) -> None:  # noqa: B027  # most keep nothing
        """Let go of what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _route(self, request_id: str, tokens: Tokens, now: float) -> Placement:
        replica, reason = self.choose(request_id, tokens, now)
        self.booked[request_id] = Booked(request_id, tokens, replica)
        return Placement(request_id, replica, 0, reason)


Settings = dict[str, Any]
"""What a peer was run with, its version included, in types that JSON knows."""
