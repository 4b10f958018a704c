"""Scheduling on a virtual clock: the production schedulers, with a cost model in place of the GPUs."""

from preble.sim.flight import Flight
from preble.sim.outcome import Outcome
from preble.sim.router import Router
from preble.sim.settings import Failure, Settings
from preble.sim.simulate import simulate
from preble.sim.simulation import Simulation
from preble.sim.slo import SLO
from preble.sim.trace import Trace, TracedRequest
from preble.sim.traces import FORMATS, read_trace, write_trace
from preble.sim.workloads import WORKLOADS, make_workload

__all__ = [
    "FORMATS",
    "SLO",
    "WORKLOADS",
    "Failure",
    "Flight",
    "Outcome",
    "Router",
    "Settings",
    "Simulation",
    "Trace",
    "TracedRequest",
    "make_workload",
    "read_trace",
    "simulate",
    "write_trace",
]
