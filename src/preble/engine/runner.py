"""What carries out the steps that the scheduler plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from preble.engine.sampler import SampleResult, SamplingState
from preble.sched.step_plan import StepPlan

if TYPE_CHECKING:
    import torch

    from preble.engine.config import ModelConfig


class Launched(Protocol):
    """A step that is being computed, or was."""

    def result(self) -> SampleResult:
        """Wait for it: one entry per chunk of the plan that samples, in order."""
        ...


class Runner(Protocol):
    """A model and its KV pages on a device. Computes steps in the order of their launches."""

    config: ModelConfig
    device: torch.device
    pages: int
    page_size: int
    attention: str
    """Name of the attention backend, for `stats`."""
    ahead: int
    """How many steps to launch before the result of the oldest one is asked for."""

    def lockstep(self, state: SamplingState) -> bool:
        """Whether a request's next step must not be launched before its last token is known."""
        ...

    def launch(self, plan: StepPlan) -> Launched:
        """Begin to compute a step. The plan's sequences are as `LocalScheduler.plan` left them, `computed` included."""
        ...
