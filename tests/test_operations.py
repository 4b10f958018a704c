"""Live operation: replicas come, drain and go, the cluster pauses, forgets its caches and shuts down, under load."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.from_thread
import anyio.to_thread
import pytest
from watching import faulty_steps, hanging_step, health, undisturbed, until

import preble
from preble import Cluster
from preble.engine.engine import Engine
from preble.engine.source import EngineSource
from preble.replica import lifecycle, thread

pytestmark = pytest.mark.anyio

PROMPTS = [f"Number {number}: the quick brown fox jumps over the lazy dog" for number in range(6)]
LONG: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 5, "ignore_eos": True}
SHORT: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}


@asynccontextmanager
async def serving(model: Path, **options: Any) -> AsyncIterator[Cluster]:
    """A cluster that places requests in turn, in whose books and engines nothing may be left in the end."""
    defaults: dict[str, Any] = {
        "replicas": 2,
        "policy": "round-robin",
        "page_size": 16,
        "kv_memory": "1MiB",
        "dtype": "float32",
    }
    async with Cluster(model, **(defaults | options)) as cluster:
        yield cluster
        await cluster.resume()
        await until(lambda: not cluster.stats().pending and cluster.health().status == "ok")
        await at_rest(cluster)


async def at_rest(cluster: Cluster) -> None:
    """Until the engines have nothing to do; then scheduler and engines agree that nothing is in flight."""
    await until(lambda: all(post.life.idle for post in posts(cluster)))
    await cluster.resume()  # every report before its acknowledgement is in
    scheduler = cluster._dispatcher._scheduler
    scheduler.check()
    assert not scheduler.waiting
    assert not cluster._dispatcher._branches
    assert cluster._door.free == cluster._door.limit
    for number, engine in engines(cluster).items():
        engine.scheduler.check()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_in_use) == (0, 0, 0)
        assert scheduler.in_flight(number) == []
        assert len(scheduler.resident_pages(number)) == stats.pages_cached


def posts(cluster: Cluster) -> list[Any]:
    return list(cluster._dispatcher.roster._posts.values())


def engines(cluster: Cluster) -> dict[int, Engine]:
    return {post.number: post.life._engine for post in posts(cluster)}


def crash(cluster: Cluster, number: int) -> None:
    """Let the next step of a replica's engine fail."""

    def step() -> Any:
        raise RuntimeError("injected")

    engines(cluster)[number].step = step  # type: ignore[method-assign]


def engine_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("preble-")]


def in_flight(cluster: Cluster) -> dict[int, int]:
    return {one.replica: one.in_flight for one in cluster.health().replicas}


class Load:
    """Streams that run while a test does something else; each is read to its end, or to its error."""

    def __init__(self, cluster: Cluster, group: anyio.abc.TaskGroup) -> None:
        self._cluster = cluster
        self._group = group
        self.started = 0
        self.streamed: dict[int, list[int]] = {}
        self.outputs: dict[int, preble.GenerationOutput] = {}
        self.errors: dict[int, Exception] = {}

    def add(self, prompts: list[str], **options: Any) -> None:
        for prompt in prompts:
            self._group.start_soon(self._read, self.started, prompt, options)
            self.started += 1

    async def _read(self, number: int, prompt: str, options: dict[str, Any]) -> None:
        tokens = self.streamed[number] = []
        try:
            stream = self._cluster.stream(prompt, **options)
            async for chunk in stream:
                tokens += chunk.token_ids
        except preble.PrebleError as error:
            self.errors[number] = error
        else:
            self.outputs[number] = stream.output

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """What was streamed, in the order of the prompts, which must be what the outputs hold."""
        assert self.errors == {}
        for number, output in self.outputs.items():
            assert tuple(self.streamed[number]) == output.token_ids
        return [tuple(self.streamed[number]) for number in range(self.started)]


@asynccontextmanager
async def load(cluster: Cluster) -> AsyncIterator[Load]:
    """At the end of the block its requests are waited for."""
    async with anyio.create_task_group() as group:
        yield Load(cluster, group)


async def paused_in_the_middle(
    cluster: Cluster, load: Load, prompts: list[str], at_least: int = 2, **options: Any
) -> None:
    """Requests of which `at_least` so many have come to generate."""
    load.add(prompts, **options)
    await until(lambda: cluster.stats().pending == len(prompts) and sum(map(bool, load.streamed.values())) >= at_least)
    await cluster.pause()
    # What the last steps told has been read: from here nothing moves.
    assert cluster.stats().pending == len(prompts)


class Loading:
    """Holds replicas back while they load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.error: Exception | None = None
        original = EngineSource.engine

        def engine(*args: Any, **options: Any) -> Engine:
            self.begun.set()
            self.go_on.wait()
            if self.error is not None:
                raise self.error
            return original(*args, **options)

        monkeypatch.setattr(EngineSource, "engine", engine)


# Adding


async def test_an_added_replica_gets_work_under_a_new_number(llama: Path) -> None:
    async with serving(llama) as cluster:
        assert await cluster.add_replica() == 2
        outputs = await cluster.generate_many(PROMPTS, **SHORT)
        assert {output.placement.replica for output in outputs} == {0, 1, 2}
        await cluster.remove_replica(1)
        await cluster.remove_replica(2)
        assert await cluster.add_replica("cpu") == 3
        outputs = await cluster.generate_many(PROMPTS, **SHORT)
        assert {output.placement.replica for output in outputs} == {0, 3}
        assert [one.replica for one in cluster.stats().replicas] == [0, 3]
        pages = {one.pages_total for one in cluster.stats().replicas}
        assert len(pages) == 1, "a request that fits one replica fits any"


async def test_replicas_are_added_under_load_and_two_at_once(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS * 3, **LONG)
    async with serving(llama, replicas=1) as cluster:
        numbers: list[int] = []

        async def add() -> None:
            numbers.append(await cluster.add_replica())

        async with load(cluster) as running, anyio.create_task_group() as group:
            running.add(PROMPTS, **LONG)
            await until(lambda: any(running.streamed.values()))
            group.start_soon(add)
            group.start_soon(add)
            running.add(PROMPTS, **LONG)
            await until(lambda: len(numbers) == 2)
            running.add(PROMPTS, **LONG)
        assert sorted(numbers) == [1, 2]
        assert running.tokens == tokens
        assert all(one.generated_tokens > 0 for one in cluster.stats().replicas)


async def test_a_replica_that_cannot_be_added_leaves_the_cluster_as_it_was(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(llama) as cluster:
        for device, message in (("cuda:9", "cuda:9"), ("gpu", "not a device name")):
            with pytest.raises(preble.DeviceError, match=message):
                await cluster.add_replica(device)
        with monkeypatch.context() as patch:
            loading = Loading(patch)
            loading.go_on.set()
            for error, kind in (
                (preble.CheckpointError("the disk is gone"), preble.CheckpointError),
                (RuntimeError("the disk is gone"), preble.ReplicaCrashed),
            ):
                loading.error = error
                with pytest.raises(kind, match="the disk is gone"):
                    await cluster.add_replica()
        assert [one.replica for one in cluster.health().replicas] == [0, 1]
        assert cluster.health().status == "ok"
        await cluster.generate_many(PROMPTS, **SHORT)
        assert await cluster.add_replica() == 2


async def test_adding_that_is_cancelled_leaves_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(llama) as cluster:
        with monkeypatch.context() as patch:
            loading = Loading(patch)
            async with anyio.create_task_group() as group:
                group.start_soon(cluster.add_replica)
                await until(loading.begun.is_set)
                assert len(cluster.health().replicas) == 2
                await cluster.generate_many(PROMPTS, **SHORT)
                group.cancel_scope.cancel()
            assert len(posts(cluster)) == 2
            loading.go_on.set()
        await until(lambda: len(cluster._dispatcher.roster._lives) == 2)
        assert await cluster.add_replica() == 2
        outputs = await cluster.generate_many(PROMPTS, **SHORT)
        assert {output.placement.replica for output in outputs} == {0, 1, 2}


async def test_leaving_the_cluster_ends_who_is_just_being_added(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading = None
    async with anyio.create_task_group() as group:

        async def add() -> None:
            with pytest.raises(preble.ClusterStateError, match="closed"):
                await cluster.add_replica()

        async with Cluster(llama, replicas=1, dtype="float32", kv_memory="1MiB") as cluster:
            loading = Loading(monkeypatch)
            group.start_soon(add)
            group.start_soon(add)
            await until(loading.begun.is_set)
            loading.go_on.set()
    assert not engine_threads()


# Draining


async def test_a_draining_replica_finishes_what_runs_and_hands_over_what_waits(llama: Path) -> None:
    tokens = await undisturbed(llama, [*PROMPTS, *PROMPTS[:2]], **LONG)
    async with serving(llama, max_running=1) as cluster:
        async with load(cluster) as running, anyio.create_task_group() as group:
            await paused_in_the_middle(cluster, running, PROMPTS, **LONG)
            assert in_flight(cluster) == {0: 3, 1: 3}
            group.start_soon(cluster.drain_replica, 0)
            group.start_soon(cluster.drain_replica, 0)
            await until(lambda: health(cluster).state == "draining")
            assert in_flight(cluster) == {0: 1, 1: 5}
            running.add(PROMPTS[:2], **LONG)
            await until(lambda: cluster.stats().pending == 8)
            assert in_flight(cluster) == {0: 1, 1: 7}
            await cluster.resume()
        assert running.tokens == tokens
        assert [one.generated_tokens for one in cluster.stats().replicas] == [60, 7 * 60]
        assert (health(cluster).state, health(cluster).in_flight) == ("draining", 0)
        assert cluster.health().status == "ok"
        await cluster.drain_replica(0)


async def test_draining_does_not_wait_for_what_runs_elsewhere(llama: Path) -> None:
    """Of a request with several continuations only those that are on the replica count."""
    async with serving(llama) as cluster, load(cluster) as running:
        running.add(PROMPTS[:1], **LONG | {"n": 2})
        await until(lambda: any(running.streamed.values()))
        await cluster.pause()
        assert in_flight(cluster) == {0: 1, 1: 1}
        held = threading.Event()
        original = engines(cluster)[1].step

        def step() -> Any:
            held.wait()
            return original()

        engines(cluster)[1].step = step  # type: ignore[method-assign]
        cluster._dispatcher.roster.paused = False
        await cluster._dispatcher.roster.tell([0], preble.engine.messages.Pause(False))
        await cluster.drain_replica(0)
        assert in_flight(cluster) == {0: 0, 1: 1}
        held.set()
        await cluster.resume()


async def test_what_a_lone_draining_replica_has_it_keeps(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS + PROMPTS[:1], **LONG)
    async with serving(llama, replicas=1, max_running=2) as cluster:
        async with load(cluster) as running:
            await paused_in_the_middle(cluster, running, PROMPTS, **LONG)
            async with anyio.create_task_group() as group:
                group.start_soon(cluster.drain_replica, 0)
                await until(lambda: health(cluster).state == "draining")
                running.add(PROMPTS[:1], **LONG)
                await until(lambda: cluster.health().waiting == 1)
                assert in_flight(cluster) == {0: 6}
                await cluster.resume()
            assert cluster.health().pending == cluster.health().waiting == 1
            assert await cluster.add_replica() == 1
        assert running.tokens == tokens
        assert [one.generated_tokens for one in cluster.stats().replicas] == [6 * 60, 60]


async def test_where_nobody_takes_requests_they_fail_in_the_end(llama: Path) -> None:
    async with serving(llama, replicas=1, restart_timeout=0.2) as cluster:
        async with load(cluster) as running:
            await paused_in_the_middle(cluster, running, PROMPTS[:2], **LONG)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(cluster.drain_replica, 0)
                    await until(lambda: health(cluster).state == "draining")
                    running.add(PROMPTS[2:3], **LONG)
                    await until(lambda: 2 in running.errors)
                    scope.cancel()
            await cluster.resume()
        assert isinstance(running.errors[2], preble.ReplicaCrashed)
        assert "those that are up drain, and no other came up within 0.2 s" in str(running.errors[2])
        assert len(running.outputs) == 2, "what runs on a draining replica is none of those"


async def test_a_replica_that_is_not_there_is_named(llama: Path) -> None:
    wrong: list[Any] = [7, -1, True, False, 0.0, "0", None, [0]]
    async with serving(llama) as cluster:
        for number, call in itertools.product(wrong, (cluster.drain_replica, cluster.remove_replica)):
            with pytest.raises(preble.InvalidRequest, match=re.escape(f"no replica {number!r}; there are: 0, 1")):
                await call(number)
        assert [one.state for one in cluster.health().replicas] == ["serving", "serving"]


async def test_a_draining_replica_that_crashes_drains_on(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = await undisturbed(llama, PROMPTS, **LONG)
    armed, struck = threading.Event(), threading.Event()

    def fault(engine: Engine) -> None:
        if engine._replica == 0 and armed.is_set() and not struck.is_set():
            struck.set()
            raise RuntimeError("injected")

    with faulty_steps(monkeypatch, fault):
        async with serving(llama) as cluster:
            async with load(cluster) as running:
                await paused_in_the_middle(cluster, running, PROMPTS, **LONG)
                async with anyio.create_task_group() as group:
                    group.start_soon(cluster.drain_replica, 0)
                    await until(lambda: health(cluster).state == "draining")
                    armed.set()
                    await cluster.resume()
            assert running.tokens == tokens
            await until(lambda: cluster.health().status == "ok")
            assert (health(cluster).state, health(cluster).restarts) == ("draining", 1)
            outputs = await cluster.generate_many(PROMPTS, **SHORT)
            assert {output.placement.replica for output in outputs} == {1}
            await cluster.remove_replica(0)


# Removing


async def test_what_runs_on_a_removed_replica_goes_on_elsewhere(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS, **LONG)
    async with serving(llama, max_running=2) as cluster:
        async with load(cluster) as running:
            await paused_in_the_middle(cluster, running, PROMPTS, at_least=4, **LONG)
            assert in_flight(cluster) == {0: 3, 1: 3}
            leaving = engines(cluster)[0]
            await cluster.remove_replica(0, timeout=0)
            assert in_flight(cluster) == {1: 6}
            done = leaving.generated_tokens
            await cluster.resume()
        assert running.tokens == tokens
        assert 0 < done < 120
        (left,) = cluster.stats().replicas
        assert left.generated_tokens == 6 * 60 - done, "it goes on from the tokens delivered"
        assert [one.replica for one in cluster.health().replicas] == [1]
        with pytest.raises(preble.InvalidRequest, match="there is no replica 0; there are: 1"):
            await cluster.drain_replica(0)


async def test_without_a_time_limit_what_runs_on_a_removed_replica_ends_there(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS, **LONG)
    async with serving(llama, max_running=2) as cluster:
        async with load(cluster) as running, anyio.create_task_group() as group:
            await paused_in_the_middle(cluster, running, PROMPTS, at_least=4, **LONG)
            leaving = engines(cluster)[0]
            for _ in range(2):
                group.start_soon(cluster.remove_replica, 0)
            await until(lambda: in_flight(cluster) == {0: 2, 1: 4})
            await cluster.resume()
        assert running.tokens == tokens
        assert leaving.generated_tokens == 2 * 60
        assert in_flight(cluster) == {1: 0}


async def test_a_second_removal_of_the_same_may_be_in_more_of_a_hurry(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS, **LONG)
    async with serving(llama) as cluster, load(cluster) as running:
        await paused_in_the_middle(cluster, running, PROMPTS, **LONG)
        held = in_flight(cluster)
        leaving = max(held, key=lambda number: held[number])  # one that has something to wait for
        async with anyio.create_task_group() as group:
            group.start_soon(cluster.remove_replica, leaving)
            await until(lambda: health(cluster, leaving).state == "draining")
            await cluster.remove_replica(leaving, timeout=0)
        assert in_flight(cluster) == {1 - leaving: 6}, "both returned, while nothing moved"
        await cluster.resume()
        await until(lambda: len(running.outputs) == 6)
        assert running.tokens == tokens


async def test_the_last_replica_that_takes_requests_cannot_be_removed(llama: Path) -> None:
    async with serving(llama) as cluster:
        errors: list[Exception] = []

        async def remove(number: int) -> None:
            try:
                await cluster.remove_replica(number)
            except preble.InvalidRequest as error:
                errors.append(error)

        async with load(cluster) as running, anyio.create_task_group() as group:
            await paused_in_the_middle(cluster, running, PROMPTS, **LONG)
            group.start_soon(remove, 0)
            group.start_soon(remove, 1)
            await until(lambda: bool(errors))
            await cluster.resume()
        assert len(running.outputs) == 6
        ((left,), (error,)) = cluster.health().replicas, errors
        assert f"replica {left.replica} is the last one that takes requests" in str(error)
        assert left.state == "serving"
        await cluster.drain_replica(left.replica)
        await cluster.add_replica()
        await cluster.remove_replica(left.replica)
        assert (await cluster.generate(PROMPTS[0], **SHORT)).placement.replica == 2


async def test_replicas_come_and_go_under_load(llama: Path) -> None:
    prompts = PROMPTS * 6
    tokens = await undisturbed(llama, prompts, **LONG)
    async with serving(llama, max_running=3) as cluster:
        async with load(cluster) as running:
            running.add(prompts, **LONG)
            for timeout in (0, 0, None, 0):
                await until(lambda: any(one.running for one in cluster.stats().replicas))
                await cluster.add_replica()
                oldest = min(one.replica for one in cluster.health().replicas)
                await cluster.remove_replica(oldest, timeout=timeout)
                cluster._dispatcher._scheduler.check()
        assert running.tokens == tokens
        assert [one.replica for one in cluster.health().replicas] == [4, 5]


async def test_a_replica_that_is_down_can_be_removed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(llama) as cluster:
        with monkeypatch.context() as patch:
            loading = Loading(patch)
            crash(cluster, 0)
            await cluster.generate_many(PROMPTS, **SHORT)
            await until(loading.begun.is_set)
            async with anyio.create_task_group() as group:
                group.start_soon(cluster.remove_replica, 0)
                await until(lambda: len(cluster.health().replicas) == 1)
                loading.go_on.set()
        assert [one.replica for one in cluster.health().replicas] == [1]
        assert cluster.health().status == "ok"
        await cluster.generate_many(PROMPTS, **SHORT)


async def test_a_patience_that_is_none_is_refused(llama: Path) -> None:
    wrong: list[Any] = [-1, float("nan"), True, "1"]
    async with serving(llama) as cluster:
        for timeout, call in itertools.product(wrong, (partial(cluster.remove_replica, 0), cluster.shutdown)):
            with pytest.raises(preble.InvalidRequest, match=f"timeout must be .* not {timeout!r}"):
                await call(timeout=timeout)
        await cluster.generate_many(PROMPTS, **SHORT)
        assert len(cluster.health().replicas) == 2


# Forgetting


async def test_after_a_reset_nothing_is_found_that_was_computed_before(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS, **LONG)
    async with serving(llama) as cluster:
        for found in (False, True):
            outputs = [await cluster.generate(PROMPTS[0], **SHORT) for _ in range(2)]
            assert [output.usage.cached_tokens > 0 for output in outputs] == [found, found]
        async with load(cluster) as running:
            await paused_in_the_middle(cluster, running, PROMPTS, at_least=6, **LONG)
            await cluster.reset_prefix_cache()
            for number, engine in engines(cluster).items():
                engine.scheduler.check()
                assert cluster._dispatcher._scheduler.resident_pages(number) == frozenset()
                assert engine.stats().pages_cached == 0
            await cluster.resume()
        assert running.tokens == tokens
        outputs = [await cluster.generate(prompt, **SHORT) for prompt in PROMPTS]
        assert {output.usage.cached_tokens for output in outputs} == {0}


# Pausing


async def test_nothing_is_computed_while_the_cluster_is_paused(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS + PROMPTS, **LONG)
    async with serving(llama, max_running=2) as cluster:
        async with load(cluster) as running:
            await paused_in_the_middle(cluster, running, PROMPTS, **LONG)
            assert cluster.health().paused
            computed = [one.computed_tokens for one in engines(cluster).values()]
            running.add(PROMPTS, **LONG)
            await until(lambda: cluster.stats().pending == 12)
            await cluster.pause()
            roster = cluster._dispatcher.roster
            for post in posts(cluster):
                post.alive_at = float("-inf")  # its last step was longer ago than any limit
            roster._looked = time.monotonic()
            roster._tick()
            assert [one.computed_tokens for one in engines(cluster).values()] == computed
            await cluster.resume()
            assert not cluster.health().paused
            await cluster.resume()
        assert running.tokens == tokens
        assert [one.failures for one in cluster.health().replicas] == [0, 0]


async def test_what_ends_while_the_cluster_is_paused_gives_its_pages_back(llama: Path) -> None:
    async with serving(llama, replicas=1) as cluster, load(cluster) as running:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                cancelled = Load(cluster, group)
                cancelled.add(PROMPTS[:1], **LONG)
                running.add(PROMPTS[1:2], request_id="mine", **LONG)
                running.add(PROMPTS[2:3], timeout=600, **LONG)
                await until(
                    lambda: (
                        len(running.streamed) == 2
                        and all(running.streamed.values())
                        and any(cancelled.streamed.values())
                    )
                )
                await cluster.pause()
                (engine,) = engines(cluster).values()
                assert engine.stats().running == 3
                assert cluster.abort("mine")
                scope.cancel()
        await until(lambda: 0 in running.outputs)
        with pytest.raises(preble.RequestTimeout):
            await cluster.generate(PROMPTS[3], timeout=0.01)
        await cluster.pause()
        assert running.outputs[0].finish_reason == "abort"
        assert (engine.stats().running, engine.stats().waiting) == (1, 0)
        (sequence,) = engine.scheduler.running
        assert engine.stats().pages_in_use == len(sequence.table.pages)
        engine.scheduler.check()
        await cluster.resume()


async def test_replicas_that_come_while_the_cluster_is_paused_are_paused(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS, **LONG)
    async with serving(llama, restart_timeout=600) as cluster:
        async with load(cluster) as running:
            await paused_in_the_middle(cluster, running, PROMPTS, **LONG)
            replaced = posts(cluster)[0].life
            replaced._listener.failed(replaced, RuntimeError("injected"))
            await until(lambda: health(cluster).restarts == 1 and health(cluster).state == "serving")
            assert await cluster.add_replica() == 2
            running.add(PROMPTS[:2], **SHORT)
            await until(lambda: cluster.stats().pending == 8)
            await cluster.pause()
            assert in_flight(cluster)[2] > 0
            assert engines(cluster)[2].computed_tokens == 0
            assert engines(cluster)[0].computed_tokens == 1, "the probe"
            await cluster.resume()
        assert running.tokens[:6] == tokens


@pytest.mark.parametrize("first", [True, False])
async def test_pausing_just_as_a_replica_comes_reaches_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Between the moment in which a replica is loaded and the one in which it belongs to the cluster."""
    async with serving(llama, replicas=1) as cluster:
        if not first:
            await cluster.pause()
        roster = cluster._dispatcher.roster
        loaded = roster._loaded
        told = anyio.Event()

        def told_of_it(*args: Any) -> None:
            told.set()  # who waits for this is called before who waits for what comes now
            loaded(*args)

        monkeypatch.setattr(roster, "_loaded", told_of_it)

        async def change() -> None:
            await told.wait()
            await cluster._dispatcher.pause(first)

        async with anyio.create_task_group() as group:
            group.start_soon(change)
            await cluster.add_replica()
        await cluster.drain_replica(0)
        async with load(cluster) as running:
            running.add(PROMPTS, **SHORT)
            await until(lambda: cluster.stats().pending == 6)
            if first:
                await cluster.pause()
                assert engines(cluster)[1].computed_tokens == 0
                await cluster.resume()
        assert len(running.outputs) == 6


async def test_a_replica_that_hangs_is_noticed_while_others_are_paused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = await undisturbed(llama, PROMPTS, **LONG)
    with hanging_step(monkeypatch) as (hanging, go_on):
        async with serving(llama, hang_timeout=1.0) as cluster:
            async with load(cluster) as running:
                running.add(PROMPTS, **LONG)
                await until(hanging.is_set)
                await cluster.pause()
                assert (health(cluster).state, health(cluster).failures) == ("restarting", 1)
                assert cluster.health().status == "degraded"
                go_on.set()
                await cluster.resume()
            assert running.tokens == tokens


async def test_a_paused_cluster_can_be_left(llama: Path) -> None:
    alone = Cluster(llama, replicas=2, dtype="float32", kv_memory="1MiB")
    async with anyio.create_task_group() as group, alone as cluster:
        running = Load(cluster, group)
        await paused_in_the_middle(cluster, running, PROMPTS, **LONG)
    assert {type(error) for error in running.errors.values()} == {preble.ClusterStateError}
    assert len(running.errors) == 6


# Health


async def test_health_tells_what_replicas_go_through(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_DELAY", 0.01)
    probing, go_on = threading.Event(), threading.Event()

    def fault(engine: Engine) -> None:
        if any("probe" in one.request_id for one in engine.scheduler.waiting):
            probing.set()
            go_on.wait()

    with faulty_steps(monkeypatch, fault):
        async with serving(llama) as cluster:
            whole = cluster.health()
            assert (whole.status, whole.paused, whole.pending, whole.waiting) == ("ok", False, 0, 0)
            for number, one in enumerate(whole.replicas):
                assert (one.replica, one.device, one.state, one.process_id) == (number, "cpu", "serving", None)
                assert (one.in_flight, one.failures, one.restarts) == (0, 0, 0)
                assert (one.last_error, one.retry_in) == (None, None)
                assert one.seconds >= one.last_report >= 0
            with monkeypatch.context() as patch:
                loading = Loading(patch)
                crash(cluster, 0)
                await cluster.generate_many(PROMPTS, **SHORT)
                await until(loading.begun.is_set)
                assert (health(cluster).state, health(cluster).failures) == ("restarting", 1)
                assert health(cluster).last_error == "RuntimeError: injected"
                assert cluster.health().status == "degraded"
                loading.error = RuntimeError("the disk is gone")
                loading.go_on.set()
                monkeypatch.setattr(lifecycle, "LONGEST_DELAY", 1000.0)
                await until(lambda: health(cluster).state == "broken" and health(cluster).retry_in is not None)
                assert health(cluster).failures == lifecycle.OPENS_AFTER
                assert 0 < health(cluster).retry_in <= 1000  # type: ignore[operator]
                assert health(cluster).last_error == "RuntimeError: the disk is gone"
            posts(cluster)[0].lifecycle.retry_at = 0.0
            posts(cluster)[0].lifecycle.failures = 1
            await until(probing.is_set)
            await until(lambda: health(cluster).state == "probing")
            go_on.set()
            await until(lambda: health(cluster).state == "serving")
            await cluster.drain_replica(1)
            assert [one.state for one in cluster.health().replicas] == ["serving", "draining"]
            assert cluster.health().status == "ok"


# Shutting down


async def test_shutting_down_lets_those_finish_who_are_served(llama: Path) -> None:
    tokens = await undisturbed(llama, PROMPTS[:4], **LONG)
    async with Cluster(llama, replicas=1, dtype="float32", kv_memory="1MiB", max_pending=4) as cluster:
        async with load(cluster) as running:
            running.add(PROMPTS[:4], **LONG)
            await until(lambda: cluster.stats().pending == 4)
            running.add(PROMPTS[4:], **LONG)
            await until(lambda: cluster._door.waiting == 2)
            await cluster.pause()
            await cluster.shutdown()
            for refused in (cluster.stats, cluster.health, lambda: cluster.stream("x")):
                with pytest.raises(preble.ClusterStateError, match="was left"):
                    refused()
            with pytest.raises(preble.ClusterStateError, match="was left"):
                await cluster.shutdown()
        assert [running.outputs[number].token_ids for number in range(4)] == tokens
        assert {type(running.errors[number]) for number in (4, 5)} == {preble.ClusterStateError}
        assert not engine_threads()


async def test_no_thread_outlives_its_cluster(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = thread.ThreadReplica._run

    def slow_to_end(replica: thread.ThreadReplica) -> None:
        run(replica)
        for _ in range(2000):
            time.sleep(0)  # other threads run: the event loop is told of the end before it has come

    monkeypatch.setattr(thread.ThreadReplica, "_run", slow_to_end)
    for _ in range(5):
        async with Cluster(llama, replicas=2, dtype="float32", kv_memory="1MiB") as cluster:
            await cluster.remove_replica(1)
        assert not engine_threads()


async def test_shutting_down_does_not_take_longer_than_it_may(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    async with Cluster(llama, replicas=1, dtype="float32", kv_memory="1MiB") as cluster:
        async with load(cluster) as running:
            running.add(PROMPTS, **LONG)
            await until(lambda: any(running.streamed.values()))
            with faulty_steps(monkeypatch, lambda engine: go_on.wait()):
                threading.Timer(0.1, go_on.set).start()  # nothing ends before the deadline, and everything after it
                await cluster.shutdown(timeout=0)
        assert {str(error).partition(": ")[2] for error in running.errors.values()} == {"the cluster was closed"}
        assert len(running.errors) == 6


async def test_shutting_down_that_is_cancelled_leaves_the_rest_to_the_end_of_the_block(llama: Path) -> None:
    alone = Cluster(llama, replicas=1, dtype="float32", kv_memory="1MiB")
    async with anyio.create_task_group() as group, alone as cluster:
        running = Load(cluster, group)
        running.add(PROMPTS, **LONG)
        await until(lambda: any(running.streamed.values()))
        with anyio.CancelScope() as scope:
            scope.cancel()
            await cluster.shutdown()
        assert scope.cancelled_caught
        assert cluster._dispatcher.stats().pending == 6
    assert len(running.errors) == 6
    assert not engine_threads()


async def test_nobody_waits_for_ever_for_a_thread_that_hangs(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(thread, "PATIENCE", 0.1)
    hanging, go_on = [threading.Event(), threading.Event()], threading.Event()

    def fault(engine: Engine) -> None:
        hanging[engine._replica].set()
        go_on.wait()

    with faulty_steps(monkeypatch, fault):
        alone = Cluster(llama, replicas=2, policy="round-robin", dtype="float32", kv_memory="1MiB", hang_timeout=0.3)
        async with anyio.create_task_group() as group, alone as cluster:
            running = Load(cluster, group)
            running.add(PROMPTS, **LONG)
            await until(lambda: all(event.is_set() for event in hanging))
            await cluster.remove_replica(0, timeout=0)
            assert "replica 0 hangs in a thread, which is left behind" in caplog.text
        assert "replica 1 hangs in a thread, which is left behind" in caplog.text
        assert len(engine_threads()) == 2
        go_on.set()
        await until(lambda: not engine_threads())
    assert len(running.errors) == 6


# Where it runs


async def test_two_clusters_live_side_by_side(llama: Path, checkpoint: Callable[[str], Path]) -> None:
    qwen = checkpoint("qwen3")
    tokens = await undisturbed(llama, PROMPTS, **LONG), await undisturbed(qwen, PROMPTS, **LONG)
    async with serving(qwen, policy="e2") as second, load(second) as other:
        async with serving(llama, policy="prefix-affinity") as first, load(first) as one:
            one.add(PROMPTS, **LONG)
            other.add(PROMPTS[:3], **LONG)
            await until(lambda: len(one.outputs) == 6)
        other.add(PROMPTS[3:], **LONG)
        await until(lambda: len(other.outputs) == 6)
        assert second.stats().policy == "e2"
        assert (one.tokens, other.tokens) == tokens


async def test_a_cluster_is_used_from_threads_through_the_event_loop(llama: Path) -> None:
    async with serving(llama) as cluster:

        def work(prompt: str) -> tuple[int, ...]:
            with pytest.raises(preble.ClusterStateError, match="another event loop or thread"):
                cluster.stats()
            output = anyio.from_thread.run(partial(cluster.generate, prompt, **LONG))
            assert anyio.from_thread.run_sync(cluster.stats).policy == "round-robin"
            return output.token_ids

        found: list[tuple[int, ...]] = [()] * len(PROMPTS)

        async def ask(number: int) -> None:
            found[number] = await anyio.to_thread.run_sync(work, PROMPTS[number])

        async with anyio.create_task_group() as group:
            for number in range(len(PROMPTS)):
                group.start_soon(ask, number)
    assert found == await undisturbed(llama, PROMPTS, **LONG)


async def test_a_cluster_is_entered_in_one_task_and_left_in_another(llama: Path) -> None:
    cluster = Cluster(llama, replicas=1, dtype="float32", kv_memory="1MiB")

    async def enter() -> None:
        await cluster.__aenter__()

    async def leave() -> None:
        await cluster.__aexit__(None, None, None)

    for step in (enter, partial(cluster.generate, PROMPTS[0], **SHORT), cluster.add_replica, leave):
        async with anyio.create_task_group() as group:
            group.start_soon(step)
    assert not engine_threads()


def test_a_cluster_belongs_to_the_event_loop_that_entered_it(llama: Path, anyio_backend: str) -> None:
    cluster = Cluster(llama, replicas=1, dtype="float32", kv_memory="1MiB")

    async def enter() -> None:
        await cluster.__aenter__()
        await cluster.generate(PROMPTS[0], **SHORT)

    anyio.run(enter, backend=anyio_backend)
    for call in (
        partial(cluster.generate, PROMPTS[0]),
        cluster.add_replica,
        cluster.pause,
        partial(cluster.remove_replica, 0),
        cluster.shutdown,
    ):
        with pytest.raises(preble.ClusterStateError, match=r"Call asyncio.run once"):
            anyio.run(call, backend=anyio_backend)
    anyio.run(partial(cluster.__aexit__, None, None, None), backend=anyio_backend)
    assert not engine_threads()


def test_between_two_calls_into_its_event_loop_a_cluster_can_be_looked_at(llama: Path) -> None:
    cluster = Cluster(llama, replicas=1, dtype="float32", kv_memory="1MiB")
    with asyncio.Runner() as runner:
        runner.run(cluster.__aenter__())
        assert cluster.health().status == "ok"
        runner.run(cluster.generate(PROMPTS[0], **SHORT))
        assert cluster.stats().pending == 0
        runner.run(cluster.__aexit__(None, None, None))


# Names


async def test_a_name_is_free_again_at_once_after_an_abort(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the replica still tells of the aborted request is not taken for the next one of that name."""
    [tokens] = await undisturbed(llama, PROMPTS[1:2], **LONG)
    armed, stepped, go_on = threading.Event(), threading.Event(), threading.Event()
    original = Engine.step

    def step(engine: Engine) -> Any:
        report = original(engine)
        if armed.is_set() and report.deltas:
            stepped.set()
            go_on.wait()
        return report

    monkeypatch.setattr(Engine, "step", step)
    async with serving(llama, replicas=1) as cluster, load(cluster) as running:
        running.add(PROMPTS[:1], request_id="mine", **LONG)
        await until(lambda: any(running.streamed.values()))
        armed.set()
        await until(stepped.is_set)
        assert cluster.abort("mine")
        running.add(PROMPTS[1:2], request_id="mine", **LONG)
        await until(lambda: cluster.stats().pending == 1)
        armed.clear()
        go_on.set()
        await until(lambda: 1 in running.outputs)
        assert running.outputs[0].finish_reason == "abort"
        assert running.outputs[1].token_ids == tokens
        assert running.outputs[1].request_id == running.outputs[1].placement.request_id == "mine"


# All of it


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 20))])
async def test_in_any_order_of_operations_no_request_is_lost(llama: Path, seed: int) -> None:
    """Replicas come, drain, crash and go, the cluster pauses and forgets, at random, while requests come and some of
    them leave early: the others get what they would have got."""
    rng = random.Random(seed)
    prompts = PROMPTS * 5
    tokens = await undisturbed(llama, prompts, **LONG)
    options = {"max_running": rng.choice([2, 8]), "policy": rng.choice(["round-robin", "e2"]), "kv_memory": "128KiB"}
    async with serving(llama, replicas=3, **options) as cluster:
        scheduler = cluster._dispatcher._scheduler
        over = crashed = False

        def numbers() -> list[int]:
            return [one.replica for one in cluster.health().replicas]

        async def remove() -> None:
            with suppress(preble.InvalidRequest):  # it is the last one
                await cluster.remove_replica(rng.choice(numbers()), timeout=rng.choice([0, 0.01, 10]))

        async def drain() -> None:
            if len(cluster._dispatcher._draining) + 1 < len(numbers()):
                await cluster.drain_replica(rng.choice(numbers()))

        async def crash_one() -> None:
            nonlocal crashed
            life = rng.choice(posts(cluster)).life
            if life is not None and not crashed:  # once: who is on two replicas that crash is suspected
                crashed = True
                life._listener.failed(life, RuntimeError("injected"))

        async def leave_early() -> None:
            prompt, kind = rng.choice(PROMPTS), rng.randrange(3)
            with anyio.CancelScope() as scope, suppress(preble.RequestFailed, preble.RequestTimeout):
                async with cluster.stream(prompt, timeout=0.01 if kind == 0 else None, **LONG) as stream:
                    async for _ in stream:
                        if kind == 1:
                            cluster.abort(stream.request_id)
                        if kind == 2:
                            scope.cancel()

        async def operate() -> None:
            calls = [
                cluster.pause,
                cluster.resume,
                cluster.resume,
                cluster.reset_prefix_cache,
                leave_early,
                leave_early,
            ]
            while not over:
                few = len(numbers()) < 3
                await rng.choice([*calls, cluster.add_replica if few else remove, remove, drain, crash_one])()
                scheduler.check()
                await anyio.sleep(rng.random() / 100)

        async with load(cluster) as running, anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(operate)
            for prompt in prompts:
                running.add([prompt], **LONG)
                await anyio.sleep(rng.random() / 100)
            over = True
            await cluster.resume()
        assert running.tokens == tokens
