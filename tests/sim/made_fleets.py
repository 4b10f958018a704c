"""Small traces and fleets whose times can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from preble.sched.cost import PiecewiseCost
from preble.sched.events import Event, Finished, ReplicaDown, ReplicaUp
from preble.sched.hashing import Tokens
from preble.sched.placement import Placement, Waiting
from preble.sched.policies import Policy
from preble.sim import Flight, Router, Settings, Simulation, Trace, TracedRequest

TEN_AND_ONE = PiecewiseCost("ten-and-one", (0, 1), (10.0, 11.0))
"""A step takes 10 seconds, and 1 for each of its tokens."""
SETTINGS = Settings(
    replicas=1, cost=TEN_AND_ONE, capacity_tokens=400, page_size=4, max_batched_tokens=8, order="fcfs", leap_seconds=1e6
)
"""Leaps go as far as they can; no time may depend on that."""
BLOCK = 4


def request(
    arrival: float,
    blocks: Sequence[int],
    output: int,
    *,
    prompt_tokens: int | None = None,
    session: str | None = None,
    think: float = 0.0,
) -> TracedRequest:
    """A prompt of whole blocks of 4 tokens unless `prompt_tokens` says otherwise."""
    tokens = BLOCK * len(blocks) if prompt_tokens is None else prompt_tokens
    return TracedRequest(arrival, tokens, output, np.array(blocks, np.int32), session, think)


def trace(*requests: TracedRequest) -> Trace:
    return Trace("made", BLOCK, requests)


def simulated(
    made: Trace,
    policy: str | Policy | Router = "round-robin",
    *,
    advance: Callable[[], None] = lambda: None,
    **changes: object,
) -> Simulation:
    """A simulation that has run, with every scheduler's books proven right."""
    simulation = Simulation(made, replace(SETTINGS, **changes), policy, advance=advance)
    simulation.run()
    proven(simulation)
    return simulation


def proven(simulation: Simulation) -> None:
    """All that must hold after any simulation."""
    for replica in simulation.replicas:
        replica.local.check()
        assert 0 <= replica.busy_seconds <= simulation.now * (1 + 1e-9)
    if hasattr(simulation.router, "check"):
        simulation.router.check()
    for flight in simulation.flights:
        if flight.ended == flight.ended:
            assert flight.generated == flight.traced.output_tokens
            assert flight.arrived <= flight.placed <= flight.admitted < flight.first_token <= flight.ended


def times(simulation: Simulation) -> list[tuple[float, float, float]]:
    """When each request was admitted, had its first token, and ended."""
    return [(one.admitted, one.first_token, one.ended) for one in simulation.flights]


def one(made: Flight) -> tuple[float, ...]:
    """All times and counts of a request that do not depend on who decided."""
    return (
        made.arrived,
        made.placed,
        made.admitted,
        made.first_token,
        made.ended,
        made.replica,
        made.cached_tokens,
        made.computed_tokens,
        made.preemptions,
        made.moves,
    )


class ByHand:
    """A router of one's own: request i goes to the i-th of `chosen`, after a failure to the first one that is up."""

    policy_name = "by-hand"

    def __init__(self, *chosen: int, replicas: int = 2) -> None:
        self.chosen = chosen
        self.replicas = replicas
        self.heard: list[tuple[float, Event]] = []
        self.submitted: list[tuple[str, list[int], int, str | None]] = []
        self._at: dict[str, int] = {}
        self._lost: list[str] = []
        self._down: set[int] = set()

    def submit(
        self, request_id: str, token_ids: Tokens, *, now: float, max_tokens: int, session: str | None
    ) -> Placement | Waiting:
        self.submitted.append((request_id, token_ids.tolist(), max_tokens, session))
        replica = self.chosen[int(request_id)]
        if replica in self._down:
            self._lost.append(request_id)
            return Waiting(request_id, "down")
        return self._placed(request_id, replica)

    def apply(self, event: Event, *, now: float) -> list[Placement]:
        self.heard.append((now, event))
        match event:
            case Finished():
                del self._at[event.request_id]
            case ReplicaDown():
                self._down.add(event.replica)
                self._lost += [name for name, replica in self._at.items() if replica == event.replica]
                return self._again()
            case ReplicaUp():
                self._down.discard(event.replica)
                return self._again()
        return []

    def _again(self) -> list[Placement]:
        up = [number for number in range(self.replicas) if number not in self._down]
        lost, self._lost = (self._lost, []) if up else ([], self._lost)
        return [self._placed(name, up[0]) for name in lost]

    def _placed(self, request_id: str, replica: int) -> Placement:
        self._at[request_id] = replica
        return Placement(request_id, replica, 0, "by-hand")


def kinds(heard: Iterable[tuple[float, Event]], kind: type) -> list[float]:
    """When events of a kind were heard of."""
    return [now for now, event in heard if isinstance(event, kind)]
