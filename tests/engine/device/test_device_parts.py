"""The parts of the device path by themselves: memory, options, the copy per step, rows, buckets."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from device_world import CPU, DeviceWorld, finish, prompts, runner_of, submit, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import preble
from preble.engine.config import ModelConfig
from preble.engine.device.build import DeviceOptions, check_group, check_options
from preble.engine.device.graphs import DecodeBuffers, DecodeGraphs, buckets_up_to
from preble.engine.device.memory import DeviceMemory
from preble.engine.device.queue import HostQueue
from preble.engine.device.rows import RequestRows
from preble.engine.device.staging import Staging
from preble.engine.device.step import LogitRows
from preble.errors import DeviceError, InvalidRequest, UnsupportedModel
from preble.kernels.architecture import SM_80, SM_90
from preble.sched.block_table import BlockTable
from preble.sched.sequence import Sequence
from preble.sched.step_plan import Chunk, StepPlan

GIB = 1 << 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DeviceWorld:
    return DeviceWorld(tmp_path_factory.mktemp("llama"))


def memory(**changes: int) -> DeviceMemory:
    parts = {"total": 80 * GIB, "free": 60 * GIB, "activations": 2 * GIB, "graphs": GIB, "fixed": GIB // 2}
    return DeviceMemory("cuda:0", **(parts | changes))


def test_pages_get_what_is_left() -> None:
    left = 60 * GIB - int(0.08 * 80 * GIB)
    one = memory().kv_bytes(replicas=1, wanted=None)
    assert one == pytest.approx(left - 3.5 * GIB, abs=16)
    four = memory().kv_bytes(replicas=4, wanted=None)
    assert 4 * four == pytest.approx(left - 4 * 3.5 * GIB, abs=64)
    assert memory().kv_bytes(replicas=4, wanted=GIB) == GIB


@pytest.mark.parametrize(
    ("parts", "replicas", "wanted", "message"),
    [
        ({"free": 8 * GIB}, 1, None, "cuda:0 has no memory left.*max_batched_tokens"),
        ({}, 1, 70 * GIB, r"70.00 GiB for each of 1 replicas on cuda:0 is more than the 50.10 GiB"),
        ({}, 16, None, "number of replicas"),
        ({"free": 5 * GIB}, 1, GIB, "more than the 0.00 GiB"),
    ],
)
def test_too_little_memory_says_what_takes_it_and_what_to_change(
    parts: dict[str, int], replicas: int, wanted: int | None, message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        memory(**parts).kv_bytes(replicas=replicas, wanted=wanted)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "flash"}, InvalidRequest, "attention must be one of auto, triton, flash-attn, torch"),
        ({"kv_dtype": "int4"}, InvalidRequest, "kv_dtype must be one of auto, fp8"),
        ({"page_size": 48}, InvalidRequest, "power of two from 16 to 256"),
        ({"page_size": 8}, InvalidRequest, "power of two from 16 to 256"),
        ({"page_size": 512}, InvalidRequest, "power of two from 16 to 256"),
    ],
)
def test_options_that_no_kernel_covers_are_refused(
    world: DeviceWorld, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        world.load(**options)


def test_heads_that_no_kernel_covers_are_refused(llama: Path) -> None:
    config = ModelConfig.from_folder(llama)
    options = DeviceOptions(page_size=16, kv_bytes=None, max_batched_tokens=64, max_running=8)
    for width in (16, 80, 256):
        object.__setattr__(config, "head_dim", width)
        check_options(config, options)
    for width in (320, 20, 8):
        object.__setattr__(config, "head_dim", width)
        with pytest.raises(UnsupportedModel, match=rf"heads of {width} numbers.*devices=\['cpu'\]"):
            check_options(config, options)


def test_more_query_heads_than_a_tile_has_rows_are_refused(llama: Path) -> None:
    config = ModelConfig.from_folder(llama)
    for heads, dtype, chip, refused in (
        (71, torch.bfloat16, SM_90, False),
        (71, torch.bfloat16, SM_80, True),
        (64, torch.float32, SM_90, True),
        (8, torch.float32, SM_80, False),
    ):
        object.__setattr__(config, "query_heads", heads)
        object.__setattr__(config, "kv_heads", 1)
        with (
            pytest.raises(UnsupportedModel, match=f"{heads} query heads for each KV head") if refused else nullcontext()
        ):
            check_group(config, dtype, chip)


def test_kv_memory_that_holds_no_page_is_refused(world: DeviceWorld) -> None:
    with pytest.raises(DeviceError, match="hold not one page"):
        world.load(kv_bytes=100)


@pytest.mark.anyio
async def test_the_cpu_runs_the_kernels_for_debugging_only(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="TRITON_INTERPRET=1"):
        async with preble.Cluster(llama, devices=["cpu"], attention="triton"):
            raise AssertionError("it started")
    for options, message in (
        ({"attention": "flash-attn"}, "'auto' or 'torch' on the CPU"),
        ({"kv_dtype": "fp8"}, "kv_dtype must be 'auto' on the CPU"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            async with preble.Cluster(llama, devices=["cpu"], **options):
                raise AssertionError("it started")


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=8))
def test_arrays_arrive_as_they_were_sent(steps: list[list[int]]) -> None:
    staging = Staging(HostQueue(), CPU, depth=3)
    generator = np.random.default_rng(0)
    for sizes in steps:
        arrays = [generator.integers(-5, 5, size=(size, 3), dtype=np.int32) for size in sizes]
        sent = staging.send(arrays)
        for array, there in zip(arrays, sent, strict=True):
            assert there.shape == array.shape
            assert there.numpy().tolist() == array.tolist()
            assert there.storage_offset() % 4 == 0, "16 bytes"


class SlowQueue(HostQueue):
    """Notes when the host waits for a copy."""

    def __init__(self) -> None:
        self.waited: list[int] = []
        self.marks = 0

    def mark(self) -> Any:
        self.marks += 1
        number, waited = self.marks, self.waited

        class Mark:
            def wait(self) -> None:
                waited.append(number)

        return Mark()


def test_a_buffer_is_filled_again_only_when_its_copy_is_done() -> None:
    queue = SlowQueue()
    staging = Staging(queue, CPU, depth=3)
    for step in range(1, 6):
        staging.send([np.zeros(4, np.int32)])
        assert queue.waited == list(range(1, step - 2)), "the copy of three steps ago"


def chunk(sequence: Sequence) -> Chunk:
    return Chunk(sequence, 0, 1, True)


def running(name: str, pages: list[int]) -> Sequence:
    sequence = Sequence(name, np.array([1], np.int32), prompt_length=1, max_length=9)
    sequence.table = BlockTable(pages)
    sequence.node = object()  # type: ignore[assignment] # anything: it runs
    return sequence


def test_the_device_is_told_of_pages_once() -> None:
    rows = RequestRows(2)
    one, two = running("one", [5, 6]), running("two", [7])
    numbers, new, updates = rows.place([chunk(one), chunk(two)])
    assert sorted(numbers) == [0, 1]
    assert len(new) == 2
    assert updates.tolist() == [[numbers[0], 0, 5], [numbers[0], 1, 6], [numbers[1], 0, 7]]
    assert rows.place([chunk(two), chunk(one)])[2].tolist() == []
    one.table.extend([9])
    assert rows.place([chunk(one), chunk(two)])[2].tolist() == [[numbers[0], 2, 9]]
    one.table.replace(0, [8])  # another request has computed the same page
    assert rows.place([chunk(one)])[2].tolist() == [[numbers[0], 0, 8]]


def test_rows_of_requests_that_left_are_given_to_others() -> None:
    rows = RequestRows(2)
    one, two = running("one", [5]), running("two", [7])
    numbers, _, _ = rows.place([chunk(one), chunk(two)])
    one.node = None
    three = running("three", [9, 4])
    [number], [row], updates = rows.place([chunk(three)])
    assert number == numbers[0]
    assert row.sequence is three
    assert updates.tolist() == [[number, 0, 9], [number, 1, 4]]
    two.node = None
    one.node, one.table = object(), BlockTable([3])  # type: ignore[assignment]
    [back], [row], updates = rows.place([chunk(one)])
    assert back == numbers[1], "a preempted request comes back to another row"
    assert updates.tolist() == [[back, 0, 3]]


def test_logits_are_made_only_for_what_samples() -> None:
    def one(name: str, **options: Any) -> Sequence:
        state = SimpleNamespace(params=preble.SamplingParams(**options), stop_ids=np.zeros(0, np.int64))
        payload = SimpleNamespace(sampling=state)
        return Sequence(name, np.arange(9, dtype=np.int32), prompt_length=9, max_length=20, payload=payload)

    decode, host, part, whole = one("decode"), one("host", logprobs=1), one("part"), one("whole")
    chunks = [Chunk(decode, 8, 1, True), Chunk(host, 8, 1, True), Chunk(part, 0, 5, False), Chunk(whole, 2, 7, True)]
    plan = StepPlan([chunks[3], chunks[0], chunks[2], chunks[1]], 14)
    rows = LogitRows.of(chunks, plan, every=False)
    assert rows.entries.tolist() == [0, 1, 13], "the last entry of each chunk that samples"
    assert rows.positions.tolist() == [9, 9, 9]
    assert rows.table_rows([4, 5, 6, 7]).tolist() == [4, -1, 7], "the host samples for one"
    assert rows.places == [2, 0, 1], "in the order of the plan"
    assert [(one.chunk, one.position) for one in rows.on_host] == [(2, 9)]
    assert LogitRows.of(chunks, plan, every=True).table_rows([4, 5, 6, 7]).tolist() == [4, -1, -1, 7]


@given(largest=st.integers(1, 600))
def test_buckets_waste_little(largest: int) -> None:
    buckets = buckets_up_to(largest)
    assert buckets == sorted(set(buckets))
    assert buckets[0] == 1
    assert buckets[-1] == largest
    for count in range(1, largest + 1):
        size = next(bucket for bucket in buckets if bucket >= count)
        assert size - count <= max(1, 3 * (count >= 5), count // 4 + 4 * (count > 32))
    assert len(buckets) <= 10 + largest // 8


@pytest.mark.parametrize("running", [1, 3, 8])
def test_a_padded_step_gives_what_an_exact_one_does(world: DeviceWorld, running: int) -> None:
    """Five decodes run in a bucket of eight; what lies in the buffers from larger steps before is not seen."""
    engine = world.device(max_running=running)
    sizes: list[int] = []
    graphs = runner_of(engine)._graphs
    run = graphs.run

    def watched(size: int, tiles: int) -> torch.Tensor:
        sizes.append(size)
        return run(size, tiles)

    graphs.run = watched  # type: ignore[method-assign]
    requests = [submit(str(number), prompt, 3 + number) for number, prompt in enumerate(prompts(8))]
    mine = {name: tokens(deltas) for name, deltas in finish(engine, requests).items()}
    for request in requests:
        [alone] = finish(world.host(), [request]).values()
        assert mine[request.request_id] == tokens(alone)
    assert max(sizes) == running
    assert set(sizes) <= set(buckets_up_to(running))


def test_a_runner_that_is_dropped_gives_its_memory_back_at_once(world: DeviceWorld) -> None:
    """What was rehearsed must be gone when the pages are counted."""
    gc.collect()
    gc.disable()
    try:
        runner = world.load().runner(8)
        keys = weakref.ref(runner._forward.kv)
        del runner
        assert keys() is None
    finally:
        gc.enable()


def test_graphs_are_captured_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of capture and replay; what CUDA does with it can only be seen on a GPU."""
    captured: list[tuple[int, int]] = []
    graphs = DecodeGraphs(
        lambda batch: torch.zeros(len(batch.token_ids), 4),
        DecodeBuffers(8, torch.zeros(8, 4, dtype=torch.int32), shared_tiles=(2, 4)),
        [(1, 0), (4, 0), (8, 0), (4, 1), (8, 2)],
    )
    monkeypatch.setattr(graphs, "_capture", lambda size, tiles, pool: captured.append((size, tiles)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    graphs.capture()
    assert captured == [(8, 2), (8, 0), (4, 1), (4, 0), (1, 0)]


def test_the_package_imports_without_triton() -> None:
    """Only what computes on a GPU needs Triton; elsewhere it need not even be installed."""
    code = """
import sys
sys.modules["triton"] = None
import preble, preble.cluster, preble.replica.launch, preble.engine.decoder, preble.engine.host_load
"""
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
