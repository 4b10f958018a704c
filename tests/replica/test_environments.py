"""Process replicas work wherever Python does, and nothing of them is left there: a program of its own for each test."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

import preble

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc, which only Linux has")

PATIENCE = 120.0
"""Seconds until a test that waits for something has failed."""

HEAD = """
import asyncio
import preble

cluster = preble.Cluster(MODEL, workers="process", page_size=16, kv_memory="1MiB", dtype="float32")

async def ask():
    output = await cluster.generate("x", max_tokens=3, ignore_eos=True)
    print("worker", cluster.health().replicas[0].process_id, "tokens", len(output.token_ids), flush=True)

async def main():
    async with cluster:
        await ask()
"""
WORKER = re.compile(r"worker (\d+) tokens 3$", re.MULTILINE)


@contextmanager
def python(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python of its own, in a process group of its own, as a terminal would have it."""
    root = Path(preble.__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def source(model: Path, rest: str) -> str:
    return HEAD.replace("MODEL", repr(str(model))) + rest


def said(program: subprocess.Popen[str], given: str | None = None) -> tuple[str, str]:
    return program.communicate(given, timeout=PATIENCE)


def gone(pid: int | str | None) -> bool:
    """Whether no process of that id is left, not even an unburied one."""
    assert pid is not None
    return not Path(f"/proc/{pid}").exists()


@contextmanager
def serving(model: Path, rest: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program that has answered a request, and a handle of its worker, of which nothing may be left in the end."""
    with python("-c", source(model, rest)) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        found = WORKER.match(line)
        assert found, (line, said(program))
        worker = os.pidfd_open(int(found[1]))
        try:
            yield program, worker
            assert select.select([worker], [], [], PATIENCE)[0], "the worker outlives its program"
        finally:
            os.close(worker)


@pytest.mark.parametrize(
    "way",
    [
        "file",
        pytest.param("argument", marks=pytest.mark.long),
        pytest.param("stdin", marks=pytest.mark.long),
        pytest.param("interactive", marks=pytest.mark.long),
        pytest.param("imported", marks=pytest.mark.long),
    ],
)
def test_a_program_needs_no_guard(llama: Path, tmp_path: Path, way: str) -> None:
    """However Python came by it: a worker does not run what its parent runs."""
    text = source(llama, "\nasyncio.run(main())\n")
    script = tmp_path / "script.py"
    script.write_text(text)
    arguments = {
        "file": [str(script)],
        "argument": ["-c", text],
        "stdin": ["-"],
        "interactive": ["-i", "-q"],
        "imported": ["-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import script"],
    }[way]
    with python(*arguments) as program:
        out, errors = said(program, text if way in ("stdin", "interactive") else None)
    found = WORKER.findall(out)
    assert len(found) == 1, (out, errors)
    assert program.returncode == 0
    assert gone(found[0])
    if way != "interactive":  # it prompts on stderr
        assert errors == ""


def test_a_cluster_lives_in_a_notebook(llama: Path) -> None:
    """Under a loop that runs already, and where each cell is a task of its own."""
    cells = source(llama, "\nawait cluster.__aenter__()\nawait ask()\nawait cluster.__aexit__(None, None, None)\n")
    with python("-m", "asyncio") as program:
        out, errors = said(program, cells)
    found = WORKER.findall(out)
    assert len(found) == 1, (out, errors)
    assert gone(found[0])
    assert "Traceback" not in errors


WAITS = """
async def main():
    async with cluster:
        await ask()
        await asyncio.sleep(3600)

asyncio.run(main())
"""


def test_an_interrupt_ends_the_program_and_its_workers(llama: Path) -> None:
    with serving(llama, WAITS) as (program, _):
        os.killpg(program.pid, signal.SIGINT)
        _, errors = said(program)
    assert program.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "replica" not in errors, "the worker was asked to leave, and did not fail"


@pytest.mark.long
def test_an_interrupt_while_workers_start_ends_them(llama: Path) -> None:
    rest = """
async def main():
    async with asyncio.TaskGroup() as group:
        entering = group.create_task(cluster.__aenter__())
        while True:
            for post in (cluster._dispatcher.roster._posts.values() if hasattr(cluster, "_dispatcher") else ()):
                if post.life is not None and post.life.process_id:
                    print("worker", post.life.process_id, "tokens 3", flush=True)
                    await asyncio.sleep(3600)
            await asyncio.sleep(0.01)

asyncio.run(main())
"""
    with serving(llama, rest) as (program, _):
        os.killpg(program.pid, signal.SIGINT)
        _, errors = said(program)
    assert program.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_program_that_ends_without_leaving_the_cluster_leaves_nothing(llama: Path) -> None:
    rest = """
async def main():
    await cluster.__aenter__()
    await ask()
    asyncio.create_task(cluster.generate("x", max_tokens=200, ignore_eos=True))
    await asyncio.sleep(0)

asyncio.run(main())
"""
    with serving(llama, rest) as (program, _):
        out, errors = said(program)
    assert (out, program.returncode) == ("", 0)
    assert "Traceback" not in errors


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_error_that_leaves_the_block_ends_the_worker(llama: Path) -> None:
    cluster = preble.Cluster(llama, workers="process", kv_memory="1MiB", dtype="float32")
    stream: preble.Stream
    replica: preble.ReplicaHealth

    async def application() -> None:
        nonlocal stream, replica
        async with cluster:
            (replica,) = cluster.health().replicas
            stream = cluster.stream("x", max_tokens=200, ignore_eos=True)
            await anext(stream)
            raise ValueError("of the application")

    with pytest.raises(ValueError, match="of the application"):
        await application()
    assert gone(replica.process_id)
    with pytest.raises(preble.ClusterStateError, match="closed"):
        await stream.finish()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_processes_come_drain_and_go_under_load(llama: Path) -> None:
    """What `test_operations.py` shows with threads, once with processes."""
    options: dict[str, Any] = {"max_tokens": 150, "seed": 3, "ignore_eos": True}
    prompts = [f"Number {number}" for number in range(4)]
    asking: dict[str, Any] = {"replicas": 1, "page_size": 16, "kv_memory": "1MiB", "dtype": "float32"}
    async with preble.Cluster(llama, workers="thread", **asking) as cluster:
        expected = [output.token_ids for output in await cluster.generate_many(prompts, **options)]
    found: dict[int, tuple[int, ...]] = {}

    async def ask(number: int) -> None:
        found[number] = (await cluster.generate(prompts[number], **options)).token_ids

    async with preble.Cluster(llama, workers="process", **asking) as cluster:
        first = cluster.health().replicas[0].process_id
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(ask, number)
            while cluster.stats().pending < 4:  # noqa: ASYNC110 - no event is set when this becomes true
                await anyio.sleep(0.001)
            await cluster.pause()
            assert await cluster.add_replica() == 1
            await cluster.reset_prefix_cache()
            await cluster.remove_replica(0, timeout=0)
            assert gone(first)
            (left,) = cluster.health().replicas
            assert (left.replica, left.in_flight, left.process_id != first) == (1, 4, True)
            await cluster.resume()
        assert [found[number] for number in range(4)] == expected
        await cluster.shutdown()
    assert gone(left.process_id)
