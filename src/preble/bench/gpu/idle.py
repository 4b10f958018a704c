"""How long a device waits between the steps of an engine, by events around each step in the queue of its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from preble.engine.config import ModelConfig
from preble.engine.device.queue import Queue
from preble.engine.device.runner import DeviceRunner
from preble.engine.device.step import DeviceStep
from preble.engine.sampler import SamplingState
from preble.sched.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class Idle:
    """Where the time from the first step's begin to the last one's end went."""

    share: float
    """The part of it between the end of a step and the begin of the next."""
    longest: float
    """Seconds of the longest such gap."""
    steps: int


@dataclass(slots=True)
class WatchedRunner:
    """A runner that marks on the device when each step begins and ends.

    The device takes the marks in turn with the work. While it has steps queued, one's end and the next one's begin
    are passed at once; otherwise it waits between them for the host.
    """

    runner: DeviceRunner
    queue: Queue
    """The runner's own."""
    ahead: int
    marks: list[tuple[Any, Any]] = field(default_factory=list)
    """CUDA events."""

    config: ModelConfig = field(init=False)
    device: torch.device = field(init=False)
    pages: int = field(init=False)
    page_size: int = field(init=False)
    attention: str = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.runner.config
        self.device = self.runner.device
        self.pages = self.runner.pages
        self.page_size = self.runner.page_size
        self.attention = self.runner.attention

    def lockstep(self, state: SamplingState) -> bool:
        """As the runner has it."""
        return self.runner.lockstep(state)

    def launch(self, plan: StepPlan) -> DeviceStep:
        """Queue a step between two marks."""
        if self.device.type != "cuda":
            return self.runner.launch(plan)
        with self.queue.use():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            step = self.runner.launch(plan)
            end.record()
        self.marks.append((begin, end))
        return step

    def idle(self, steps: int) -> Idle | None:
        """Of the last `steps`, all of which are done; None off CUDA."""
        marks = self.marks[-steps:]
        if not marks:
            return None
        first = marks[0][0]
        return idle_of([(first.elapsed_time(begin) / 1e3, first.elapsed_time(end) / 1e3) for begin, end in marks])


def idle_of(steps: Sequence[tuple[float, float]]) -> Idle:
    """From the begin and end of each of at least two steps, in seconds, in order."""
    gaps = [begin - end for (_, end), (begin, _) in pairwise(steps)]
    return Idle(sum(gaps) / (steps[-1][1] - steps[0][0]), max(gaps), len(steps))
