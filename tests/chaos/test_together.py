"""Replicas that fail together: that a request was on the way to one of them is not held against it, for a while."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest

import preble
from preble import Cluster, dispatcher
from preble.engine.engine import Engine
from preble.engine.messages import Submit
from preble.replica import lifecycle
from preble.replica.launch import Launcher

pytestmark = pytest.mark.anyio

OPTIONS: dict[str, Any] = {"page_size": 16, "kv_memory": "1MiB", "dtype": "float32"}
PROMPTS = [f"Number {number}: the quick brown fox jumps over the lazy dog" for number in range(12)]
SEEDED: dict[str, Any] = {"max_tokens": 100, "temperature": 1.0, "seed": 11, "ignore_eos": True}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_all_killed_at_once(llama: Path) -> None:
    async with Cluster(llama, replicas=1, **OPTIONS) as cluster:
        expected = [output.token_ids for output in await cluster.generate_many(PROMPTS, **SEEDED)]
    async with Cluster(llama, replicas=2, workers="process", policy="round-robin", **OPTIONS) as cluster:
        streams = [cluster.stream(prompt, **SEEDED) for prompt in PROMPTS]
        for stream in streams:
            await anext(stream)
        for replica in cluster.health().replicas:
            assert replica.process_id is not None
            os.kill(replica.process_id, signal.SIGKILL)
        outputs = [await stream.finish() for stream in streams]
    assert [output.token_ids for output in outputs] == expected


async def test_a_request_that_lost_its_replica_does_not_queue_anew(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, queued = Engine.submit, []

    def submit(engine: Engine, request: Submit) -> None:
        original(engine, request)
        sequence = engine.scheduler.get(request.request_id)
        if sequence is not None and request.namespace == "ours":
            queued.append((request.request_id, sequence.arrived, request.arrived))

    monkeypatch.setattr(Engine, "submit", submit)
    async with Cluster(llama, replicas=2, **OPTIONS) as cluster:
        stream = cluster.stream(PROMPTS[0], namespace="ours", **SEEDED)
        await anext(stream)
        roster = cluster._dispatcher.roster
        roster._fail(roster._posts[stream.output.placement.replica], RuntimeError("injected"))
        await stream.finish()
    (name, first, told), (again, arrived, known) = queued
    assert name == again
    assert told is None
    assert known is not None
    assert arrived == known <= first


async def test_a_request_that_no_replica_can_even_take_in_fails_in_the_end(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "LOSSES", 4)
    monkeypatch.setattr(lifecycle, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(lifecycle, "LONGEST_DELAY", 0.02)
    original, deaths = Engine.submit, []

    def submit(engine: Engine, request: Submit) -> None:
        if request.namespace == "poison":
            deaths.append(request)
            raise RuntimeError("poisoned")
        original(engine, request)

    monkeypatch.setattr(Engine, "submit", submit)
    async with Cluster(llama, replicas=2, **OPTIONS) as cluster:
        with pytest.raises(preble.ReplicaCrashed, match=r"was on 4 replicas when they failed.*poisoned"):
            await cluster.generate(PROMPTS[0], namespace="poison")
        assert len(deaths) == 4
        assert len((await cluster.generate(PROMPTS[0], **SEEDED)).token_ids) == SEEDED["max_tokens"]


async def test_a_restart_that_cannot_even_begin_is_tried_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "FIRST_DELAY", 0.01)
    original, attempts = Launcher.start, []

    def start(*args: Any) -> Any:
        attempts.append(args)
        if len(attempts) < 3:
            raise RuntimeError("can't start new thread")
        return original(*args)

    async with Cluster(llama, replicas=2, **OPTIONS) as cluster:
        monkeypatch.setattr(Launcher, "start", start)
        roster = cluster._dispatcher.roster
        roster._fail(roster._posts[0], RuntimeError("injected"))
        while cluster.health().status != "ok":  # noqa: ASYNC110 - no event is set when this becomes true
            await anyio.sleep(0.001)
        assert len(attempts) == 3
        assert len((await cluster.generate(PROMPTS[0], **SEEDED)).token_ids) == SEEDED["max_tokens"]
