"""What Preble is for: replicas that share a GPU, E2 beside round robin, on the same prompts at the same times."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray

import preble
from preble.bench.gpu.place import Place
from preble.bench.gpu.predictions import cluster_key
from preble.bench.gpu.random_model import LLAMA_1B, TOY, make_checkpoint
from preble.bench.gpu.record import Record
from preble.bench.gpu.traffic import LONG_DOCUMENTS, TOOL_USE, TOY_TRAFFIC, Request, Workload, arrivals
from preble.outputs import GenerationOutput
from preble.sampling import SamplingParams

REPLICAS = 4
KV_MEMORY = "3GiB"
"""Of each replica: 98,000 tokens, a third of either workload's texts."""
LONGEST = 16_384
POLICIES = ("round-robin", "e2")
"""The first one's capacity sets the rate of arrivals for both."""
AT_ONCE = {TOOL_USE.name: 240, LONG_DOCUMENTS.name: 60}
"""Requests that are handed over together, which warms the caches and shows the capacity."""
POISSON_SECONDS = 10.0
LOAD = 0.9
"""Requests arrive at this part of round robin's capacity."""
MOST_REQUESTS = 1500


@dataclass(frozen=True, slots=True)
class Outcome:
    """Requests under one policy."""

    requests: int
    seconds: float
    """From the first arrival to the last result."""
    prompt_tokens: int
    cached_tokens: int
    latencies: list[float]
    """From arrival to result, in seconds."""
    per_replica: dict[int, int]

    @property
    def computed(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in seconds."""
        return {
            "requests": self.requests,
            "seconds": self.seconds,
            "requests_per_second": self.per_second,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_computed": self.computed,
            "hit_rate": self.cached_tokens / self.prompt_tokens,
            "mean_latency": float(np.mean(self.latencies)),
            "p99_latency": float(np.percentile(self.latencies, 99)),
            "requests_per_replica": self.per_replica,
        }


def run_cluster(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Both workloads under both policies, in wall time."""
    shape = TOY if place.toy else LLAMA_1B
    workloads = (TOY_TRAFFIC,) if place.toy else (TOOL_USE, LONG_DOCUMENTS)
    rates: dict[str, float] = {}
    outcomes: dict[tuple[str, str, str], Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="preble-bench-") as folder:
        model = make_checkpoint(shape, Path(folder), 1024 if place.toy else LONGEST)
        record.say(f"checkpoint written: {shape.parameters / 1e9:.2f} billion weights")
        for policy in POLICIES:
            anyio.run(partial(_run_policy, place, record, model, policy, workloads, rates, outcomes))
    for workload in workloads:
        _compare(record, workload.name, outcomes)


async def _run_policy(
    place: Place,
    record: Record,
    model: Path,
    policy: str,
    workloads: Sequence[Workload],
    rates: dict[str, float],
    outcomes: dict[tuple[str, str, str], Outcome],
) -> None:
    """One cluster; the workloads one after the other. They have no prefix in common."""
    began = time.perf_counter()
    cluster = preble.Cluster(
        model,
        devices=["cpu"] if place.toy else ["cuda:0"],
        replicas=2 if place.toy else REPLICAS,
        policy=policy,
        workers="thread",  # they share the weights and the GPU
        dtype="float32" if place.toy else "bfloat16",
        kv_memory="8MiB" if place.toy else KV_MEMORY,
        max_batched_tokens=256 if place.toy else 2048,
        max_running=64,
    )
    vocabulary = (TOY if place.toy else LLAMA_1B).vocabulary
    async with cluster:
        record.say(f"{policy}: the cluster is up after {time.perf_counter() - began:.1f} s")
        for workload in workloads:
            count = 4 if place.toy else AT_ONCE[workload.name]
            now = workload.requests(count, vocabulary=vocabulary, seed=1)
            outcome = await _serve(cluster, now, np.zeros(count))
            _keep(record, outcomes, workload.name, policy, "all at once", outcome)
            rate = rates.setdefault(workload.name, LOAD * outcome.per_second)
            seconds = 0.2 if place.toy else POISSON_SECONDS / 2 if place.quick else POISSON_SECONDS
            count = max(4 if place.toy else 32, min(MOST_REQUESTS, round(rate * seconds)))
            later = workload.requests(count, vocabulary=vocabulary, seed=2)
            outcome = await _serve(cluster, later, arrivals(count, rate, seed=3))
            _keep(record, outcomes, workload.name, policy, "Poisson", outcome)
        record.note(f"replicas, {policy}", [str(replica) for replica in cluster.stats().replicas])


async def _serve(cluster: preble.Cluster, requests: Sequence[Request], times: NDArray[np.float64]) -> Outcome:
    """Hand over each request at its time, in seconds from now, and wait for all."""
    outputs: list[GenerationOutput] = []
    latencies: list[float] = []
    began = time.perf_counter()

    async def ask(request: Request, arrival: float) -> None:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.new_tokens)
        outputs.append(await cluster.generate(request.prompt.tolist(), sampling=sampling))
        latencies.append(time.perf_counter() - began - arrival)

    async with anyio.create_task_group() as tasks:
        for request, arrival in zip(requests, times, strict=True):
            await anyio.sleep(max(0.0, began + arrival - time.perf_counter()))
            tasks.start_soon(ask, request, float(arrival))
    placed = [output.placement.replica for output in outputs]
    return Outcome(
        requests=len(outputs),
        seconds=time.perf_counter() - began,
        prompt_tokens=sum(output.usage.prompt_tokens for output in outputs),
        cached_tokens=sum(output.usage.cached_tokens for output in outputs),
        latencies=latencies,
        per_replica={replica: placed.count(replica) for replica in sorted(set(placed))},
    )


def _keep(
    record: Record,
    outcomes: dict[tuple[str, str, str], Outcome],
    workload: str,
    policy: str,
    how: str,
    outcome: Outcome,
) -> None:
    outcomes[workload, policy, how] = outcome
    facts = outcome.as_json()
    record.note(f"{workload}, {policy}, {how}", facts)
    record.say(
        f"{workload}, {policy}, {how}: {outcome.requests} requests, {facts['requests_per_second']:.1f}/s, "
        f"{facts['prompt_tokens_computed']:,} of {facts['prompt_tokens']:,} prompt tokens computed, latency "
        f"{facts['mean_latency'] * 1e3:.0f} ms, p99 {facts['p99_latency'] * 1e3:.0f} ms"
    )


def _compare(record: Record, workload: str, outcomes: dict[tuple[str, str, str], Outcome]) -> None:
    """E2's figures as multiples of round robin's."""

    def pair(how: str, of: str) -> tuple[float, float]:
        theirs, ours = (float(outcomes[workload, policy, how].as_json()[of]) for policy in POLICIES)
        return ours, theirs

    for measure, how, of in (
        ("prompt tokens computed", "Poisson", "prompt_tokens_computed"),
        ("requests/s, all at once", "all at once", "requests_per_second"),
        ("mean latency", "Poisson", "mean_latency"),
        ("p99 latency", "Poisson", "p99_latency"),
    ):
        ours, theirs = pair(how, of)
        record.figure(cluster_key(workload, measure), ours / theirs, "x", e2=ours, round_robin=theirs)
