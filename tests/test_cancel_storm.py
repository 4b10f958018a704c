"""Thousands of requests that end at random moments, in every way there is: nothing leaks, no step waits for it."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

import preble
from preble import Cluster
from preble.engine.messages import Abort, Submit
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence

pytestmark = pytest.mark.anyio

REQUESTS = 5_000
"""Under each of the two event loops."""
AT_ONCE = 100
MAX_PENDING = 60
TEXT = "You are a helpful assistant. Answer briefly and to the point, in words that everybody knows. " * 40
LONGEST_STALL = 0.05
"""Seconds."""
MOMENTS = {
    "before the door",
    "at the door",
    "in the cluster's queue",
    "on a replica",
    "in decode",
    "after the end",
}
"""Where a request is when it is cancelled or aborted. At the door it waits for a slot, or is being tokenized."""


class Watched:
    """How long each engine's thread was kept from its steps by what it was told, and the event loop's by ending
    requests: processor time of that thread alone, whatever else the machine does."""

    def __init__(self, cluster: Cluster) -> None:
        self.intakes: list[float] = []
        """Seconds in which an engine took in the aborts that had come since its last step, …"""
        self.aborts: list[float] = []
        """… and each of them."""
        self.ends: list[float] = []
        """Seconds in which the dispatcher ended a request, or gave its room to others."""
        self.refills = 0
        """How often it did that."""
        self.most_at_once = 0
        """Aborts between two steps, at most."""
        for life in lives(cluster):
            if hasattr(life, "_engine"):
                self._watch_engine(life._engine)
        dispatcher = cluster._dispatcher
        for name in ("end", "_refill"):
            self._watch(dispatcher, name)

    def longest(self) -> float:
        """Seconds."""
        return max([*self.intakes, *self.ends])

    def figures(self) -> str:
        """The longest of each, in milliseconds."""
        longest = {
            "intake": max(self.intakes, default=0.0),
            "abort": max(self.aborts, default=0.0),
            "end": max(self.ends),
        }
        text = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in longest.items())
        return f"longest: {text}; {len(self.aborts)} aborts, {self.most_at_once} at most between two steps"

    def _watch(self, dispatcher: Any, name: str) -> None:
        original = getattr(dispatcher, name)

        def timed(*args: Any) -> Any:
            self.refills += name == "_refill"
            began = time.thread_time()
            result = original(*args)
            self.ends.append(time.thread_time() - began)
            return result

        setattr(dispatcher, name, timed)

    def _watch_engine(self, engine: Any) -> None:
        obey, step = engine.obey, engine.step
        batch = {"seconds": 0.0, "aborts": 0}

        def timed(command: Any) -> None:
            began = time.thread_time()
            obey(command)
            spent = time.thread_time() - began
            if isinstance(command, Abort):
                batch["seconds"] += spent
                batch["aborts"] += 1
                self.aborts.append(spent)
            else:
                assert isinstance(command, Submit)

        def stepping() -> Any:
            if batch["seconds"]:
                self.intakes.append(batch["seconds"])
                self.most_at_once = max(self.most_at_once, int(batch["aborts"]))
                batch.update(seconds=0.0, aborts=0)
            return step()

        engine.obey, engine.step = timed, stepping


def lives(cluster: Cluster) -> list[Any]:
    return [post.life for post in cluster._dispatcher.roster._posts.values()]


async def nothing_is_left(cluster: Cluster) -> None:
    """Needs no time limit: a hang is the failure."""
    gc.collect()  # streams that were dropped
    dispatcher, scheduler = cluster._dispatcher, cluster._dispatcher._scheduler

    def busy() -> bool:
        stats = cluster.stats()
        return bool(
            stats.pending
            or any(scheduler.in_flight(books.replica) for books in scheduler.replicas)
            or any(one.running or one.waiting or one.pages_in_use for one in stats.replicas)
        )

    while busy():
        await anyio.lowlevel.checkpoint()
    assert (cluster._door.free, cluster._door.waiting) == (cluster._door.limit, 0)
    assert not cluster._door._classes
    assert not cluster._reception.at_the_door
    assert not dispatcher._flights
    assert not dispatcher._branches
    assert not scheduler.waiting
    scheduler.check()
    for one in cluster.stats().replicas:
        assert one.pages_free + one.pages_cached == one.pages_total
    for life in lives(cluster):
        if hasattr(life, "_engine"):
            engine = life._engine
            assert not engine.scheduler._by_id
            engine.scheduler.check()


@asynccontextmanager
async def serving(
    model: Path, workers: str, max_pending: int = MAX_PENDING, policy: str = "e2"
) -> AsyncIterator[Cluster]:
    threads = set(threading.enumerate())
    async with Cluster(
        model,
        replicas=2,
        page_size=16,
        kv_memory="256KiB",
        dtype="float32",
        max_batched_tokens=256,
        max_pending=max_pending,
        policy=policy,
        workers=workers,
    ) as cluster:
        yield cluster
        await nothing_is_left(cluster)
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    # Pools of idle threads belong to the event loops.
    assert not [name for name in left if "preble" in name.lower()], left


class Storm:
    """Requests that are ended by task cancellation, timeout, `abort`, `break`, or dropping the stream."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.rng = random.Random(seed)
        self.ways = Counter[str]()
        self.seen = Counter[str]()
        """Where requests were when they were ended from outside."""
        self.ended: set[str] = set()
        self.failures: set[str] = set()

    async def run(self, requests: int) -> None:
        numbers = iter(range(requests))

        async def caller() -> None:
            for number in numbers:
                await self._one(str(number))

        async with anyio.create_task_group() as group:
            for _ in range(AT_ONCE):
                group.start_soon(caller)

    async def _one(self, name: str) -> None:
        rng = self.rng
        # Long texts are tokenized in a thread; equal beginnings share pages.
        length = rng.choice([rng.randrange(1, 80), rng.randrange(80, 200)])
        prompt = TEXT[:length] + name
        options: dict[str, Any] = {
            "max_tokens": rng.choice([1, 3, rng.randrange(1, 12)]),
            "request_id": name,
            "priority": rng.randrange(3),
            "n": rng.choice([1, 1, 1, 1, 3]),
            "ignore_eos": True,
        }
        way = rng.choice([self._cancelled, self._timed_out, self._aborted, self._left, self._dropped, self._closed])
        self.ways[way.__name__] += 1
        if rng.random() < 0.02:
            prompt = TEXT * 20  # read in a thread, and then it is too long
        try:
            await way(prompt, options)
        except* preble.PromptTooLong:
            self.ways["too long"] += 1

    async def _pass(self, most: int = 60) -> None:
        for _ in range(self.rng.randrange(most)):
            await anyio.lowlevel.checkpoint()

    async def _cancelled(self, prompt: str, options: dict[str, Any]) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._patient, prompt, options)
            await self._moment(options["request_id"])
            group.cancel_scope.cancel()

    async def _timed_out(self, prompt: str, options: dict[str, Any]) -> None:
        timeout = self.rng.choice([1e-9, 1e-3, 0.02, 0.2])
        with suppress(preble.RequestTimeout):
            await self.cluster.generate(prompt, timeout=timeout, **options)

    async def _aborted(self, prompt: str, options: dict[str, Any]) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._patient, prompt, options)
            await self._moment(options["request_id"])
            self.cluster.abort(options["request_id"])

    async def _left(self, prompt: str, options: dict[str, Any]) -> None:
        """Out of the block, whatever has come."""
        chunks = self.rng.randrange(4)
        async with self.cluster.stream(prompt, **options) as stream:
            while chunks and await anext(stream, None) is not None:
                chunks -= 1

    async def _dropped(self, prompt: str, options: dict[str, Any]) -> None:
        """A stream that nobody closes."""
        chunks = self.rng.randrange(4)
        async for _ in self.cluster.stream(prompt, **options):
            chunks -= 1
            if chunks < 0:
                break

    async def _closed(self, prompt: str, options: dict[str, Any]) -> None:
        """While another task waits for its next chunk, or after the end."""
        async with self.cluster.stream(prompt, **options) as stream, anyio.create_task_group() as group:
            group.start_soon(self._drain, stream)
            await self._pass()
            stream.close()
        with suppress(preble.ClusterStateError):  # no replica took it
            assert stream.output.finish_reason in ("abort", "length")

    async def _drain(self, stream: preble.Stream) -> None:
        async for _ in stream:
            pass

    async def _patient(self, prompt: str, options: dict[str, Any]) -> None:
        try:
            await self.cluster.generate(prompt, **options)
        except preble.RequestFailed as error:
            self.failures.add(str(error).partition(": ")[2])
        finally:
            self.ended.add(options["request_id"])

    async def _moment(self, name: str) -> None:
        """Wait for a moment chosen at random, and note where the request is then."""
        goal = self.rng.choice(sorted(MOMENTS))
        while (where := self._where(name)) not in (goal, "after the end"):
            await anyio.lowlevel.checkpoint()
        self.seen[where] += 1
        self.ended.discard(name)

    def _where(self, name: str) -> str:
        flight = self.cluster._dispatcher._flights.get(name)
        if flight is not None:
            first = flight.branches[0]
            if first.replica is None:
                return "in the cluster's queue"
            return "in decode" if first.token_ids else "on a replica"
        if name in self.ended:
            return "after the end"
        return "at the door" if name in self.cluster._reception.at_the_door else "before the door"


@pytest.mark.parametrize("seed", [0])
async def test_requests_that_end_early_leak_nothing_and_stall_nobody(llama: Path, seed: int) -> None:
    await storm(llama, seed, REQUESTS, "thread")


@pytest.mark.long
@pytest.mark.parametrize("workers", ["thread", "process"])
@pytest.mark.parametrize("seed", range(1, 4))
async def test_more_storms(llama: Path, seed: int, workers: str) -> None:
    await storm(llama, seed, 10_000, workers)


async def storm(llama: Path, seed: int, requests: int, workers: str) -> None:
    async with serving(llama, workers) as cluster:
        watched = Watched(cluster)
        storm = Storm(cluster, seed)
        await storm.run(requests)
        await nothing_is_left(cluster)
    print(storm.ways, storm.seen, watched.figures())
    assert sum(storm.ways.values()) == requests + storm.ways["too long"]
    assert set(storm.seen) >= MOMENTS - {"in the cluster's queue"}, storm.seen  # that takes a crowd, as below
    assert storm.failures == {"aborted before a replica took it"}
    assert watched.longest() < LONGEST_STALL, watched.figures()


@pytest.mark.parametrize("policy", ["e2", "round-robin"])
async def test_a_crowd_that_leaves_at_once_stalls_no_step(llama: Path, policy: str) -> None:
    """All in one turn of the event loop, wherever they are; those who wait are looked at once."""
    async with serving(llama, "thread", max_pending=1500, policy=policy) as cluster:
        await cluster.pause()
        watched = Watched(cluster)
        async with anyio.create_task_group() as group:
            for number in range(2000):
                prompt = [number % 250 + 1, *[number // 250 + 1] * 40]
                group.start_soon(lambda prompt=prompt: cluster.generate(prompt, max_tokens=100, ignore_eos=True))
            while cluster.stats().pending < 1500 or cluster._door.waiting < 500:
                await anyio.lowlevel.checkpoint()
            assert (policy == "e2") == bool(cluster._dispatcher._scheduler.waiting)
            watched.refills = 0
            group.cancel_scope.cancel()
        await nothing_is_left(cluster)
    print(watched.figures())
    assert watched.longest() < LONGEST_STALL, watched.figures()
    assert watched.refills < 20


# What one cancellation costs does not depend on how many others wait


@pytest.mark.parametrize("order", ["fcfs", "hrrn", "preble"])
def test_an_abort_costs_no_walk_through_the_queue(order: str) -> None:
    """Counted in requests looked at: the processor's time would depend on the machine."""
    looked = {}
    for crowd in (250, 2000):
        scheduler = LocalScheduler(pages=64, page_size=16, max_batched_tokens=64, order=order)
        requests = [
            Sequence(
                str(number),
                np.array([number], np.int32),
                prompt_length=1,
                max_length=2,
                deadline=1e9 + number % 5 if number % 2 else None,
            )
            for number in range(crowd)
        ]
        for request in requests:
            scheduler.add(request, now=0.0)
        Looked.at = 0
        random.Random(0).shuffle(requests)
        for request in requests:
            request.__class__ = Looked
        for request in requests:
            scheduler.abort(request.request_id)
        looked[crowd] = Looked.at / crowd
        assert not scheduler.waiting
        scheduler.check()
    assert 1 <= looked[2000] < looked[250] + 20, looked


class Looked(Sequence):
    """Counts how often anybody compares it or asks for its age: a walk through a list does one of these."""

    __slots__ = ()
    at = 0

    def __eq__(self, other: object) -> bool:
        Looked.at += 1
        return self is other

    __hash__ = Sequence.__hash__

    def __getattribute__(self, name: str) -> Any:
        if name == "serial":
            Looked.at += 1
        return super().__getattribute__(name)
