"""Several replicas: wherever requests are placed, copied, moved, cancelled and resumed, every answer is right."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from typing import Any

import anyio
import pytest
from grading import (
    GREEDY,
    Exam,
    Item,
    ask,
    compositions,
    edited,
    exam,
    handbook,
    kv_memory,
    reference,
    serving,
    tokens_of,
)
from watching import faulty_steps, health, until

from preble import Cluster
from preble.engine.engine import Engine
from preble.sched.policies import POLICIES, E2Paper, e2_paper

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
"""For what does not depend on the event loop."""


def burst() -> Exam:
    """Questions about three handbooks, in turns."""
    books = [exam(handbook(number), 16)[::2] for number in range(3)]
    return [item for three in zip(*books, strict=False) for item in three]


async def ask_at_once(cluster: Cluster, items: Exam) -> None:
    """All requests are there, and placed as far as that can be, before the first step for one of them."""
    await cluster.pause()
    async with anyio.create_task_group() as group:
        group.start_soon(ask, cluster, items)
        await until(lambda: cluster.health().pending == len(items))
        await cluster.resume()


@on_asyncio
@pytest.mark.parametrize("policy", list(POLICIES))
async def test_every_policy(policy: str) -> None:
    items = burst()
    async with serving(replicas=3, policy=policy, max_batched_tokens=256) as cluster:
        await ask_at_once(cluster, items)
        await ask(cluster, items[::2])
        assert cluster.stats().hit_rate > 0


@on_asyncio
async def test_a_hot_handbook_is_copied() -> None:
    items = exam(handbook(0), 16)
    async with serving(replicas=3, max_batched_tokens=64) as cluster:
        await ask(cluster, items[:1])
        await ask_at_once(cluster, items)
        copies = cluster._dispatcher._scheduler.hottest_prefixes(1)[0].replicas
        assert len(copies) > 1, "it lies on one replica only"
        outputs = await ask(cluster, items)
        book = tokens_of(handbook(0).text)
        served = Counter(one.placement.replica for one in outputs if one.usage.cached_tokens > book - 16)
        assert len(served) > 1, "the copies were not used"


@on_asyncio
async def test_rebalanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the heavy replica has in its cache goes to the light one."""
    monkeypatch.setattr(e2_paper, "LEAST_GAP", 0.0)
    monkeypatch.setattr(E2Paper, "review_every", 0.0)
    items = exam(handbook(0), 16)
    async with serving(replicas=2, policy=E2Paper(th_bal=1.0)) as cluster:
        for item in items:
            await ask(cluster, [item])
        assert cluster.stats().placements["rebalance"] > 0
        assert {one.prompt_tokens > 0 for one in cluster.stats().replicas} == {True}


async def test_cancelled_in_between() -> None:
    """Some are left at once, some after their first token, some aborted by name; the others get their answers."""
    items = burst()

    async def cancelled(cluster: Cluster, number: int, item: Item) -> None:
        if number % 3 == 0:
            with anyio.move_on_after(0.0) as scope:
                await cluster.generate(item.prompt, **GREEDY)
            assert scope.cancelled_caught
        elif number % 3 == 1:
            async with cluster.stream(item.prompt, **GREEDY) as stream:
                await anext(stream)
        else:
            stream = cluster.stream(item.prompt, request_id=f"{number}", **GREEDY)
            await anext(stream)
            cluster.abort(f"{number}")
            assert reference(item.prompt).startswith((await stream.finish()).text)

    async with serving(replicas=2, max_batched_tokens=61, kv_memory=kv_memory(1500)) as cluster:
        async with anyio.create_task_group() as group:
            for number, item in enumerate(items):
                group.start_soon(cancelled, cluster, number, item)
                if number % 8 == 7:
                    await ask(cluster, items[number - 7 : number + 1])
        await ask(cluster, items)


async def test_resumed_after_an_error_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of three rounds a replica fails that has begun an answer, another one each time."""
    struck: list[int] = []

    def fail(engine: Engine) -> None:
        begun = any(one.generated for one in engine.scheduler.running)
        if begun and len(struck) < rounds and engine._replica not in struck:
            struck.append(engine._replica)
            raise RuntimeError("injected")

    items = [*exam(handbook(0), 16)[::2], *compositions(handbook(0))]
    with faulty_steps(monkeypatch, fail):
        async with serving(replicas=3, policy="round-robin", max_batched_tokens=61) as cluster:
            for rounds in (1, 2, 3):
                await ask(cluster, items[rounds::3])
                await until(lambda: cluster.health().status == "ok")
                assert len(struck) == rounds
            assert len(cluster.stats().recoveries) >= rounds


@on_asyncio
async def test_resumed_after_kill_9() -> None:
    items = [*exam(handbook(0), 16), *compositions(handbook(0))]
    async with serving(replicas=1, workers="process") as cluster:
        await ask(cluster, items[:4])
        async with anyio.create_task_group() as group:
            process = health(cluster).process_id
            assert process is not None
            os.kill(process, signal.SIGSTOP)
            group.start_soon(ask, cluster, items)
            await until(lambda: health(cluster).in_flight == len(items))
            os.kill(process, signal.SIGKILL)
        assert len(cluster.stats().recoveries) == len(items)
        assert health(cluster).restarts == 1


@on_asyncio
async def test_tenants_with_handbooks_that_differ_in_one_value() -> None:
    theirs = edited(handbook(0), 16)[::4]
    ours = [item for item in exam(handbook(0), 16) if item.page in {other.page for other in theirs}]
    async with serving(replicas=2) as cluster:
        for _ in range(2):
            await ask(cluster, ours, namespace="ours")
        for item in theirs:
            before = sum(one.cached_tokens for one in cluster.stats().replicas)
            await ask(cluster, [item], namespace=f"tenant {item.page}")
            assert sum(one.cached_tokens for one in cluster.stats().replicas) == before, "a prefix was shared"
        await ask(cluster, ours, namespace="ours")


async def test_conversations_about_a_handbook() -> None:
    """Every turn asks for something else, with what was said before as its prefix."""

    async def talk(items: Exam) -> None:
        messages: list[Any] = []
        layout = items[0].handbook.text
        for turn, item in enumerate(items):
            messages += item.handbook.messages(item.question)[0 if turn == 0 else 1 :]
            layout += f"Q: {item.question.text}\n"
            output = await cluster.chat(messages, session=item.question.text, **GREEDY)
            assert output.text == reference(f"{layout}A:")
            assert turn == 0 or output.usage.cached_tokens >= tokens_of(layout) // 2
            messages.append({"role": "assistant", "content": output.text})
            layout += f"A:{output.text}<|eos|>\n"

    async with serving(replicas=2) as cluster, anyio.create_task_group() as group:
        for number in range(3):
            items = exam(handbook(number), 16)
            for first in range(2):
                group.start_soon(talk, items[first::8])


@pytest.mark.long
@on_asyncio
@pytest.mark.parametrize("policy", list(POLICIES))
async def test_everything_at_once(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handbooks of all lengths, more of them than the caches hold, in small steps: requests are preempted and left
    alone, replicas fail, come and go, and forget what they know."""
    rng = random.Random(policy)
    books = [exam(handbook(number, facts), 16) for number, facts in enumerate((60, 10, 150, 30, 60, 90))]
    mistakes: set[str] = set()

    def disturb(engine: Engine) -> None:
        running = engine.scheduler.running
        if running and rng.random() < 0.1:
            engine.scheduler.preempt(rng.choice(running).request_id)
        if any(one.generated for one in running) and "fail" in mistakes:
            mistakes.clear()
            raise RuntimeError("injected")

    async def leave(cluster: Cluster, item: Item) -> None:
        async with cluster.stream(item.prompt, **GREEDY) as stream:
            if rng.random() < 0.5:
                await anext(stream)

    with faulty_steps(monkeypatch, disturb):
        async with serving(replicas=2, policy=policy, max_batched_tokens=61, kv_memory=kv_memory(1600)) as cluster:
            for number in range(10):
                items = [rng.choice(rng.choice(books)) for _ in range(40)]
                async with anyio.create_task_group() as group:
                    group.start_soon(ask, cluster, items)
                    for _ in range(10):
                        group.start_soon(leave, cluster, rng.choice(rng.choice(books)))
                    await until(lambda: cluster.health().pending > 0)
                    if number % 4 == 1:
                        mistakes.add("fail")
                    elif number % 4 == 2:
                        added = await cluster.add_replica()
                    elif number % 4 == 3:
                        await cluster.remove_replica(added)
                    elif number:
                        await cluster.reset_prefix_cache()
                await until(lambda: cluster.health().status == "ok")
            assert sum(one.preemptions for one in cluster.stats().replicas) > 0
            cluster._dispatcher._scheduler.check()
