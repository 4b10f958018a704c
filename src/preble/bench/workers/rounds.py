"""The same requests on a cluster of threads and on one of processes, by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import anyio
import numpy as np

from preble.bench.workers.loop_turns import LoopTurns
from preble.cluster import Cluster
from preble.sched.hashing import Tokens

Workers: TypeAlias = Literal["thread", "process"]
WORKERS: tuple[Workers, ...] = ("thread", "process")
REPLICAS = 2


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that begin together, each with a prompt that shares nothing with the others."""

    requests: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocabulary: int, seed: int) -> list[Tokens]:
        """int32 [prompt_tokens] each; the same for the same seed."""
        source = np.random.default_rng(seed)
        return [source.integers(16, vocabulary, self.prompt_tokens, dtype=np.int32) for _ in range(self.requests)]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one round was on one kind of workers, as the application sees it."""

    seconds: float
    """From the first request to the last token."""
    throughput: float
    """Generated tokens per second."""
    step: float
    """Seconds from one token of a request to its next one while all requests decode, median: a replica's step, and
    everything between two of them."""
    ttft: float
    """Seconds until a request's first token, median."""
    loop: float
    """Seconds of processor time that the event loop took for a token."""
    longest_turn: float
    """Of the event loop, in seconds of processor time."""


async def measure(
    model: Path | str, work: Work, rounds: int, vocabulary: int, turns: LoopTurns, advance: Callable[[], None]
) -> dict[Workers, list[Measured]]:
    """Both clusters stay open and answer the same prompts one after the other; who is first changes with each round.

    Args:
        model: a checkpoint folder.
        vocabulary: token ids of the prompts are below.
        turns: notes those of the event loop that this runs in.
        advance: called after each turn of a cluster.
    """
    found: dict[Workers, list[Measured]] = {workers: [] for workers in WORKERS}
    async with AsyncExitStack() as stack:
        clusters = {
            workers: await stack.enter_async_context(
                Cluster(model, replicas=REPLICAS, devices=["cpu"], workers=workers, kv_memory="128MiB")
            )
            for workers in WORKERS
        }
        for cluster in clusters.values():
            await _serve(cluster, work, work.prompts(vocabulary, seed=0), turns)  # warms up
        for number in range(1, rounds + 1):
            prompts = work.prompts(vocabulary, seed=number)
            for workers in WORKERS if number % 2 else reversed(WORKERS):
                found[workers].append(await _serve(clusters[workers], work, prompts, turns))
                advance()
    return found


async def _serve(cluster: Cluster, work: Work, prompts: list[Tokens], turns: LoopTurns) -> Measured:
    arrivals: list[list[float]] = [[] for _ in prompts]

    async def consume(prompt: Tokens, times: list[float]) -> None:
        async for chunk in cluster.stream(prompt, max_tokens=work.new_tokens, temperature=0.0, ignore_eos=True):
            times += [time.perf_counter()] * len(chunk.token_ids)

    turns.forget()
    began = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for prompt, times in zip(prompts, arrivals, strict=True):
            tasks.start_soon(consume, prompt, times)
    tokens = sum(map(len, arrivals))
    seconds = max(times[-1] for times in arrivals) - began
    return Measured(
        seconds=seconds,
        throughput=tokens / seconds,
        step=_step(arrivals),
        ttft=statistics.median(times[0] - began for times in arrivals),
        loop=turns.total / tokens,
        longest_turn=turns.longest,
    )


def _step(arrivals: list[list[float]]) -> float:
    """Median time between a request's tokens while everybody decodes."""
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    gaps = [
        later - earlier for times in arrivals for earlier, later in pairwise(times) if begin <= earlier and later <= end
    ]
    if not gaps:  # so few tokens that they never all decode
        gaps = [(times[-1] - times[0]) / max(len(times) - 1, 1) for times in arrivals]
    return statistics.median(gaps)
