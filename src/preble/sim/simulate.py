"""Several policies on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preble.sched.policies import Policy
from preble.sim.outcome import Outcome, outcome_of
from preble.sim.router import Router
from preble.sim.settings import Settings
from preble.sim.simulation import Simulation
from preble.sim.slo import SLO
from preble.sim.trace import Trace

DEFAULT_SLO = SLO()


def simulate(
    trace: Trace,
    settings: Settings,
    policies: Sequence[str | Policy | Router] = ("e2",),
    *,
    slo: SLO = DEFAULT_SLO,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Run a trace once per policy, all else being equal; the outcomes in their order.

    Args:
        trace: the requests.
        settings: the fleet.
        policies: names, or policies of your own: fresh ones, as they keep what they learn.
        slo: what counts as good.
        advance: called whenever a request has ended.

    Raises:
        InvalidRequest: there is no policy, order or cost model of that name.
    """
    outcomes: list[Outcome] = []
    for policy in policies:
        simulation = Simulation(trace, settings, policy, advance=advance)
        simulation.run()
        outcomes.append(outcome_of(simulation, slo))
    return outcomes
