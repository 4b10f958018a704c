"""What the global scheduler answers to a submitted request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Placement:
    """A request was given to a replica, and the replica's ledger already counts it."""

    request_id: str
    """Which request."""
    replica: int
    """Number of the replica that has it now."""
    cached_tokens: int
    """Prompt tokens believed to be in the replica's prefix cache, whole pages."""
    reason: str
    """The rule that decided: `exploit`, `explore`, `round-robin`, `least-loaded`, …"""
    costs: Mapping[str, float] = field(default_factory=dict)
    """The terms the policy compared for the chosen replica, by name; units are in the names."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The request waits in the cluster: no replica can take it now."""

    request_id: str
    """Which request."""
    reason: str
    """What it waits for, in words."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of the requests that were taken off a replica."""

    request_ids: tuple[str, ...]
    """All of them, oldest first. They are in the scheduler as before, under their ids, and what the replica still
    reports of them is ignored."""
    placements: tuple[Placement, ...]
    """What could be placed now, of these and of those that waited before. Who is not here waits."""
