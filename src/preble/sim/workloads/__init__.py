"""Workloads made to order: the traffic of the Preble paper and of today, in any amount, without a data file.

At the sizes of the paper's experiments the five workloads of its study have its mean lengths and requests per key
portion. Its share of shared tokens is met twice over: within 3 % by what an endless cache would find, request by
request, and within a tenth by what another request, earlier or later, has too; in workloads with few requests per
prefix one figure cannot be both.
"""

from preble.sim.workloads.arrivals import ARRIVALS, arrival_times
from preble.sim.workloads.make import POPULARITY, WORKLOADS, make_workload
from preble.sim.workloads.workload import Means, Workload

__all__ = ["ARRIVALS", "POPULARITY", "WORKLOADS", "Means", "Workload", "arrival_times", "make_workload"]
