"""Tests for placement policies of your own: `check_policy`, the state machine behind it, and strategies.

Needs hypothesis, which `preble[test]` brings; `preble.sched` does not load it.
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("preble.sched.testing needs hypothesis; install it, or preble[test]") from error

from preble.sched.testing.arrivals import Arrival, arrivals, bursty_times, namespaces, steady_times
from preble.sched.testing.checking import check_policy, machine_for
from preble.sched.testing.deliveries import deliveries
from preble.sched.testing.e2_machine import E2Machine
from preble.sched.testing.e2_paper_machine import E2PaperMachine
from preble.sched.testing.machine import SchedulerMachine
from preble.sched.testing.prompts import continuations, prompt_families, prompts
from preble.sched.testing.token_cost import TokenCost
from preble.sched.testing.traces import leads_to

__all__ = [
    "Arrival",
    "E2Machine",
    "E2PaperMachine",
    "SchedulerMachine",
    "TokenCost",
    "arrivals",
    "bursty_times",
    "check_policy",
    "continuations",
    "deliveries",
    "leads_to",
    "machine_for",
    "namespaces",
    "prompt_families",
    "prompts",
    "steady_times",
]
