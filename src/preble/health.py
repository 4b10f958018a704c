"""How a cluster and its replicas are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

ReplicaState: TypeAlias = Literal["probing", "serving", "draining", "restarting", "broken"]
"""How a replica is: `ReplicaHealth.state` says what each means."""


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """One replica, now."""

    replica: int
    """Its number."""
    device: str
    """Its torch device."""
    state: ReplicaState
    """`serving`; `draining`: given nothing more; `restarting`: failed, and to be started again soon; `probing`: started
    again, and answering a request of the cluster's own before any other; `broken`: failed several times in a row, and
    tried again now and then."""
    seconds: float
    """For how long it has been in this state; draining is part of serving."""
    process_id: int | None
    """Of the process that it has to itself, `None` for a thread."""
    in_flight: int
    """Requests placed on it that have not ended."""
    last_report: float
    """Seconds since it last told something."""
    failures: int
    """How often it failed in a row: service for half a minute makes that forgotten."""
    restarts: int
    """How often it was started again since it was added."""
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
    """Whether `Cluster.pause` stopped the replicas."""
    pending: int
    """Requests accepted and not finished."""
    waiting: int
    """… of which these have no replica yet."""
    replicas: tuple[ReplicaHealth, ...]
    """One entry per replica, by number."""
