"""Workloads made to order: the traffic of the Preble paper and of today, in any amount, without a data file."""

from preble.sim.workloads.arrivals import ARRIVALS, arrival_times
from preble.sim.workloads.make import POPULARITY, WORKLOADS, make_workload
from preble.sim.workloads.workload import Means, Workload

__all__ = ["ARRIVALS", "POPULARITY", "WORKLOADS", "Means", "Workload", "arrival_times", "make_workload"]
