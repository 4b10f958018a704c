"""The public API end to end, under asyncio and trio, on tiny checkpoints."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from transformers import AutoTokenizer

import preble
from preble import Cluster
from preble.engine.messages import Abort
from preble.engine.source import EngineSource

pytestmark = pytest.mark.anyio

PROMPT = "The quick brown fox jumps over the lazy dog and goes on to say that "
SYSTEM = "You are a helpful assistant. Answer briefly and to the point. " * 2


@asynccontextmanager
async def serving(model: Path, **options: Any) -> AsyncIterator[Cluster]:
    """A cluster that must have every page back when its requests are over."""
    defaults = {"replicas": 2, "page_size": 16, "kv_memory": "1MiB", "dtype": "float32"}
    async with Cluster(model, **(defaults | options)) as cluster:
        yield cluster
        await idle(cluster)
        for engine in engines(cluster):
            engine.scheduler.check()


def replicas(cluster: Cluster) -> list[Any]:
    return [post.life for post in cluster._dispatcher.roster._posts.values()]


def engines(cluster: Cluster) -> list[Any]:
    return [replica._engine for replica in replicas(cluster)]


async def idle(cluster: Cluster) -> None:
    """Until every replica is at rest, and then nothing may be left. Needs no time limit: a hang is the failure."""
    while cluster.stats().pending or not all(replica.idle for replica in replicas(cluster)):
        await anyio.lowlevel.checkpoint()
    for engine in engines(cluster):
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_in_use) == (0, 0, 0)
        assert stats.pages_free + stats.pages_cached == stats.pages_total


async def test_three_lines_are_enough(llama: Path) -> None:
    async with Cluster(llama) as cluster:
        output = await cluster.generate(PROMPT, max_tokens=8, temperature=0)
    assert len(output.token_ids) == 8
    assert output.finish_reason == "length"


async def test_an_output_says_what_happened(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    async with serving(llama, policy="prefix-affinity") as cluster:  # e2 goes by how long steps take
        output = await cluster.generate(PROMPT, max_tokens=12, temperature=0, ignore_eos=True)
        again = await cluster.generate(PROMPT, max_tokens=12, temperature=0, ignore_eos=True)
    assert output.usage.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])
    assert (output.usage.cached_tokens, output.usage.completion_tokens) == (0, 12)
    assert again.token_ids == output.token_ids
    assert again.usage.cached_tokens == (output.usage.prompt_tokens - 1) // 16 * 16
    assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)
    timing = output.timing
    assert 0 <= timing.queued <= timing.ttft <= timing.total
    assert timing.tpot > 0
    assert output.placement.replica in (0, 1)
    assert output.placement.reason
    assert again.placement.replica == output.placement.replica


async def test_a_stream_gives_the_same_text_in_pieces(llama: Path) -> None:
    async with serving(llama) as cluster:
        whole = await cluster.generate(PROMPT, max_tokens=20, seed=3)
        chunks = [chunk async for chunk in cluster.stream(PROMPT, max_tokens=20, seed=3)]
        async with cluster.stream(PROMPT, max_tokens=20, seed=3) as stream:
            more = [chunk async for chunk in stream]
        assert stream.output.text == whole.text
    for got in (chunks, more):
        assert "".join(chunk.text for chunk in got) == whole.text
        assert tuple(token for chunk in got for token in chunk.token_ids) == whole.token_ids
        assert [chunk.finish_reason for chunk in got][-1] == whole.finish_reason
        assert not any(chunk.finish_reason for chunk in got[:-1])


async def test_token_ids_are_prompts_too(llama: Path) -> None:
    ids = AutoTokenizer.from_pretrained(llama)(PROMPT)["input_ids"]
    async with serving(llama) as cluster:
        outputs = [
            await cluster.generate(prompt, max_tokens=5, temperature=0)
            for prompt in (PROMPT, ids, tuple(ids), np.array(ids), np.array(ids, np.uint16))
        ]
    assert len({output.token_ids for output in outputs}) == 1


async def test_generate_many_keeps_the_order(llama: Path) -> None:
    prompts = [f"{SYSTEM}Question {number}" for number in range(20)]
    async with serving(llama, max_pending=3) as cluster:
        outputs = await cluster.generate_many(prompts, progress=True, max_tokens=4, temperature=0)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.token_ids == (await cluster.generate(prompt, max_tokens=4, temperature=0)).token_ids
        assert await cluster.generate_many([], max_tokens=4) == []


async def test_generate_many_raises_the_first_error_or_hands_it_over(llama: Path) -> None:
    prompts = ["one", "", "three"]
    async with serving(llama) as cluster:
        with pytest.raises(preble.InvalidRequest, match="empty"):
            await cluster.generate_many(prompts, max_tokens=4)
        one, error, three = await cluster.generate_many(prompts, max_tokens=4, return_exceptions=True)
    assert isinstance(error, preble.InvalidRequest)
    assert one.text is not None
    assert three.text is not None


async def test_chat_uses_the_checkpoints_template_and_reuses_the_history(llama: Path) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    async with serving(llama, policy="prefix-affinity") as cluster:  # e2 goes by how long steps take
        first = await cluster.chat(messages, max_tokens=40, temperature=0, ignore_eos=True)
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert first.usage.prompt_tokens == len(expected)
        raw = await cluster.generate(expected, max_tokens=40, temperature=0, ignore_eos=True)
        assert raw.token_ids == first.token_ids
        # The next turn finds prompt and answer: hand the history over as tokens, as text may encode differently.
        turn = [*expected, *first.token_ids, 1, 2, 50, 51]
        second = await cluster.generate(turn, max_tokens=4)
        assert second.placement.replica == first.placement.replica
        assert second.usage.cached_tokens == (len(expected) + 39) // 16 * 16
        streamed = [
            chunk async for chunk in cluster.stream_chat(messages, max_tokens=40, temperature=0, ignore_eos=True)
        ]
        assert "".join(chunk.text for chunk in streamed) == first.text


async def test_n_gives_different_continuations_of_one_prompt(llama: Path) -> None:
    async with serving(llama) as cluster:
        output = await cluster.generate(PROMPT, n=3, max_tokens=10, seed=7, ignore_eos=True)
        singles = [await cluster.generate(PROMPT, max_tokens=10, seed=7 + i, ignore_eos=True) for i in range(3)]
    assert [one.token_ids for one in output.completions] == [single.token_ids for single in singles]
    assert len({one.token_ids for one in output.completions}) == 3
    assert output.usage.completion_tokens == 30


async def test_stop_strings_and_logprobs(llama: Path) -> None:
    async with serving(llama) as cluster:
        whole = await cluster.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True, logprobs=3)
        assert len(whole.logprobs) == 60
        for token, entry in zip(whole.token_ids, whole.logprobs, strict=True):
            assert entry.token_id == token == entry.top[0][0]
            assert len(entry.top) == 3
        marker = whole.text[20:23]
        cut = whole.text[: whole.text.index(marker)]
        stopped = await cluster.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True, stop=marker)
        pieces = [
            chunk.text
            async for chunk in cluster.stream(PROMPT, max_tokens=60, temperature=0, ignore_eos=True, stop=[marker])
        ]
    assert (stopped.text, stopped.finish_reason) == (cut, "stop")
    assert "".join(pieces) == cut


async def test_an_unseeded_request_repeats_with_the_clusters_seed(llama: Path) -> None:
    texts = []
    for seed in (1, 1, 2):
        async with serving(llama, seed=seed) as cluster:
            texts.append((await cluster.generate(PROMPT, max_tokens=16, ignore_eos=True)).token_ids)
    assert texts[0] == texts[1] != texts[2]


async def test_namespaces_share_no_prefix(llama: Path) -> None:
    async with serving(llama, replicas=1) as cluster:
        for namespace in ("a", "b"):
            first = await cluster.generate(PROMPT, max_tokens=2, namespace=namespace)
            second = await cluster.generate(PROMPT, max_tokens=2, namespace=namespace)
            assert first.usage.cached_tokens == 0
            assert second.usage.cached_tokens > 0


async def test_stats_count_what_was_served(llama: Path) -> None:
    async with serving(llama) as cluster:
        before = cluster.stats()
        assert [one.pages_free == one.pages_total for one in before.replicas] == [True, True]
        outputs = await cluster.generate_many([SYSTEM + str(i) for i in range(6)], max_tokens=5, ignore_eos=True)
        await idle(cluster)
        stats = cluster.stats()
    assert sum(one.generated_tokens for one in stats.replicas) == 30
    assert sum(one.prompt_tokens for one in stats.replicas) == sum(output.usage.prompt_tokens for output in outputs)
    assert sum(one.cached_tokens for one in stats.replicas) == sum(output.usage.cached_tokens for output in outputs)
    assert 0 < stats.hit_rate < 1
    assert sum(stats.placements.values()) == 6
    assert {one.attention for one in stats.replicas} == {"torch"}


@pytest.mark.parametrize("policy", ["round-robin", "least-loaded", "prefix-affinity", "e2"])
async def test_every_policy_serves(llama: Path, policy: str) -> None:
    async with serving(llama, policy=policy) as cluster:
        outputs = await cluster.generate_many([SYSTEM + str(i % 3) for i in range(9)], max_tokens=4, temperature=0)
        assert cluster.stats().policy == policy
    assert len({output.token_ids for output in outputs}) <= 3
    if policy == "round-robin":
        assert {output.placement.replica for output in outputs} == {0, 1}


# Leaving early


async def test_breaking_out_of_a_stream_frees_its_pages(llama: Path) -> None:
    async with serving(llama) as cluster:
        async for _ in cluster.stream(PROMPT, max_tokens=150, ignore_eos=True):
            break
        gc.collect()
        await idle(cluster)
        assert sum(engine.generated_tokens for engine in engines(cluster)) < 150


async def test_an_abort_reaches_the_engine_before_its_next_step(llama: Path) -> None:
    async with serving(llama, replicas=1) as cluster:
        [replica] = replicas(cluster)
        engine = replica._engine
        original = engine.step
        computed: list[int] = []

        def step() -> Any:
            report = original()
            computed.append(engine.computed_tokens)
            if len(computed) == 3:
                replica.send(Abort(*cluster._dispatcher._branches))
            return report

        engine.step = step
        async with cluster.stream(PROMPT, max_tokens=150, ignore_eos=True, request_id="mine") as stream:
            await anext(stream)
            while not replica.idle:
                await anyio.lowlevel.checkpoint()
            assert engine.stats().pages_in_use == 0
        assert len(computed) >= 3
        assert computed[-1] == computed[2], "a step after the abort still worked on the request"


async def test_a_timeout_raises_with_what_there_was(llama: Path) -> None:
    async with serving(llama) as cluster:
        with pytest.raises(preble.RequestTimeout) as caught:
            await cluster.generate(PROMPT, max_tokens=180, ignore_eos=True, timeout=1e-9)
        assert caught.value.partial is None
        with pytest.raises(TimeoutError):
            async for _ in cluster.stream(PROMPT, max_tokens=180, ignore_eos=True, timeout=1e-9):
                pass
        await cluster.generate(PROMPT, max_tokens=2, timeout=600)

        stream = cluster.stream(PROMPT, max_tokens=180, ignore_eos=True, timeout=600)
        first = await anext(stream)
        stream._deadline = 0.0  # the time is up in the middle, without waiting for it
        with pytest.raises(preble.RequestTimeout, match="within its timeout of 600 s") as caught:
            await stream.finish()
        partial = caught.value.partial
        assert partial is not None
        assert partial.token_ids[: len(first.token_ids)] == first.token_ids
        assert 0 < len(partial.token_ids) < 180
        assert partial.finish_reason == "abort"


async def test_cancelling_the_task_frees_its_pages(llama: Path) -> None:
    async with serving(llama) as cluster, anyio.create_task_group() as group:

        async def work() -> None:
            await cluster.generate(PROMPT, max_tokens=180, ignore_eos=True)

        for _ in range(5):
            group.start_soon(work)
        while cluster.stats().pending < 5:
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()


async def test_abort_gives_what_was_generated(llama: Path) -> None:
    async with serving(llama) as cluster:
        async with cluster.stream(PROMPT, max_tokens=180, ignore_eos=True, request_id="mine") as stream:
            async for _ in stream:
                assert cluster.abort("mine")
                break
            rest = [chunk async for chunk in stream]
            output = stream.output
        assert output.finish_reason == "abort"
        assert 0 < len(output.token_ids) < 180
        assert all(chunk.finish_reason in (None, "abort") for chunk in rest)
        assert not cluster.abort("mine")


async def test_cancellations_leak_nothing(llama: Path) -> None:
    """Tasks cancelled, streams dropped, timeouts and aborts at random moments."""
    rng = random.Random(0)
    async with serving(llama, max_pending=40, kv_memory="64KiB", max_batched_tokens=64) as cluster:

        async def one(number: int) -> None:
            prompt = SYSTEM[: rng.randrange(1, 120)] + str(number)
            options: dict[str, Any] = {"max_tokens": rng.randrange(1, 40), "request_id": str(number)}
            steps = rng.randrange(12)
            match rng.randrange(4):
                case 0:
                    with anyio.CancelScope() as scope:
                        async with anyio.create_task_group() as inner:
                            inner.start_soon(generate, prompt, options)
                            for _ in range(20 * steps):
                                await anyio.lowlevel.checkpoint()
                            scope.cancel()
                case 1:
                    async for _ in cluster.stream(prompt, **options):
                        steps -= 1
                        if steps < 0:
                            break
                case 2:
                    with pytest.raises(preble.RequestTimeout):
                        await cluster.generate(prompt, timeout=1e-6 * steps + 1e-9, **options)
                case 3:
                    async for _ in cluster.stream(prompt, **options):
                        steps -= 1
                        if steps < 0:
                            cluster.abort(str(number))

        async def generate(prompt: str, options: dict[str, Any]) -> None:
            await cluster.generate(prompt, **options)

        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(one, number)
        gc.collect()
        await idle(cluster)
        assert cluster._door.free == 40
        assert not cluster._dispatcher._branches
        assert not cluster._dispatcher._scheduler.waiting
        for replica in (0, 1):
            assert not cluster._dispatcher._scheduler.in_flight(replica)
        cluster._dispatcher._scheduler.check()


# Bad input


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([1, 2, 272], {}, r"token id 272 is not in the vocabulary \(0 to 271\)"),
        ([1, -2], {}, "token id -2 is not"),
        ([1, 2**40], {}, "32 bits"),
        ([1, 2.5], {}, "integers"),
        ([True, False], {}, "integers"),
        ([[1, 2], [3, 4]], {}, "flat sequence"),
        ([[1, 2], [3]], {}, "flat sequence"),
        (["a", "b"], {}, "generate_many"),
        (b"bytes", {}, "decode it"),
        (17, {}, "not int"),
        (None, {}, "not NoneType"),
        ("x", {"max_tokens": 0}, "max_tokens must be at least 1"),
        ("x", {"temperature": -1}, "temperature must be at least 0"),
        ("x", {"min_tokens": 9, "max_tokens": 3}, "min_tokens=9 is more than max_tokens=3"),
        ("x", {"temperature": 0, "n": 2}, "equal texts"),
        ("x", {"stop_token_ids": [999]}, "not below the vocabulary size 272"),
        ("x", {"logit_bias": {999: 1.0}}, "not below the vocabulary size 272"),
        ("x", {"temprature": 1.0}, "unknown option 'temprature'; did you mean 'temperature'"),
        ("x", {"sampling": {"top_k": 3}}, "must be a SamplingParams"),
        ("x", {"priority": "high"}, "priority must be an integer"),
        ("x", {"timeout": 0}, "timeout must be a positive number"),
        ("x", {"session": ""}, "session must be a non-empty string"),
        ("x", {"session": 7}, "session must be a string"),
        ("x", {"expected_tokens": 0}, "expected_tokens must be a positive integer"),
        ("x", {"expected_tokens": 2.5}, "expected_tokens must be a positive integer"),
        ("x", {"namespace": 3}, "namespace must be a string"),
        ("x", {"namespace": "\ud800"}, "namespace must be valid text"),
        ("x", {"request_id": ""}, "request_id must be"),
        ("x", {"request_id": "\ud800"}, "request_id must be valid text"),
    ],
)
async def test_bad_requests_are_refused_before_any_work(
    llama: Path, prompt: Any, options: dict[str, Any], message: str
) -> None:
    async with serving(llama, replicas=1) as cluster:
        with pytest.raises(preble.InvalidRequest, match=message):
            await cluster.generate(prompt, **options)
        assert cluster.stats().placements == {}
        assert cluster._door.free == cluster._door.limit


async def test_prompts_that_can_never_fit_are_refused(llama: Path) -> None:
    async with serving(llama) as cluster:
        with pytest.raises(preble.PromptTooLong, match="model's context of 256"):
            await cluster.generate([5] * 256, max_tokens=1)
        full = await cluster.generate([5] * 250, max_tokens=100, ignore_eos=True)
        assert (len(full.token_ids), full.finish_reason) == (6, "length")
    async with serving(llama, kv_memory="32KiB") as cluster:
        with pytest.raises(preble.PromptTooLong, match=r"KV pages for \d+ tokens \(raise kv_memory\)"):
            await cluster.generate([5] * 250, max_tokens=1)


async def test_a_request_id_is_used_once_at_a_time(llama: Path) -> None:
    async with serving(llama) as cluster:
        async with cluster.stream(PROMPT, max_tokens=100, ignore_eos=True, request_id="a"):
            with pytest.raises(preble.InvalidRequest, match="in flight already"):
                await cluster.generate("x", request_id="a")
        assert (await cluster.generate("x", max_tokens=1, request_id="a")).request_id == "a"


async def test_a_cluster_is_used_inside_its_block(llama: Path) -> None:
    cluster = Cluster(llama, dtype="float32", kv_memory="1MiB")
    for call in (lambda: cluster.stream("x"), cluster.stats, lambda: cluster.abort("x")):
        with pytest.raises(preble.ClusterStateError, match="async with"):
            call()
    with pytest.raises(preble.ClusterStateError, match="async with"):
        await cluster.generate("x")
    async with cluster:
        with pytest.raises(preble.ClusterStateError, match="entered once"):
            await cluster.__aenter__()
        unused = cluster.stream("x")
    with pytest.raises(preble.ClusterStateError, match="was left"):
        await cluster.generate("x")
    with pytest.raises(preble.ClusterStateError, match="was left"):
        await anext(unused)


async def test_leaving_the_block_ends_what_runs(llama: Path) -> None:
    errors = []

    async with anyio.create_task_group() as group, serving_unchecked(llama) as cluster:

        async def work() -> None:
            with pytest.raises(preble.ClusterStateError, match="closed") as caught:
                await cluster.generate(PROMPT, max_tokens=180, ignore_eos=True)
            errors.append(caught.value)

        for _ in range(3):
            group.start_soon(work)
        while cluster.stats().pending < 3:
            await anyio.lowlevel.checkpoint()
    assert len(errors) == 3


def serving_unchecked(model: Path) -> Cluster:
    return Cluster(model, replicas=2, dtype="float32", kv_memory="1MiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "replicas must be a positive integer"),
        ({"page_size": 2.5}, "page_size must be"),
        ({"workers": "fibers"}, "workers must be"),
        ({"devices": "cpu"}, "sequence of names"),
        ({"devices": []}, "devices is empty"),
    ],
)
async def test_bad_cluster_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(preble.InvalidRequest, match=message):
        Cluster("demo", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "roundrobin"}, preble.InvalidRequest, "round-robin"),
        ({"local_order": "preeble"}, preble.InvalidRequest, "did you mean .preble.*"),
        ({"dtype": "int8"}, preble.PrebleError, "int8"),
        ({"kv_memory": "lots"}, preble.InvalidRequest, "2GiB"),
        ({"kv_memory": 16}, preble.DeviceError, "not one page"),
        ({"kv_memory": "900 apples"}, preble.InvalidRequest, "2GiB"),
        ({"kv_memory": "900000GiB"}, preble.DeviceError, "GiB free"),
        ({"devices": ["cuda:7"]}, preble.DeviceError, "cuda:7"),
        ({"devices": ["gpu"]}, preble.DeviceError, "not a device name"),
        ({"devices": ["meta"]}, preble.DeviceError, "run on 'cpu' and on CUDA"),
    ],
)
async def test_what_cannot_be_started_says_why(
    llama: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        async with Cluster(llama, **options):
            raise AssertionError("it started")


async def test_a_folder_that_is_no_checkpoint_says_which_file(tmp_path: Path, llama: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (tmp_path / name).unlink()
        with pytest.raises(preble.CheckpointError, match=name.partition(".")[0]):
            async with Cluster(tmp_path):
                raise AssertionError("it started")


# One request's failure never disturbs another's


async def test_a_crashed_replica_costs_its_requests_only_time(llama: Path) -> None:
    prompts = [SYSTEM[:30] + str(number) for number in range(10)]
    options = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    async with serving(llama) as cluster:
        expected = [output.token_ids for output in await cluster.generate_many(prompts, **options)]
    async with Cluster(llama, replicas=2, policy="round-robin", dtype="float32", kv_memory="1MiB") as cluster:
        broken = engines(cluster)[0]
        steps = 0
        original = broken.step

        def step() -> Any:
            nonlocal steps
            steps += 1
            if steps == 12:
                raise RuntimeError("injected")
            return original()

        broken.step = step
        outputs = await cluster.generate_many(prompts, **options)
        assert [output.token_ids for output in outputs] == expected
        assert cluster.health().replicas[0].last_error == "RuntimeError: injected"


async def test_when_no_replica_comes_back_requests_fail_clearly(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(llama, replicas=1, dtype="float32", kv_memory="1MiB", restart_timeout=1.0) as cluster:
        broken = engines(cluster)[0]

        def step() -> Any:
            raise RuntimeError("injected")

        def load(*args: Any, **options: Any) -> Any:
            raise RuntimeError("the disk is gone")

        broken.step = step
        monkeypatch.setattr(EngineSource, "engine", load)
        with pytest.raises(preble.ReplicaCrashed, match=r"no replica came up within 1 s.*the disk is gone"):
            await cluster.generate("x", max_tokens=3)
        assert cluster.health().status == "down"


async def test_a_lone_replica_that_crashes_comes_back_and_goes_on(llama: Path) -> None:
    options = {"max_tokens": 40, "temperature": 0.8, "seed": 3, "ignore_eos": True}
    async with serving(llama, replicas=1) as cluster:
        expected = await cluster.generate(PROMPT, **options)
    async with serving(llama, replicas=1) as cluster:
        broken = engines(cluster)[0]
        stream = cluster.stream(PROMPT, **options)
        chunks = [await anext(stream), await anext(stream)]

        def step() -> Any:
            raise RuntimeError("injected")

        broken.step = step
        chunks += [chunk async for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == expected.text == stream.output.text
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids
        (health,) = cluster.health().replicas
        assert (health.state, health.restarts, health.failures) == ("serving", 1, 1)
        assert health.last_error == "RuntimeError: injected"
