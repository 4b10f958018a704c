"""How many replicas a trace needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from preble.errors import InvalidRequest
from preble.sched.policies import Policy, make_policy
from preble.sim.outcome import Outcome, distribution
from preble.sim.settings import Settings
from preble.sim.simulate import simulate
from preble.sim.slo import SLO
from preble.sim.trace import Trace

Watch: TypeAlias = AbstractContextManager[Callable[[], None]]


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of the trace on one number of replicas."""

    replicas: int
    """How many there were."""
    requests: int
    """Requests in the trace."""
    completed: int
    """… of which so many were answered."""
    good: int
    """… of which so many kept the SLO."""
    enough: bool
    """Whether all were completed, and the share asked for was good."""
    ttft_p99: float | None
    """Seconds; `None` where no request has such a figure."""
    tpot_p99: float | None
    """Seconds; `None` where no request has such a figure."""
    utilization: float
    """Mean share of the time in which replicas were computing."""

    @classmethod
    def of(cls, outcome: Outcome, attain: float) -> Probe:
        """From a simulation."""
        return cls(
            replicas=outcome.settings.replicas,
            requests=outcome.requests,
            completed=outcome.completed,
            good=outcome.good,
            enough=outcome.completed == outcome.requests and outcome.good >= _fewest_good(outcome.requests, attain),
            ttft_p99=distribution(outcome.ttft)["p99"],
            tpot_p99=distribution(outcome.tpot)["p99"],
            utilization=outcome.utilization,
        )

    @property
    def attainment(self) -> float:
        """Share of all requests that kept the SLO."""
        return self.good / self.requests

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {
            "replicas": self.replicas,
            "completed": self.completed,
            "good": self.good,
            "attainment": self.attainment,
            "enough": self.enough,
            "ttft_p99": self.ttft_p99,
            "tpot_p99": self.tpot_p99,
            "utilization": self.utilization,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """How many replicas it takes, and how that is known."""

    policy: str
    """Name of the policy."""
    slo: SLO
    """The bounds that a good request keeps."""
    attain: float
    """The share of the requests that has to be good."""
    max_replicas: int
    """No more were tried."""
    requests: int
    """Requests in the trace."""
    replicas: int | None
    """The answer; `None` where there is none up to `max_replicas`."""
    hopeless: int
    """Requests that cannot keep the SLO on any number of replicas: they take too long even on an idle one that has as
    much of their prompts in its cache as it can have, or their KV does not fit on it."""
    too_long: int
    """… of which these do not fit. One of them is enough for there to be no answer."""
    probes: tuple[Probe, ...]
    """In the order in which they were made; none where `hopeless` alone rules out an answer."""

    @property
    def impossible(self) -> bool:
        """Whether no number of replicas can be enough."""
        return bool(self.too_long) or self.requests - self.hopeless < _fewest_good(self.requests, self.attain)

    def probe(self, replicas: int) -> Probe | None:
        """What came of this many; `None` if they were not tried."""
        return next((one for one in self.probes if one.replicas == replicas), None)

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {
            "policy": self.policy,
            "replicas": self.replicas,
            "impossible": self.impossible,
            "hopeless": self.hopeless,
            "too_long": self.too_long,
            "probes": [one.to_dict() for one in self.probes],
        }


def plan(
    trace: Trace,
    settings: Settings,
    slo: SLO,
    *,
    policy: str | Callable[[], Policy] = "e2",
    attain: float = 0.99,
    max_replicas: int = 256,
    probed: Callable[[Probe], None] = lambda probe: None,
    watch: Callable[[int], Watch] = lambda replicas: nullcontext(_nothing),
) -> Plan:
    """Find how many replicas serve a trace so that nearly all requests keep an SLO.

    The number is doubled until it is enough, then narrowed down by bisection. So the answer is enough and one replica
    less was tried and is not, but for an answer that is the smallest fleet there can be: 1, or as many as `settings`
    names in its failures and slowness. More replicas need not be better, as every number of them gives other
    placements: there may be a smaller number, further down, that happens to be enough, and a larger one that is not.
    `Plan.probes` tells what was tried.

    Args:
        trace: the requests, at the rate to plan for.
        settings: the fleet; its `replicas` do not count.
        slo: what a request is to keep.
        policy: name of a policy, or what makes a fresh one of your own for every simulation.
        attain: share of the requests that must keep the SLO. All must be completed.
        max_replicas: the largest number to try.
        probed: called with every number tried.
        watch: called with every number about to be tried, for a context around the simulation; the function that it
            gives is called whenever a request has ended.

    Raises:
        InvalidRequest: an argument is out of its range, or there is no such policy, order or cost model.
    """
    if not trace.requests:
        raise InvalidRequest(f"trace {trace.name!r} has no request to plan for")
    if not 0 < attain <= 1:
        raise InvalidRequest(f"attain must be a share above 0 and at most 1, not {attain}")
    named = [failure.replica + 1 for failure in settings.failures]
    fewest = max(1, len(settings.slowness), *named)
    if max_replicas < fewest:
        raise InvalidRequest(f"max_replicas must be at least {fewest}, the replicas that are named, not {max_replicas}")
    make = policy if callable(policy) else lambda: make_policy(policy)
    name = make().name
    probes: list[Probe] = []

    def is_enough(replicas: int) -> bool:
        fleet = replace(settings, replicas=replicas)
        with watch(replicas) as advance:
            probe = Probe.of(simulate(trace, fleet, (make(),), slo=slo, advance=advance)[0], attain)
        probes.append(probe)
        probed(probe)
        return probe.enough

    too_long = _too_long(trace, settings)
    hopeless = too_long | (_least_seconds(trace, settings) > [slo.ttft, slo.tpot, slo.e2e]).any(axis=1)
    impossible = too_long.any() or np.count_nonzero(~hopeless) < _fewest_good(len(hopeless), attain)
    return Plan(
        policy=name,
        slo=slo,
        attain=attain,
        max_replicas=max_replicas,
        requests=len(trace.requests),
        replicas=None if impossible else smallest(fewest, max_replicas, is_enough),
        hopeless=int(np.count_nonzero(hopeless)),
        too_long=int(np.count_nonzero(too_long)),
        probes=tuple(probes),
    )


def _nothing() -> None: ...


def smallest(fewest: int, most: int, is_enough: Callable[[int], bool]) -> int | None:
    """A number from `fewest` to `most` that is enough, while one less is not or is none of them; `None` if none of
    those tried was enough. These are doublings of `fewest` with `most`, then bisection; none is tried twice."""
    below, above = fewest - 1, fewest
    while not is_enough(above):
        if above == most:
            return None
        below, above = above, min(2 * above, most)
    while above - below > 1:
        middle = (below + above) // 2
        if is_enough(middle):
            above = middle
        else:
            below = middle
    return above


def _fewest_good(requests: int, attain: float) -> int:
    """How many requests the share amounts to. 0.99 of 100 are 99, whatever the product of the two floats is."""
    return math.ceil(round(requests * attain, 6))


def _too_long(trace: Trace, settings: Settings) -> NDArray[np.bool_]:
    """[requests]: whether no replica can hold it."""
    room = settings.kv_tokens // settings.page_size * settings.page_size
    return np.array([one.prompt_tokens + one.output_tokens > room for one in trace.requests])


def _least_seconds(trace: Trace, settings: Settings) -> NDArray[np.float64]:
    """float64 [requests, 3]: TTFT, TPOT and end-to-end seconds that a request takes at least: by itself on the fastest
    replica, with as much in its cache as any replica can have by then."""
    cost, chunk = settings.cost_model, settings.max_batched_tokens
    fastest = min(1.0, *settings.slowness, 1.0)
    known = _cacheable(trace) if settings.closed_loop else trace.known_tokens
    least = np.empty((len(trace.requests), 3))
    for number, one in enumerate(trace.requests):
        starts = range(int(known[number]), one.prompt_tokens, chunk)
        ttft = sum(cost.prefill_seconds(min(chunk, one.prompt_tokens - start), start) for start in starts)
        tpot = cost.decode_seconds(1, one.prompt_tokens + 1) if one.output_tokens > 1 else 0.0
        least[number] = ttft, tpot, ttft + (one.output_tokens - 1) * tpot
    return fastest * least


def _cacheable(trace: Trace) -> NDArray[np.int64]:
    """[requests]: tokens that it shares with any other request at most: in a closed loop, their order is not known."""
    uses = Counter(block for one in trace.requests for block in one.blocks.tolist())
    shared = np.zeros(len(trace.requests), np.int64)
    for number, one in enumerate(trace.requests):
        blocks = one.blocks.tolist()
        own = next((position for position, block in enumerate(blocks) if uses[block] == 1), len(blocks))
        shared[number] = min(own * trace.block_size, one.prompt_tokens - 1)
    return shared
