"""How a cluster and its replicas are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

ReplicaState: TypeAlias = Literal["probing", "serving", "draining", "restarting", "broken"]
"""`probing`: started again, and answering a request of the cluster's own before any other; `restarting`: failed, and to
be started again soon; `broken`: failed several times in a row, and tried again now and then."""


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """One replica, now."""

    replica: int
    device: str
    state: ReplicaState
    seconds: float
    """For how long it has been in this state; draining is part of serving."""
    process_id: int | None
    """Of the process that it has to itself, `None` for a thread."""
    in_flight: int
    """Requests placed on it that have not ended."""
    last_report: float
    """Seconds since it last told something."""
    failures: int
    """In a row: service for half a minute makes them forgotten."""
    restarts: int
    last_error: str | None
    """Why it failed the last time."""
    retry_in: float | None
    """Seconds until it is started again, where it waits for that."""


@dataclass(frozen=True, slots=True)
class ClusterHealth:
    """All replicas, now."""

    status: Literal["ok", "degraded", "down"]
    """`ok`: every replica serves or drains; `degraded`: some do; `down`: none does."""
    paused: bool
    pending: int
    """Requests accepted and not finished."""
    waiting: int
    """… of which these have no replica yet."""
    replicas: tuple[ReplicaHealth, ...]
