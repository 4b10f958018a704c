"""Sizes and devices of replicas."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preble.engine.host_load import kv_pages
from preble.engine.loading import load_model
from preble.engine.options import EngineOptions
from preble.engine.source import EngineSource, parse_bytes
from preble.errors import DeviceError, InvalidRequest
from preble.replica.devices import place_replicas
from preble.replica.launch import Launcher, Workers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("512 mib", 512 << 20),
        ("1.5GB", 1_500_000_000),
        (" 3kb ", 3000),
    ],
)
def test_bytes_are_read_with_their_units(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 giblets", "0", 0, -5, True, "nan", "1e9"])
def test_bytes_that_mean_nothing_are_refused(text: int | str) -> None:
    with pytest.raises(InvalidRequest, match="kv_memory must be"):
        parse_bytes(text)


def test_devices_are_used_in_turn() -> None:
    assert place_replicas(None, ["cpu", "cpu"]) == [torch.device("cpu")] * 2
    assert place_replicas(3, ["cpu"]) == [torch.device("cpu")] * 3


def test_pages_are_what_the_memory_holds(llama: Path) -> None:
    model = load_model(llama, device=torch.device("cpu"), dtype="float32")
    page = 2 * 2 * 16 * 2 * 8 * 4  # K and V, layers, tokens, KV heads, head size, bytes
    assert kv_pages(model, 16, 10 * page + 5, sharing=1) == 10
    with pytest.raises(DeviceError, match="holds not one page"):
        kv_pages(model, 16, page - 1, sharing=1)
    with pytest.raises(DeviceError, match="for each of 4 replicas"):
        kv_pages(model, 16, 1 << 50, sharing=4)
    assert kv_pages(model, 16, None, sharing=2) * page <= 4 << 30


def test_engines_on_a_device_share_one_copy_of_the_weights(llama: Path) -> None:
    source = EngineSource(str(llama), EngineOptions(dtype="float32", page_size=16, kv_memory="64KiB"))
    engines = [source.engine(number, "cpu", sharing=3) for number in range(3)]
    few = source.engine(3, "cpu", sharing=3, pages=2)
    assert len({id(engine._runner._model) for engine in engines}) == 1
    assert len({id(engine._runner._kv) for engine in engines}) == 3
    assert [engine.stats().replica for engine in engines] == [0, 1, 2]
    assert engines[0].ready().pages == (64 << 10) // (2 * 2 * 16 * 2 * 8 * 4)
    assert few.ready().pages == 2


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc, which only Linux has")
def test_what_loads_a_model_leaves_no_openmp_threads_behind() -> None:
    code = """
import os, torch
from preble.replica.launch import in_a_thread_of_its_own

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.set_num_threads(2)
    torch.ones(4_000_000).add_(1)
    return threads()

before = threads()
during = in_a_thread_of_its_own(compute)
once = threads()  # some that the libraries start once for good, and some that are about to end
for _ in range(8):
    in_a_thread_of_its_own(compute)
for _ in range(100_000):
    if threads() <= once:
        break
    os.sched_yield()
print(before, during, once, threads())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before, during, once, in_the_end = map(int, result.stdout.split())
    assert during > before + 1, "the computation was to use a thread of OpenMP"
    assert in_the_end <= once


@pytest.mark.parametrize(
    ("devices", "workers", "in_processes"),
    [
        (["cpu", "cpu"], "auto", False),
        (["cpu"], "process", True),
        (["cuda:0", "cuda:1"], "auto", True),
        (["cuda:0", "cuda:1"], "thread", False),
        (["cuda:0", "cuda:0"], "auto", False),
        (["cuda:0", "cpu"], "auto", False),
    ],
)
def test_replicas_with_a_gpu_of_their_own_are_processes(
    llama: Path, devices: list[str], workers: Workers, in_processes: bool
) -> None:
    launcher = Launcher(str(llama), [torch.device(name) for name in devices], workers, EngineOptions())
    assert launcher.in_processes == in_processes


def test_processes_on_one_gpu_must_know_their_share_of_it(llama: Path) -> None:
    shared = [torch.device("cuda:0")] * 2
    with pytest.raises(InvalidRequest, match="need kv_memory"):
        Launcher(str(llama), shared, "process", EngineOptions())
    Launcher(str(llama), shared, "process", EngineOptions(kv_memory="1GiB"))
