"""Grids by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preble.bench.sim.setting import Setting
from preble.bench.sim.source import GPUS, Source
from preble.sched.policies import POLICIES
from preble.sim.workloads import WORKLOADS

PAPER_WORKLOADS = ("tool-use", "embodied", "programming", "video-qa", "long-document")
PAPER_FLEETS = ("mistral-7b-a6000", "llama-3-70b-2xh100")
PAPER_REPLICAS = 4
PAPER_LOADS = (0.5, 0.75, 1.0, 1.25, 1.5)
PAPER_E2 = "e2-paper" if "e2-paper" in POLICIES else "e2"
RIVALS = ("round-robin", "least-loaded", "prefix-affinity", "sglang", "dynamo", "lmetric", "llm-d", "ray")


@dataclass(frozen=True, slots=True)
class Grid:
    """What is run where nothing else is said."""

    workloads: Sequence[str]
    """For runs without trace files."""
    replicas: Sequence[int]
    loads: Sequence[float]
    costs: Sequence[str]
    policies: Sequence[str]
    reference: str
    requests: int | None


GRIDS = {
    "quick": Grid(
        ("tool-use", "programming"), (4,), (0.8, 1.1), ("mistral-7b-a6000",), (*RIVALS, "e2"), "e2", requests=300
    ),
    "full": Grid(
        PAPER_WORKLOADS,
        (2, 4, 8, 32),
        (0.3, 0.5, 0.8, 1.0, 1.2, 1.3),
        ("mistral-7b-a6000", "mistral-7b-a100", "llama-3-70b-2xa100", "llama-3-70b-2xh100"),
        (*POLICIES,),
        "e2",
        requests=1000,
    ),
}
"""`quick` takes minutes. `full` is every policy on every cost model of the paper, from light to more than saturation,
on 2 to 32 replicas: hours."""


def paper_policies() -> list[str]:
    """Round robin with a prefix cache on each replica, and what the paper adds to it, in the order of its ablation."""
    parts = ("rebalancing", "autoscaling", "prefill_decode_balance")
    off = [f":{part}=off" for part in parts]
    return [
        "round-robin@fcfs",
        f"{PAPER_E2}{off[0]}{off[1]}{off[2]}@fcfs",
        f"{PAPER_E2}{off[2]}@fcfs",
        f"{PAPER_E2}@fcfs",
        f"{PAPER_E2}@preble",
    ]


def paper_settings(requests: int | None, seeds: int) -> list[Setting]:
    """The paper's five workloads on both of its fleets. A load of 1 is the rate that its authors' code has for a
    workload and so many GPUs, or pairs of them for the larger model."""
    share = PAPER_REPLICAS / GPUS
    return [
        Setting(Source(name, None, requests), PAPER_REPLICAS, cost, load, WORKLOADS[name].rate * share, seed=seed)
        for cost in PAPER_FLEETS
        for name in PAPER_WORKLOADS
        for load in PAPER_LOADS
        for seed in range(seeds)
    ]
