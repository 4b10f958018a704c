"""The measurements: workloads, few and many replicas, very many distinct prompts, policies."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from preble.bench.sched.plan import MANY_REPLICAS, REPLICAS, WINDOW, Plan
from preble.bench.sched.results import FlatResult, FleetResult, PolicyResult, Segment, Summary, WorkloadResult
from preble.bench.sched.traffic import BLOCK, CAPACITY_TOKENS, RATE, Traffic
from preble.bench.sched.workload import Workload, distinct_prompts
from preble.progress import progress_bar
from preble.sched import POLICIES, GlobalScheduler

FLAT_PAGE_SIZE = 64
"""`Cluster`'s default, and little for the fake replicas to do."""
POLICY_PAGE_SIZE = 16
FLEET_PAGE_SIZE = 16


def make_traffic(workload: Workload, page_size: int, *, replicas: int = REPLICAS, policy: str = "e2") -> Traffic:
    """A new scheduler with nothing in it, and requests for it. What earlier ones left is collected first."""
    gc.collect()
    scheduler = _scheduler(replicas, page_size, policy)
    return Traffic(scheduler, workload.prompts(seed=0), replicas=replicas, page_size=page_size)


def measure_workloads(plan: Plan) -> Iterator[WorkloadResult]:
    """Every workload with every page size, the output of a request reported as two events and token by token. Both
    take turns at one scheduler whose window is full."""
    for page_size in plan.page_sizes:
        for workload in plan.workloads:
            label = f"{workload.name}, {page_size}-token pages"
            traffic = make_traffic(workload, page_size)
            results = [WorkloadResult(workload, page_size, streamed) for streamed in (False, True)]
            with _blocks(plan.fill + 2 * plan.rounds * plan.measured, label) as advance:
                traffic.run(plan.fill, advance=advance)
                traffic.forget_hits()
                for _ in range(plan.rounds):
                    for result in results:
                        times = traffic.run(plan.measured, streamed=result.streamed, advance=advance)
                        result.rounds.append(Summary.of(times))
            traffic.drain()
            for result in results:
                result.hit_rate = traffic.hit_rate
                result.tree_pages = traffic.scheduler.tree_pages
                yield result


def measure_fleets(plan: Plan) -> FleetResult:
    """Few and many replicas, with as many requests in flight on each, in turns."""
    result = FleetResult()
    fleets = {replicas: make_traffic(plan.tool_use, FLEET_PAGE_SIZE, replicas=replicas) for replicas in result.whole}
    with _blocks(len(fleets) * (plan.fill + plan.rounds * plan.measured), f"{MANY_REPLICAS} replicas") as advance:
        for traffic in fleets.values():
            traffic.run(plan.fill, advance=advance)
        for _ in range(plan.rounds):
            for replicas, traffic in fleets.items():
                times = traffic.run(plan.measured, advance=advance)
                result.whole[replicas].append(float(times.whole.mean()) / 1e3)
                result.submit[replicas].append(float(times.submit.mean()) / 1e3)
    for traffic in fleets.values():
        traffic.drain()
    return result


def measure_flatness(plan: Plan) -> FlatResult:
    """Prompts that have nothing in common, until the first ones are long forgotten."""
    gc.collect()
    prompt_tokens = plan.tool_use.prompt_tokens
    traffic = Traffic(
        _scheduler(REPLICAS, FLAT_PAGE_SIZE, "e2"),
        distinct_prompts(prompt_tokens, seed=0),
        replicas=REPLICAS,
        page_size=FLAT_PAGE_SIZE,
    )
    result = FlatResult(prompt_tokens, FLAT_PAGE_SIZE)
    with _blocks(plan.distinct, "distinct prompts") as advance:
        while traffic.submitted < plan.distinct:
            times = traffic.run(min(plan.segment, plan.distinct - traffic.submitted), advance=advance)
            result.segments.append(
                Segment(
                    prompts=traffic.submitted,
                    microseconds=float(times.whole.mean()) / 1e3,
                    tree_pages=traffic.scheduler.tree_pages,
                    bound_pages=_bound(traffic),
                    resident_bytes=resident_bytes(),
                )
            )
    traffic.drain()
    return result


def measure_policies(plan: Plan) -> Iterator[PolicyResult]:
    """Every policy that has a name, once."""
    for name in POLICIES:
        traffic = make_traffic(plan.tool_use, POLICY_PAGE_SIZE, policy=name)
        traffic.run(plan.policy_fill)
        traffic.forget_hits()
        times = traffic.run(plan.measured)
        traffic.drain()
        yield PolicyResult(name, Summary.of(times), traffic.hit_rate)


def resident_bytes() -> int | None:
    """Memory of this process, where the system tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def _scheduler(replicas: int, page_size: int, policy: str) -> GlobalScheduler:
    return GlobalScheduler(
        replicas=replicas, capacity_tokens=CAPACITY_TOKENS, page_size=page_size, policy=policy, seed=0
    )


def _bound(traffic: Traffic) -> int:
    """Most pages that the tree may have when no two prompts share any: what replicas hold, and what was used within
    the window, be it at the beginning or at the end of a request."""
    used = min(traffic.submitted, int(WINDOW * RATE) + traffic.most_in_flight)
    return traffic.resident_pages + used * traffic.pages_per_request


@contextmanager
def _blocks(requests: int, label: str) -> Iterator[Callable[[], None]]:
    """A bar that advances by thousands."""
    with progress_bar(max(requests // BLOCK, 1), shown=True, label=f"{label}, thousands") as advance:
        yield advance
