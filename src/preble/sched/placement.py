"""What the global scheduler answers to a submitted request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Placement:
    """A request was given to a replica, and the replica's ledger already counts it."""

    request_id: str
    replica: int
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
    reason: str
