"""The failure contract: a replica's fault costs its requests time, a request's fault costs nobody else anything."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from watching import faulty_steps, hanging_step, health, undisturbed, until

import preble
from preble import Cluster, roster
from preble.engine.engine import Engine
from preble.engine.source import EngineSource
from preble.replica import lifecycle

pytestmark = pytest.mark.anyio

PROMPTS = [f"Number {number}: the quick brown fox jumps over the lazy dog" for number in range(8)]
GREEDY = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True}
SEEDED = {"max_tokens": 30, "temperature": 1.0, "seed": 11, "ignore_eos": True}


def serving(model: Path, **options: Any) -> Cluster:
    defaults = {"replicas": 2, "policy": "round-robin", "page_size": 16, "kv_memory": "1MiB", "dtype": "float32"}
    return Cluster(model, **(defaults | options))


def requests_of(engine: Engine) -> set[str]:
    scheduler = engine.scheduler
    return {one.request_id for one in [*scheduler.running, *scheduler.waiting]}


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), MemoryError("out of it")])
async def test_a_failed_step_costs_only_time_and_the_replica_comes_back(
    llama: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: Exception
) -> None:
    expected = await undisturbed(llama, PROMPTS, **options)
    struck = threading.Event()

    def fault(engine: Engine) -> None:
        if engine._replica == 0 and engine.generated_tokens >= 20 and not struck.is_set():
            struck.set()
            raise error

    with faulty_steps(monkeypatch, fault):
        async with serving(llama) as cluster:
            outputs = await cluster.generate_many(PROMPTS, **options)
            assert [output.token_ids for output in outputs] == expected
            assert struck.is_set()
            recoveries = cluster.stats().recoveries
            assert 1 <= len(recoveries) <= len(PROMPTS)
            assert all(seconds >= 0 for seconds in recoveries)
            await until(lambda: health(cluster).state == "serving")
            assert health(cluster).restarts == 1
            assert health(cluster).last_error == f"{type(error).__name__}: {error}"
            assert cluster.stats().replicas[0].cached_tokens == 0, "it comes back cold"
            placed = [await cluster.generate("x", max_tokens=1) for _ in range(2)]
            assert {output.placement.replica for output in placed} == {0, 1}
            cluster._dispatcher._scheduler.check()


async def test_a_stream_shows_no_seam(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SEEDED | {"n": 2, "logprobs": 1, "stop": ["zzzz"]}
    async with serving(llama) as cluster:
        expected = await cluster.generate(PROMPTS[0], **options)
    struck = threading.Event()

    def fault(engine: Engine) -> None:
        if engine.generated_tokens >= 9 and not struck.is_set():
            struck.set()
            raise RuntimeError("injected")

    with faulty_steps(monkeypatch, fault):
        async with serving(llama) as cluster:
            texts, tokens, logprobs = ["", ""], [[], []], [[], []]
            stream = cluster.stream(PROMPTS[0], **options)
            async for chunk in stream:
                texts[chunk.index] += chunk.text
                tokens[chunk.index] += chunk.token_ids
                logprobs[chunk.index] += chunk.logprobs
    assert struck.is_set()
    for completion in expected.completions:
        assert texts[completion.index] == completion.text
        assert tuple(tokens[completion.index]) == completion.token_ids
        assert [one.token_id for one in logprobs[completion.index]] == list(completion.token_ids)
    assert stream.output.usage.completion_tokens == expected.usage.completion_tokens


async def test_a_replica_that_hangs_is_replaced_once_it_is_gone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await undisturbed(llama, PROMPTS, **GREEDY)
    with hanging_step(monkeypatch) as (hanging, go_on):
        async with serving(llama, hang_timeout=1.0) as cluster:
            outputs = await cluster.generate_many(PROMPTS, **GREEDY)
            assert [output.token_ids for output in outputs] == expected
            assert hanging.is_set()
            assert health(cluster).state == "restarting"
            assert "no step within 1 s" in (health(cluster).last_error or "")
            assert cluster.health().status == "degraded"
            # A thread cannot be ended, and its memory is not free: only when it comes back is there room for another.
            assert health(cluster).process_id is None
            go_on.set()
            await until(lambda: cluster.health().status == "ok")


async def test_an_idle_replica_never_hangs(llama: Path) -> None:
    async with serving(llama) as cluster:
        await cluster.generate("x", max_tokens=2)
        posts = cluster._dispatcher.roster._posts.values()
        await until(lambda: all(post.sent == post.taken for post in posts))
        for post in posts:
            post.alive_at = -math.inf  # its last step was longer ago than any limit
        cluster._dispatcher.roster._looked = time.monotonic()
        cluster._dispatcher.roster._tick()
        assert [one.failures for one in cluster.health().replicas] == [0, 0]


async def test_a_standstill_of_the_application_is_nobody_elses_fault(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood_still = 0.0
    monkeypatch.setattr(roster, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + stood_still))
    async with serving(llama) as cluster:
        stream = cluster.stream(PROMPTS[0], max_tokens=150, ignore_eos=True)
        await anext(stream)
        for _ in range(3):
            stood_still += 1000.0  # the application held the loop up: replicas' reports were not read
            cluster._dispatcher.roster._tick()
            assert [one.failures for one in cluster.health().replicas] == [0, 0]
            await anyio.lowlevel.checkpoint()
        async for _ in stream:
            pass


async def test_a_poisonous_request_fails_before_it_kills_the_cluster(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = []

    def fault(engine: Engine) -> None:
        if any(name.startswith("poison#") for name in requests_of(engine)):
            deaths.append(engine._replica)
            raise RuntimeError("poisoned")

    with faulty_steps(monkeypatch, fault):
        async with serving(llama, replicas=3) as cluster:
            with pytest.raises(preble.ReplicaCrashed, match=r"'poison' was on 2 replicas when they failed.*poisoned"):
                await cluster.generate(PROMPTS[0], request_id="poison", max_tokens=5)
            assert len(set(deaths)) == len(deaths) == 2
            outputs = await cluster.generate_many(PROMPTS, **GREEDY)
            assert len(outputs) == len(PROMPTS)
            await until(lambda: cluster.health().status == "ok")
            cluster._dispatcher._scheduler.check()
            assert not cluster._dispatcher._branches


async def test_the_breaker_opens_after_failures_in_a_row_and_lets_attempts_through(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(lifecycle, "LONGEST_DELAY", 0.05)
    original = EngineSource.engine
    attempts: list[int] = []

    def engine(source: EngineSource, number: int, *args: Any, **options: Any) -> Engine:
        if number == 0 and health_ready:
            attempts.append(number)
            if len(attempts) < lifecycle.OPENS_AFTER + 3:
                raise OSError("the disk is gone")
        return original(source, number, *args, **options)

    health_ready: list[bool] = []
    monkeypatch.setattr(EngineSource, "engine", engine)
    async with serving(llama) as cluster:
        health_ready.append(True)
        cluster._dispatcher.roster._fail(cluster._dispatcher.roster._posts[0], RuntimeError("injected"))
        await until(lambda: health(cluster).state == "broken")
        assert health(cluster).failures >= lifecycle.OPENS_AFTER
        assert health(cluster).last_error == "OSError: the disk is gone"
        assert health(cluster).retry_in is None or 0 <= health(cluster).retry_in <= 0.05
        assert cluster.health().status == "degraded"
        outputs = await cluster.generate_many(PROMPTS, **GREEDY)  # the other one serves all the while
        assert {output.placement.replica for output in outputs} <= {0, 1}
        await until(lambda: health(cluster).state == "serving")
        assert len(attempts) == lifecycle.OPENS_AFTER + 3


async def test_a_replica_that_fails_its_probe_gets_nobody_elses_request(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(lifecycle, "LONGEST_DELAY", 0.02)
    probes, served = [], []

    def fault(engine: Engine) -> None:
        requests = requests_of(engine)
        if any("probe" in one for one in requests):
            probes.append(engine)
            if len(probes) < 3:
                raise RuntimeError("not yet")
        elif engine._replica == 0 and requests:
            served.append(engine)
            if len(served) == 1:
                raise RuntimeError("injected")

    with faulty_steps(monkeypatch, fault):
        async with serving(llama) as cluster:
            await cluster.generate_many(PROMPTS, **GREEDY)
            await until(lambda: len(probes) >= 3 and health(cluster).state == "serving")
            await cluster.generate_many(PROMPTS, **GREEDY)
            assert not {id(engine) for engine in served[1:]} & {id(engine) for engine in probes[:2]}
            assert id(probes[2]) in {id(engine) for engine in served}
            assert health(cluster).restarts == 3


async def test_what_a_request_is_to_blame_for_never_counts_against_its_replica(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(llama, replicas=1) as cluster:
        engine = cluster._dispatcher.roster._posts[0].life._engine
        original = engine._runner.launch

        def launch(plan: Any) -> Any:
            launched = original(plan)
            result = launched.result()
            if nan:
                result = replace(result, invalid=tuple(range(len(result.tokens))))
            return type("Launched", (), {"result": lambda self: result})()

        nan = True
        engine._runner.launch = launch
        with pytest.raises(preble.RequestFailed, match="NaN"):
            await cluster.generate(PROMPTS[0], max_tokens=4)
        nan = False
        with pytest.raises(preble.RequestTimeout):
            await cluster.generate(PROMPTS[0], max_tokens=150, ignore_eos=True, timeout=0.001)
        with pytest.raises(preble.InvalidRequest):
            await cluster.generate("")
        async with cluster.stream(PROMPTS[0], max_tokens=100, ignore_eos=True) as stream:
            await anext(stream)
        await cluster.generate(PROMPTS[0], max_tokens=2)
        assert (health(cluster).failures, health(cluster).restarts) == (0, 0)


async def test_requests_wait_out_an_outage(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those from before it too, however long they have been here."""
    expected = await undisturbed(llama, PROMPTS, **GREEDY)
    original = EngineSource.engine
    may_load = threading.Event()
    may_load.set()

    def engine(*args: Any, **options: Any) -> Engine:
        may_load.wait()
        return original(*args, **options)

    monkeypatch.setattr(EngineSource, "engine", engine)
    async with serving(llama, restart_timeout=50.0) as cluster, anyio.create_task_group() as group:
        may_load.clear()
        dispatcher, roster = cluster._dispatcher, cluster._dispatcher.roster
        early = cluster.stream(PROMPTS[0], **GREEDY)
        await anext(early)
        for flight in dispatcher._flights.values():
            flight.submitted -= 1000.0
        for post in roster._posts.values():
            roster._fail(post, RuntimeError("injected"))
        dispatcher.time_passed(time.monotonic())
        assert cluster.health().status == "down"
        outputs: dict[int, Any] = {}

        async def work(number: int) -> None:
            outputs[number] = await cluster.generate(PROMPTS[number], **GREEDY)

        for number in range(len(PROMPTS)):
            group.start_soon(work, number)
        await until(lambda: cluster.health().waiting == len(PROMPTS) + 1)
        may_load.set()
        await until(lambda: len(outputs) == len(PROMPTS))
        async for _ in early:
            pass
        assert early.output.token_ids == expected[0]
        assert [outputs[number].token_ids for number in range(len(PROMPTS))] == expected


async def test_a_cluster_that_cannot_start_leaves_nothing_behind(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = EngineSource.engine
    before = threading.active_count()

    def engine(source: EngineSource, number: int, *args: Any, **options: Any) -> Engine:
        if number == 1:
            raise RuntimeError("no room")
        return original(source, number, *args, **options)

    monkeypatch.setattr(EngineSource, "engine", engine)
    with pytest.raises(preble.ReplicaCrashed, match="could not be started: RuntimeError: no room"):
        async with serving(llama):
            raise AssertionError("it started")
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("preble")]
    assert not names
    assert threading.active_count() <= before + 1  # the pool that anyio keeps for a while
