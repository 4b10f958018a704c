"""A real run of the CPU engine: what was asked of it when, how long answers took, and every step of its replicas."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray

from preble.bench.fidelity.requests import FIRST_TOKEN, prompt_ids
from preble.bench.shapes import SMALL, write_checkpoint
from preble.cluster import Cluster
from preble.engine.messages import Ready, StepReport
from preble.outputs import GenerationOutput
from preble.replica.base import Listener, Replica
from preble.sched.events import StepTimed
from preble.sim.trace import Trace

Array = NDArray[np.float64]

WARM_UPS = 4
"""Short requests before those that count: the first step of a thread is slow."""
WARM_UP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas of a recording."""

    model: str = SMALL.name
    """The shape of the checkpoint, whose weights are random."""
    replicas: int = 2
    policy: str = "e2"
    order: str = "hrrn"
    page_size: int = 16
    kv_memory: str = "128MiB"
    """Of each replica."""
    max_batched_tokens: int = 512
    seed: int = 0

    @asynccontextmanager
    async def cluster(self) -> AsyncIterator[Cluster]:
        """The real thing, running on the CPU; its checkpoint exists only meanwhile."""
        with tempfile.TemporaryDirectory(prefix="preble-bench-") as folder:
            write_checkpoint(SMALL, Path(folder))
            async with Cluster(
                folder,
                replicas=self.replicas,
                devices=["cpu"],
                policy=self.policy,
                local_order=self.order,
                page_size=self.page_size,
                kv_memory=self.kv_memory,
                max_batched_tokens=self.max_batched_tokens,
                seed=self.seed,
            ) as cluster:
                yield cluster


@dataclass(frozen=True, slots=True)
class Step:
    """An engine step. Times are seconds since the recording began."""

    ended: float
    """When its replica's thread had the results."""
    taken_in: float
    """When the event loop had the report."""
    more: bool
    """Whether work was left, so that the next step began at once."""
    timed: StepTimed


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What was measured. Arrays have an entry per request, in seconds."""

    fleet: Fleet
    trace: Trace
    """What was sent, at the times at which it really was."""
    capacity_tokens: int
    """KV tokens of a replica."""
    steps: tuple[Step, ...]
    """Of all replicas, in the order in which their reports came."""
    ttft: Array
    e2e: Array
    queued: Array
    """Until the first step that worked on it."""
    cached_tokens: NDArray[np.int64]
    replica: NDArray[np.int64]
    seconds: float
    """From the first arrival to the last end."""

    @property
    def hit_rate(self) -> float:
        """Cached share of the prompt tokens."""
        return float(self.cached_tokens.sum() / sum(one.prompt_tokens for one in self.trace.requests))

    @property
    def busy_seconds(self) -> Array:
        """[replicas] in which it was computing, what it does between two steps included."""
        busy = np.zeros(self.fleet.replicas)
        for step in cycles(self.steps):
            busy[step.replica] += step.seconds
        return busy

    @property
    def utilization(self) -> float:
        """Mean share of the time in which replicas were computing."""
        return float(self.busy_seconds.mean() / self.seconds)

    @property
    def latency(self) -> float:
        """Seconds of a request's TTFT that no step accounts for, in the mean: until an idle replica's thread is awake,
        and until the event loop has taken in the report of a step."""
        reports = float(np.mean([step.taken_in - step.ended for step in self.steps]))
        return reports + float(np.mean(np.where(self._found_idle(), self.queued, 0.0)))

    def _found_idle(self) -> NDArray[np.bool_]:
        """[requests]: whether its replica had nothing to do when it came."""
        idle = np.ones(len(self.queued), np.bool_)
        arrived = np.array([one.arrival for one in self.trace.requests])
        for replica in range(self.fleet.replicas):
            steps = [step for step in self.steps if step.timed.replica == replica]
            ends = np.array([0.0, *(step.ended for step in steps)])
            # After each end: until when it went on to compute, at once or after a pause.
            more = np.array([False, *(step.more for step in steps)])
            begins = np.array([*(step.ended - step.timed.seconds for step in steps), np.inf])
            before = np.searchsorted(ends, arrived, side="right") - 1
            waiting = (arrived < begins[before]) & ~more[before]
            idle &= waiting | (self.replica != replica)
        return idle


def cycles(steps: Iterable[Step]) -> list[StepTimed]:
    """The steps, each with the time from the one before it where its replica had work all along: what a replica does
    between two steps belongs to the later one."""
    before: dict[int, Step] = {}
    found = []
    for step in steps:
        last = before.get(step.timed.replica)
        seconds = step.ended - last.ended if last is not None and last.more else step.timed.seconds
        found.append(replace(step.timed, seconds=max(seconds, step.timed.seconds)))
        before[step.timed.replica] = step
    return found


class Tap:
    """Between the replicas and whom they report to: notes when steps end and when that is known."""

    def __init__(self, listener: Listener, loop: Callable[..., object]) -> None:
        self.steps: list[Step] = []
        self._listener = listener
        self._loop = loop

    def ready(self, replica: Replica, ready: Ready) -> None:
        """A replica can serve."""
        self._listener.ready(replica, ready)

    def reported(self, replica: Replica, report: StepReport) -> None:
        """A replica finished a step; called from its thread."""
        ended = time.monotonic()
        more = bool(report.stats.running or report.stats.waiting)
        self._listener.reported(replica, report)
        # In the loop, functions run in the order in which they are posted: the report was taken in just before.
        self._loop(self._taken_in, report, ended, more)

    def failed(self, replica: Replica, cause: BaseException) -> None:
        """A replica stopped on an error."""
        self._listener.failed(replica, cause)

    def ended(self, replica: Replica) -> None:
        """A replica is gone."""
        self._listener.ended(replica)

    def _taken_in(self, report: StepReport, ended: float, more: bool) -> None:
        now = time.monotonic()
        self.steps += [Step(ended, now, more, event) for event in report.events if isinstance(event, StepTimed)]


async def record(fleet: Fleet, trace: Trace, *, at_once: bool = False, advance: Callable[[], None]) -> Recording:
    """Send a trace's requests to a new cluster at their times, or all of them at once; calls `advance` per answer."""
    prompts = [prompt_ids(trace, one, SMALL.vocabulary) for one in trace.requests]
    outputs: dict[int, GenerationOutput] = {}
    sent = [0.0] * len(prompts)
    async with fleet.cluster() as cluster:
        tap = _tapped(cluster)
        await _warm_up(cluster)
        start = time.monotonic()

        async def ask(number: int) -> None:
            sent[number] = time.monotonic() - start
            outputs[number] = await cluster.generate(
                prompts[number], max_tokens=trace.requests[number].output_tokens, temperature=0.0, ignore_eos=True
            )
            advance()

        async with anyio.create_task_group() as group:
            for number, one in enumerate(trace.requests):
                if not at_once:
                    await anyio.sleep(max(start + one.arrival - time.monotonic(), 0.0))
                group.start_soon(ask, number)
        seconds = time.monotonic() - start
        capacity = cluster.stats().replicas[0].pages_total * fleet.page_size
    order = sorted(range(len(sent)), key=sent.__getitem__)
    done = [outputs[number] for number in order]
    return Recording(
        fleet=fleet,
        trace=replace(trace, requests=tuple(replace(trace.requests[number], arrival=sent[number]) for number in order)),
        capacity_tokens=capacity,
        steps=tuple(
            replace(step, ended=step.ended - start, taken_in=step.taken_in - start)
            for step in tap.steps
            if step.ended > start  # not one of the warm-up
        ),
        ttft=np.array([one.timing.ttft for one in done]),
        e2e=np.array([one.timing.total for one in done]),
        queued=np.array([one.timing.queued for one in done]),
        cached_tokens=np.array([one.usage.cached_tokens for one in done]),
        replica=np.array([one.placement.replica for one in done]),
        seconds=seconds,
    )


def _tapped(cluster: Cluster) -> Tap:
    """Listens in on the replicas of a running cluster, all of which are idle."""
    dispatcher: Any = cluster._dispatcher
    tap = Tap(dispatcher.roster, dispatcher._call_soon)
    for replica in dispatcher.roster._lives:
        replica._listener = tap
    return tap


async def _warm_up(cluster: Cluster) -> None:
    """Until every replica has computed something. In a namespace of its own: others share nothing with it."""
    generator = np.random.default_rng(0)
    for _ in range(WARM_UPS):
        prompt = generator.integers(FIRST_TOKEN, SMALL.vocabulary, WARM_UP_TOKENS, dtype=np.int32)
        await cluster.generate(prompt, max_tokens=4, temperature=0.0, ignore_eos=True, namespace="warm-up")
