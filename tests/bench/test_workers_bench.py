"""The benchmark of worker processes against threads: what it measures, what it compares, and that it runs whole."""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest

from preble.bench.workers.comparison import Comparison
from preble.bench.workers.loop_turns import LoopTurns
from preble.bench.workers.messages import message_costs
from preble.bench.workers.rounds import Measured, Work, _step
from preble.cli import main

MEASURED = Measured(seconds=2.0, throughput=100.0, step=0.010, ttft=0.5, loop=1e-4, longest_turn=2e-3)


def work_for(seconds: float) -> None:
    """Keep this thread at work for so much processor time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_turn_is_what_runs_between_two_waits(backend: str) -> None:
    turns = LoopTurns()

    async def run() -> float:
        for _ in range(3):
            await anyio.sleep(0.001)
        turns.forget()
        async with anyio.create_task_group() as tasks:
            for _ in range(3):  # of the same turn
                tasks.start_soon(one)
        await anyio.sleep(0.001)
        return turns.longest

    async def one() -> None:
        work_for(0.02)

    longest = turns.run(run, backend)
    assert 0.06 <= longest <= turns.total
    assert turns.count >= 2


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_waiting_and_other_threads_are_no_work_of_the_loop(backend: str) -> None:
    turns = LoopTurns()

    async def run() -> None:
        await anyio.sleep(0.001)
        turns.forget()
        await anyio.to_thread.run_sync(work_for, 0.1)
        await anyio.sleep(0.001)

    turns.run(run, backend)
    assert turns.total < 0.1


def test_garbage_collections_are_counted_apart() -> None:
    turns, rings = LoopTurns(), [[]]

    async def run() -> None:
        for _ in range(300_000):
            rings.append([rings[-1]])
        await anyio.sleep(0.001)
        turns.forget()
        before = time.thread_time()
        gc.collect()
        took = time.thread_time() - before
        await anyio.sleep(0.001)
        assert 0.8 * took <= turns.collecting <= took
        assert turns.longest < 0.5 * took

    turns.run(run)
    assert all(callback.__qualname__ != "LoopTurns._noting_collections.<locals>.note" for callback in gc.callbacks)


def test_prompts_are_repeatable_and_share_nothing() -> None:
    work = Work(requests=4, prompt_tokens=50, new_tokens=2)
    prompts = work.prompts(1000, seed=1)
    again = work.prompts(1000, seed=1)
    assert all(np.array_equal(one, other) for one, other in zip(prompts, again, strict=True))
    firsts = {tuple(prompt[:4].tolist()) for seed in (1, 2) for prompt in work.prompts(1000, seed)}
    assert len(firsts) == 8
    assert all(len(prompt) == 50 and prompt.min() >= 16 and prompt.max() < 1000 for prompt in prompts)


def test_a_step_is_measured_while_everybody_decodes() -> None:
    # The second begins at 10, when the first one's slow steps are over, and outlives it.
    first = [0.0, 4.0, 8.0, *(10.0 + number for number in range(6))]
    second = [10.0 + number for number in range(6)] + [30.0, 50.0]
    assert _step([first, second]) == pytest.approx(1.0)
    assert _step([[0.0, 1.0], [5.0, 7.0]]) == pytest.approx(1.5)  # they never meet


def test_each_round_is_compared_within_itself() -> None:
    # The machine is twice as slow in the second round and half as slow again in the third.
    slower = [replace(MEASURED, throughput=100.0 / by, step=0.010 * by, ttft=0.5 * by) for by in (1, 2, 3)]
    processes = [
        replace(one, throughput=one.throughput * 0.9, step=one.step + 5e-4, ttft=one.ttft * 2) for one in slower
    ]
    comparison = Comparison("2m", {"thread": slower, "process": processes}, {})
    assert comparison.throughput == pytest.approx(0.9)
    assert comparison.step == pytest.approx(5e-4)
    assert comparison.ttft == pytest.approx(2.0)
    assert [met for *_, met in comparison.verdicts] == [False, True, True]
    late = replace(MEASURED, longest_turn=0.011)
    assert [met for *_, met in Comparison("2m", {"thread": [late], "process": [MEASURED]}, {}).verdicts] == [
        True,
        True,
        False,
    ]


def test_messages_cost_something() -> None:
    few, many = message_costs(1, 10), message_costs(400, 100_000)
    assert set(few) == {"write report", "read report", "write submit", "read submit"}
    assert all(0 < seconds < 1 for seconds in (*few.values(), *many.values()))
    assert many["read report"] > few["read report"]


def test_the_command_runs_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "workers.json"
    arguments = "--model 2m --rounds 2 --requests 4 --prompt-tokens 16 --new-tokens 6"
    assert main(["bench", "workers", *arguments.split(), "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for text in ("thread", "process", "tokens/s", "longest turn", "read report", "load average"):
        assert text in shown
    document = json.loads(file.read_text())
    assert document["settings"] == {"requests": 4, "prompt_tokens": 16, "new_tokens": 6, "replicas": 2, "rounds": 2}
    for workers in ("thread", "process"):
        assert len(document["rounds"][workers]) == 2
        for measured in document["rounds"][workers]:
            assert all(math.isfinite(value) and value > 0 for value in measured.values())
            assert measured["throughput"] == pytest.approx(4 * 6 / measured["seconds"])
            assert measured["ttft"] <= measured["seconds"]
    assert [goal["goal"] for goal in document["goals"]] == [0.95, 1e-3, 10e-3]


@pytest.mark.parametrize("arguments", ["--rounds 0", "--requests 0", "--prompt-tokens 0", "--new-tokens 1"])
def test_arguments_out_of_range(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "workers", *arguments.split()]) == 1
    assert "must be at least 1, --new-tokens at least 2" in capsys.readouterr().err
