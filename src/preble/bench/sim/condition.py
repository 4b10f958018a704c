"""What goes wrong in a setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from preble.sched.by_name import by_name
from preble.sim.settings import Failure, Settings
from preble.sim.slow_cost import SlowCost
from preble.sim.trace import Trace

EVENT_DELAY = 0.5
"""Seconds."""
FACTOR = 2.0


def _delayed(fleet: Settings, _: Trace) -> Settings:
    return replace(fleet, event_delay=EVENT_DELAY)


def _dear(fleet: Settings, _: Trace) -> Settings:
    return replace(fleet, believed_cost=SlowCost(fleet.cost_model, FACTOR))


def _cheap(fleet: Settings, _: Trace) -> Settings:
    return replace(fleet, believed_cost=SlowCost(fleet.cost_model, 1 / FACTOR))


def _slow(fleet: Settings, _: Trace) -> Settings:
    return replace(fleet, slowness=(FACTOR,))


def _lost(fleet: Settings, trace: Trace) -> Settings:
    return replace(fleet, failures=(Failure(0, trace.duration / 2),))


def _closed(fleet: Settings, _: Trace) -> Settings:
    return replace(fleet, closed_loop=True)


CONDITIONS: dict[str, Callable[[Settings, Trace], Settings]] = {
    "plain": lambda fleet, _: fleet,
    "delayed": _delayed,
    "dear": _dear,
    "cheap": _cheap,
    "slow-replica": _slow,
    "lost-replica": _lost,
    "closed-loop": _closed,
}
"""By name: nothing; the global scheduler hears of everything 0.5 s late; the schedulers think at first that steps take
twice as long as they do, or half as long; one replica takes twice as long for its steps; one is lost, with all that it
holds, in the middle; sessions send their next request when the one before has been answered."""


def in_condition(name: str, fleet: Settings, trace: Trace) -> Settings:
    """The fleet, in this condition.

    Raises:
        InvalidRequest: there is no such condition.
    """
    return by_name("condition", name, CONDITIONS)(fleet, trace)
