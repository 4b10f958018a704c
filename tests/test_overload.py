"""More requests than can be served: all are answered or refused, nothing grows, and the work goes on as fast."""

from __future__ import annotations

import gc
import math
import os
import resource
import sys
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

import preble
from preble import Cluster
from preble.engine.messages import Pause

pytestmark = pytest.mark.anyio

MAX_PENDING = 16
TIMES_SATURATION = 10
PATIENCE = 6.0
"""The timeout of requests that wait, in units of the time that one spends in the full system."""
SHORT: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "ignore_eos": True}


def lives(cluster: Cluster) -> list[Any]:
    return [post.life for post in cluster._dispatcher.roster._posts.values()]


def engines(cluster: Cluster) -> list[Any]:
    """Those that live in this process."""
    return [life._engine for life in lives(cluster) if hasattr(life, "_engine")]


async def until(condition: Callable[[], bool]) -> None:
    """Needs no time limit: a hang is the failure."""
    while not condition():
        await anyio.lowlevel.checkpoint()


async def nothing_is_left(cluster: Cluster) -> None:
    """Every slot, request and page is given back."""
    dispatcher = cluster._dispatcher
    await until(lambda: not cluster.stats().pending and all(not one.running for one in cluster.stats().replicas))
    await until(lambda: all(life.idle for life in lives(cluster) if hasattr(life, "idle")))
    assert (cluster._door.free, cluster._door.waiting) == (cluster._door.limit, 0)
    assert not cluster._reception.at_the_door
    assert not dispatcher._flights
    assert not dispatcher._branches
    scheduler = dispatcher._scheduler
    assert not scheduler.waiting
    assert not any(scheduler.in_flight(books.replica) for books in scheduler.replicas)
    scheduler.check()
    for engine in engines(cluster):
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_in_use) == (0, 0, 0)
        assert stats.pages_free + stats.pages_cached == stats.pages_total
        engine.scheduler.check()


@asynccontextmanager
async def serving(model: Path, **options: Any) -> AsyncIterator[Cluster]:
    defaults = {"replicas": 2, "page_size": 16, "kv_memory": "1MiB", "dtype": "float32"}
    async with Cluster(model, **(defaults | options)) as cluster:
        yield cluster
        await nothing_is_left(cluster)


# Priorities and deadlines, in all three queues

LONG_PROMPT = 200
WAITS_AT: dict[str, dict[str, Any]] = {
    "door": {"max_pending": 4},
    "cluster": {"max_pending": 1000},
    "replica": {"max_pending": 1000, "policy": "round-robin"},
}
"""Where requests wait that a paused replica cannot start -> options that make them wait there."""


def waiting_at(cluster: Cluster, place: str) -> int:
    """How many wait there."""
    if place == "door":
        return cluster._door.waiting
    scheduler = cluster._dispatcher._scheduler
    return len(scheduler.waiting) if place == "cluster" else len(scheduler.in_flight(0))


async def crowd(cluster: Cluster, group: anyio.abc.TaskGroup, place: str, least: int, **options: Any) -> list[int]:
    """Paused, requests come until so many wait at that place; the list they put their numbers into when they end."""
    ended: list[int] = []
    numbers = count()

    async def one(number: int) -> None:
        prompt = [number % 250 + 1] * 20 + [7] * LONG_PROMPT
        await cluster.generate(prompt, **SHORT, **options)
        ended.append(number)

    while waiting_at(cluster, place) < least:
        before = cluster.stats().pending + cluster._door.waiting
        group.start_soon(one, next(numbers))
        await until(lambda before=before: cluster.stats().pending + cluster._door.waiting > before)
    return ended


@pytest.mark.parametrize("place", WAITS_AT)
async def test_high_priority_overtakes_wherever_requests_wait(llama: Path, place: str) -> None:
    async with serving(llama, replicas=1, max_running=1, **WAITS_AT[place]) as cluster:
        await cluster.pause()
        async with anyio.create_task_group() as group:
            low = await crowd(cluster, group, place, 10)
            already = waiting_at(cluster, place)
            order: list[str] = []

            async def one(name: str, priority: int) -> None:
                await cluster.generate([9] * LONG_PROMPT, **SHORT, priority=priority)
                order.append(f"{name} after {len(low)}")

            total = cluster.stats().pending + cluster._door.waiting
            for name, priority in (("high", 1), ("higher", 2)):
                group.start_soon(one, name, priority)
            await until(lambda: cluster.stats().pending + cluster._door.waiting == total + 2)
            assert waiting_at(cluster, place) == already + 2, f"they do not wait at the {place}"
            await cluster.resume()
        assert len(low) == total
        # What a replica has begun, or has a slot already, is not taken back.
        first = total - already
        assert [entry.split()[0] for entry in order] == ["higher", "high"]
        for entry in order:
            assert int(entry.split()[-1]) <= first + 1, f"{order}: {first} did not wait at the {place}"


async def test_whose_time_is_up_never_reaches_a_device_even_when_the_event_loop_sleeps(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the replica the deadlines have passed, and the event loop has not noticed: it does nothing, then goes on."""
    async with serving(llama, replicas=1, max_pending=400) as cluster:
        [engine], [life] = engines(cluster), lives(cluster)
        await cluster.generate([5] * LONG_PROMPT, **SHORT)
        await cluster.pause()
        async with anyio.create_task_group() as group:
            await crowd(cluster, group, "door", 30, timeout=600.0)
            await until(lambda: not life._inbox)
            waiting = len(cluster._dispatcher._scheduler.waiting)
            assert waiting
            assert engine.stats().waiting == 400 - waiting
            before = engine.computed_tokens
            later = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000.0)
            monkeypatch.setattr("preble.engine.engine.time", later)
            life.send(Pause(False))
            while engine.stats().waiting or not life.idle:
                os.sched_yield()  # blocks the event loop, so that nobody is told of anything
            assert len(cluster._dispatcher._scheduler.waiting) == waiting
            # Those of the cluster's queue now get their place on the replica, for nothing.
            await until(lambda: not cluster._dispatcher._scheduler.waiting)
            await until(lambda: not cluster._dispatcher._scheduler.in_flight(0))
            cluster._dispatcher._scheduler.check()
            assert cluster.stats().pending == 400, "their callers still wait for their time to be up"
            group.cancel_scope.cancel()
        assert engine.computed_tokens == before


@pytest.mark.parametrize("place", WAITS_AT)
async def test_a_timeout_while_waiting_is_a_timeout(llama: Path, place: str) -> None:
    async with serving(llama, replicas=1, max_running=1, **WAITS_AT[place]) as cluster:
        [engine] = engines(cluster)
        await cluster.pause()
        async with anyio.create_task_group() as group:
            served = await crowd(cluster, group, place, 3)
            for _ in range(3):
                with pytest.raises(preble.RequestTimeout) as caught:
                    await cluster.generate([3] * LONG_PROMPT, **SHORT, timeout=0.01)
                assert caught.value.partial is None
            total = cluster.stats().pending + cluster._door.waiting
            await cluster.resume()
        assert len(served) == total
        assert engine.generated_tokens == total


# Refusing, and what counts


async def test_who_is_not_refused_is_served(llama: Path) -> None:
    async with serving(llama, max_pending=4, overload="refuse") as cluster:
        await cluster.pause()
        async with anyio.create_task_group() as group:
            for number in range(2):
                group.start_soon(lambda number=number: cluster.generate([number + 1], max_tokens=3, n=2, seed=1))
            await until(lambda: cluster._door.free == 0)
            for call in (cluster.generate, lambda prompt, **options: cluster.stream(prompt, **options).__anext__()):
                with pytest.raises(
                    preble.ClusterOverloaded, match="4 of max_pending=4 requests are in flight"
                ) as caught:
                    await call("x", **SHORT)
                assert 0 < caught.value.retry_after <= 60
            with pytest.raises(preble.InvalidRequest, match="vocabulary"):
                await cluster.generate([9999], **SHORT)
            with pytest.raises(preble.InvalidRequest, match="empty"):
                await cluster.generate("", **SHORT)
            await cluster.resume()
        outputs = await cluster.generate_many([[number] for number in range(1, 30)], **SHORT)
        assert len(outputs) == 29, "many are the caller's own crowd, and wait"


async def test_a_request_counts_n_times(llama: Path) -> None:
    async with serving(llama, max_pending=4) as cluster:
        with pytest.raises(preble.InvalidRequest, match="n=5 is more than max_pending=4"):
            cluster.stream("x", n=5)
        output = await cluster.generate("x", n=4, max_tokens=2, seed=1)
        assert len(output.completions) == 4


async def test_a_waiting_prompt_is_not_tokenized(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(llama, max_pending=1) as cluster:
        tokenized: list[str] = []
        original = cluster._reception.tokenizer.encode

        def encode(text: str) -> Any:
            tokenized.append(text)
            return original(text)

        monkeypatch.setattr(cluster._reception.tokenizer, "encode", encode)
        await cluster.pause()
        async with anyio.create_task_group() as group:
            for text in ("first", "second", "third"):
                group.start_soon(lambda text=text: cluster.generate(text, **SHORT))
            await until(lambda: cluster._door.waiting == 2 and bool(tokenized))
            assert len(tokenized) == 1
            await cluster.resume()
        assert sorted(tokenized) == ["first", "second", "third"]


@pytest.mark.parametrize("mode", ["refuse", "wait"])
async def test_nothing_is_kept_of_who_was_not_served(llama: Path, mode: str) -> None:
    crowd, blocks = 500, []

    async def one(number: int) -> None:
        prompt, timeout = [number % 250 + 1] * 50, 1e-3 if mode == "wait" else None
        with pytest.raises((preble.ClusterOverloaded, preble.RequestTimeout)):
            await cluster.generate(prompt, **SHORT, timeout=timeout, priority=number % 7, request_id=f"r{number}")

    async with serving(llama, max_pending=4, overload=mode) as cluster:
        await cluster.pause()
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(lambda number=number: cluster.generate([number + 1], **SHORT))
            await until(lambda: cluster._door.free == 0)
            for _ in range(4):
                async with anyio.create_task_group() as refused:
                    for number in range(crowd):
                        refused.start_soon(one, number)
                gc.collect()
                blocks.append(sys.getallocatedblocks())
            await cluster.resume()
    assert blocks[3] - blocks[1] < crowd / 5, blocks


@pytest.mark.parametrize("overload", ["shrug", None, True])
def test_there_are_two_ways_to_take_an_overload(overload: Any) -> None:
    with pytest.raises(preble.InvalidRequest, match="overload must be 'wait' or 'refuse'"):
        Cluster("demo", overload=overload)


# Ten times as many requests as can be served


@dataclass
class Overload:
    """Requests at a steady rate, whatever becomes of them, and what became of them."""

    cluster: Cluster
    load: dict[str, Any]
    patience: float | None
    """The timeout of each."""
    outcomes: Counter[str] = field(default_factory=Counter)
    arrived: int = 0
    times: array[float] = field(default_factory=lambda: array("d"))
    """Seconds from getting a slot to the end, of each that was served."""
    suggestions: array[float] = field(default_factory=lambda: array("d"))
    most: Counter[str] = field(default_factory=Counter)
    """The longest that each queue was."""
    blocks: list[int] = field(default_factory=list)
    """Memory blocks in use by Python before, at the end of each quarter, and when all is over."""
    resident: list[int] = field(default_factory=list)
    """The process's memory then, in KiB."""

    async def run(self, rate: float, arrivals: int, prompts: Prompts) -> float:
        """Returns the goodput, in requests per second."""
        began = time.monotonic()
        async with anyio.create_task_group() as group:
            for quarter in range(1, 5):
                while self.arrived < arrivals * quarter // 4:
                    now = time.monotonic() - began
                    while self.arrived < min(now * rate, arrivals):
                        self.arrived += 1
                        group.start_soon(self._one, prompts.next())
                    self._look()
                    await anyio.sleep(0.005)
                self.blocks.append(sys.getallocatedblocks())
                self.resident.append(resident_kib())
            return self.outcomes["served"] / (time.monotonic() - began)

    async def _one(self, prompt: list[int]) -> None:
        try:
            output = await self.cluster.generate(prompt, **self.load, timeout=self.patience)
        except preble.ClusterOverloaded as error:
            self.outcomes["refused"] += 1
            self.suggestions.append(error.retry_after)
        except preble.RequestTimeout as error:
            self.outcomes["timed out" if error.partial is None else "timed out, begun"] += 1
        else:
            assert len(output.token_ids) == self.load["max_tokens"]
            self.outcomes["served"] += 1

    def _look(self) -> None:
        cluster, dispatcher = self.cluster, self.cluster._dispatcher
        scheduler = dispatcher._scheduler
        on_replicas = sum(len(scheduler.in_flight(books.replica)) for books in scheduler.replicas)
        for queue, length in {
            "slots": cluster._door.limit - cluster._door.free,
            "flights": len(dispatcher._branches),
            "scheduler": len(scheduler.waiting) + on_replicas,
            "engines": sum(one.running + one.waiting for one in cluster.stats().replicas),
            "door": cluster._door.waiting,
        }.items():
            self.most[queue] = max(self.most[queue], length)


class Prompts:
    """Prompts that share nothing, so that each costs the same."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def next(self) -> list[int]:
        tokens: list[int] = self._rng.integers(3, 250, 60).tolist()
        return tokens


LOAD: dict[str, Any] = {"max_tokens": 64, "temperature": 0, "ignore_eos": True}
LONG_LOAD = LOAD | {"max_tokens": 180}
"""With ten times as many arrivals as can be served, each takes processor time that this tiny model needs, too: two
cores make both. A request must be some work, as it is with any other model."""
REQUESTS_IN_A_MINUTE = 2_000
"""So many of those, about, are served on two cores."""


async def saturation(cluster: Cluster, requests: int, prompts: Prompts, load: dict[str, Any]) -> float:
    """Requests per second where there is always one more to serve, and never a crowd."""
    todo = iter(range(requests))
    began = time.monotonic()

    async def client() -> None:
        for _ in todo:
            await cluster.generate(prompts.next(), **load)

    async with anyio.create_task_group() as group:
        for _ in range(MAX_PENDING):
            group.start_soon(client)
    return requests / (time.monotonic() - began)


def resident_kib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


async def overloaded(
    model: Path, mode: str, requests: int, load: dict[str, Any], *, workers: str = "thread"
) -> tuple[Overload, float, float]:
    """What happened in the time that it takes to serve so many requests when ten times as many come, the goodput then,
    and the throughput at saturation around it."""
    prompts = Prompts()
    times = array("d")
    async with serving(model, kv_memory="640KiB", max_pending=MAX_PENDING, overload=mode, workers=workers) as cluster:
        released = cluster._door._released

        def watched(slot: Any) -> None:
            times.append(time.monotonic() - slot.taken)
            released(slot)

        cluster._door._released = watched  # type: ignore[method-assign]
        await cluster.generate_many([prompts.next() for _ in range(3 * MAX_PENDING)], **load)  # the caches fill up
        before = await saturation(cluster, requests // 4, prompts, load)
        stay = MAX_PENDING / before
        overload = Overload(cluster, load, PATIENCE * stay if mode == "wait" else None, times=times)
        del times[:]
        gc.collect()
        overload.blocks.append(sys.getallocatedblocks())
        goodput = await overload.run(TIMES_SATURATION * before, TIMES_SATURATION * requests, prompts)
        overload.times = times[:]
        await nothing_is_left(cluster)
        gc.collect()
        overload.blocks.append(sys.getallocatedblocks())
        after = await saturation(cluster, requests // 4, prompts, load)
    return overload, goodput, (before + after) / 2


def figures(mode: str, overload: Overload, goodput: float, saturated: float) -> str:
    stays = sorted(overload.times)
    unit = MAX_PENDING / goodput
    p50, p99 = (stays[int(share * len(stays))] for share in (0.5, 0.99))
    return (
        f"{mode}: {overload.arrived} requests; {dict(overload.outcomes)}; saturation {saturated:.1f}/s, goodput "
        f"{goodput:.1f}/s ({goodput / saturated:.2f}); time with a slot p50 {p50:.2f} s, p99 {p99:.2f} s "
        f"({p99 / unit:.2f} x max_pending / goodput); longest queues {dict(overload.most)}; blocks "
        f"{overload.blocks}; resident KiB {overload.resident}"
    )


def holds(mode: str, overload: Overload, text: str) -> None:
    """What must be so whatever the machine does meanwhile."""
    outcomes = overload.outcomes
    assert sum(outcomes.values()) == overload.arrived, f"somebody got no answer; {text}"
    assert outcomes["served"] > 0, text
    if mode == "refuse":
        assert set(outcomes) <= {"served", "refused"}, text
        assert overload.most["door"] == 0, text
        assert all(0.01 <= one <= 60 and math.isfinite(one) for one in overload.suggestions), text
    else:
        assert outcomes["refused"] == 0, text
    for queue in ("slots", "flights", "scheduler"):
        assert 0 < overload.most[queue] <= MAX_PENDING, f"{queue}; {text}"
    assert overload.most["engines"] <= 2 * MAX_PENDING, f"who is aborted leaves with the next step; {text}"
    assert overload.most["slots"] == MAX_PENDING, text
    # The scheduler's books of what was served within the window stay; of who was refused, see above.
    assert overload.blocks[-1] - overload.blocks[0] < 150 * outcomes["served"] + overload.arrived / 2, text


@pytest.mark.parametrize(("anyio_backend", "mode"), [("asyncio", "wait"), ("trio", "refuse")])
async def test_overload(llama: Path, mode: str) -> None:
    overload, goodput, saturated = await overloaded(llama, mode, 160, LOAD)
    text = figures(mode, overload, goodput, saturated)
    print(text)
    holds(mode, overload, text)


@pytest.mark.long
@pytest.mark.parametrize("workers", ["thread", "process"])
@pytest.mark.parametrize("mode", ["refuse", "wait"])
async def test_overload_for_a_minute(llama: Path, mode: str, workers: str) -> None:
    overload, goodput, saturated = await overloaded(llama, mode, REQUESTS_IN_A_MINUTE, LONG_LOAD, workers=workers)
    text = f"{workers}, {figures(mode, overload, goodput, saturated)}"
    print(text)
    holds(mode, overload, text)
    # What follows takes a machine that nobody else uses.
    assert goodput >= 0.9 * saturated, text
    # Hardly anybody is let in who cannot finish in time.
    assert overload.outcomes["timed out, begun"] <= 0.05 * overload.outcomes["served"] + MAX_PENDING, text
    # By Little's law, max_pending / goodput is the mean time in the full system.
    stays = sorted(overload.times)
    assert stays[int(0.99 * len(stays))] <= 4 * MAX_PENDING / goodput, text
    assert overload.resident[3] - overload.resident[0] < 32 * 1024, f"something grows; {text}"
