"""Where a part of the benchmark runs, and how it keeps time there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from preble.kernels.operations import REFERENCE, TRITON, Operations

MEASURED_SECONDS = 0.25
"""How long one figure is measured, as far as the bounds below allow."""
FEWEST, MOST = 5, 50
"""Repetitions."""


@dataclass(frozen=True, slots=True)
class Place:
    """A GPU; or, for trying out the benchmark itself, the CPU at toy sizes."""

    device: torch.device
    dtype: torch.dtype
    """In which speed is measured."""
    operations: Operations
    """Whose speed is measured: Triton's kernels, or at toy sizes their references."""
    toy: bool
    quick: bool
    """Fewer cases and repetitions."""

    @classmethod
    def make(cls, *, dry_run: bool, quick: bool) -> Place:
        """The first GPU, unless it is a dry run."""
        if dry_run:
            torch.set_num_threads(1)
            return cls(torch.device("cpu"), torch.float32, REFERENCE, toy=True, quick=True)
        torch.set_num_threads(4)  # several processes share the cores, and what they compute on the CPU is small
        return cls(torch.device("cuda:0"), torch.bfloat16, TRITON, toy=False, quick=quick)

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.toy:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        """Memory of the device that nobody uses."""
        if self.toy:
            return 1 << 28
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers on the device."""
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True, slots=True)
class Times:
    """Repetitions of the same work, in seconds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)


def time_work(place: Place, work: Callable[[], object], *, parts: int = 1, graph: bool = True) -> Times:
    """How long one of `parts` equal parts of `work` takes on the device, between CUDA events.

    With `graph` it is replayed as a CUDA graph, so that launches from Python are not what is measured.
    """
    if place.toy:
        began = time.perf_counter()
        work()
        return Times([(time.perf_counter() - began) / parts])
    run = captured(work) if graph else work
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = max(FEWEST, min(MOST, int(MEASURED_SECONDS / (time.perf_counter() - began))))
    if place.quick:
        repeats = FEWEST
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]  # type: ignore[no-untyped-call]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return Times([start.elapsed_time(end) / 1e3 / parts for start, end in events])


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as a CUDA graph; call the result to replay it on the current stream."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # what is compiled or allocated once must not be in the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
