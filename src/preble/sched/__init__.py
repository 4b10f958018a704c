"""Deciding which replica gets a request, and what a replica does next. No torch, no I/O, no clock, no threads.

Names are loaded when they are first used, so that `import preble.sched` costs nothing, numpy included.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preble.sched.cost import CostModel
    from preble.sched.cost_fit import FittedCost
    from preble.sched.cost_presets import PRESETS, make_cost
    from preble.sched.events import (
        Admitted,
        Event,
        Evicted,
        Finished,
        Preempted,
        Progressed,
        ReplicaDown,
        ReplicaUp,
        StepTimed,
        Stored,
    )
    from preble.sched.explanation import Candidate, Explanation
    from preble.sched.hot_prefixes import HotPrefix
    from preble.sched.placement import Moved, Placement, Waiting
    from preble.sched.policies import (
        E2,
        POLICIES,
        Choice,
        E2Paper,
        Policy,
        ReplicaView,
        RequestView,
        Stretch,
        TrafficView,
        View,
    )
    from preble.sched.scheduler import GlobalScheduler

_HOMES = {
    "cost": ("CostModel",),
    "cost_fit": ("FittedCost",),
    "cost_presets": ("PRESETS", "make_cost"),
    "events": (
        "Admitted",
        "Event",
        "Evicted",
        "Finished",
        "Preempted",
        "Progressed",
        "ReplicaDown",
        "ReplicaUp",
        "StepTimed",
        "Stored",
    ),
    "explanation": ("Candidate", "Explanation"),
    "hot_prefixes": ("HotPrefix",),
    "placement": ("Moved", "Placement", "Waiting"),
    "policies": (
        "E2",
        "POLICIES",
        "Choice",
        "E2Paper",
        "Policy",
        "ReplicaView",
        "RequestView",
        "Stretch",
        "TrafficView",
        "View",
    ),
    "scheduler": ("GlobalScheduler",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "E2",
    "POLICIES",
    "PRESETS",
    "Admitted",
    "Candidate",
    "Choice",
    "CostModel",
    "E2Paper",
    "Event",
    "Evicted",
    "Explanation",
    "Finished",
    "FittedCost",
    "GlobalScheduler",
    "HotPrefix",
    "Moved",
    "Placement",
    "Policy",
    "Preempted",
    "Progressed",
    "ReplicaDown",
    "ReplicaUp",
    "ReplicaView",
    "RequestView",
    "StepTimed",
    "Stored",
    "Stretch",
    "TrafficView",
    "View",
    "Waiting",
    "make_cost",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value
