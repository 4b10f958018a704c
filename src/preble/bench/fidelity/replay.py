"""The same requests simulated, with a cost model fitted to the recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preble.bench.fidelity.recording import Array, Recording
from preble.sched.cost import CostModel
from preble.sched.cost_fit import FittedCost
from preble.sched.cost_presets import GENERIC
from preble.sched.events import StepTimed
from preble.sim.outcome import Outcome, outcome_of
from preble.sim.settings import Settings
from preble.sim.simulation import Simulation
from preble.sim.slo import SLO

PASSES = 3
"""How often the model sees every step. It remembers some dozens of each kind: they come in random order."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What steps of one kind take in the mean: `constant` + `factor` x what the fitted model expects."""

    constant: float
    """Seconds."""
    factor: float
    ratios: Array
    """Of the recorded steps: real seconds over this; their mean is 1."""

    @classmethod
    def of(cls, seconds: Array, expected: Array) -> Calibration:
        """The line with the least squared errors, those of long steps counting less; neither number is below 0."""
        if not len(seconds):
            return cls(0.0, 1.0, np.ones(1))
        columns = np.column_stack((np.ones(len(expected)), expected))
        scale = 1 / np.sqrt(expected)
        constant, factor = np.linalg.lstsq(columns * scale[:, None], seconds * scale, rcond=None)[0].tolist()
        if constant < 0 or factor < 0:
            constant, factor = 0.0, float(seconds.sum() / expected.sum())
        ratios = seconds / (constant + factor * expected)
        return cls(constant, factor, ratios / ratios.mean())

    def seconds(self, expected: float) -> float:
        """The mean seconds of a step."""
        return self.constant + self.factor * expected


@dataclass(frozen=True, slots=True, eq=False)
class StepTimes:
    """What steps took in a recording."""

    fitted: FittedCost
    prefill: Calibration
    """Of the steps with prefill chunks."""
    decode: Calibration
    """… and of those without."""

    @classmethod
    def of(cls, timed: Sequence[StepTimed], seed: int = 0) -> StepTimes:
        """Fitted to these steps."""
        fitted = FittedCost(GENERIC)
        generator = np.random.default_rng(seed)
        for _ in range(PASSES):
            for number in generator.permutation(len(timed)).tolist():
                fitted.observe(timed[number])
        expected = np.array([fitted.expected_seconds(step) for step in timed])
        seconds = np.array([step.seconds for step in timed])
        decode = np.array([step.new_tokens == step.decodes for step in timed])
        kinds = [Calibration.of(seconds[kind], expected[kind]) for kind in (~decode, decode)]
        return cls(fitted, *kinds)


class MeanCost(CostModel):
    """The fitted model, calibrated so that the recorded steps take as long in the mean as they did.

    The fit by itself takes little notice of steps that were far off, as a scheduler's should. Where threads wait for
    each other, and other work takes the cores away now and then, those are many, and they count.
    """

    name = "fitted"

    def __init__(self, times: StepTimes) -> None:
        self._model = times.fitted.model
        self._times = times

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        if not prefills and not decodes:
            return 0.0
        kind = self._times.prefill if prefills else self._times.decode
        return kind.seconds(self._model.step_seconds(prefills, decodes, decode_context))


class VaryingCost(MeanCost):
    """The same times what a recorded step of the same kind, drawn at random, was off by.

    It is a machine, not a model to decide with: the same step takes another time whenever it is asked, and it is asked
    once per step.
    """

    name = "fitted, varying"

    def __init__(self, times: StepTimes, seed: int) -> None:
        super().__init__(times)
        self._generator = np.random.default_rng(seed)

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        ratios = (self._times.prefill if prefills else self._times.decode).ratios
        ratio = float(ratios[self._generator.integers(len(ratios))])
        return ratio * super().step_seconds(prefills, decodes, decode_context)


def replay(recording: Recording, cost: CostModel) -> Outcome:
    """Simulate the recorded requests on the recorded fleet, whose steps take what `cost` says.

    The schedulers begin with the belief that a cluster's begin with, and learn. As in the recording they are told how
    many tokens a request generates, and hear of every step.
    """
    fleet = recording.fleet
    settings = Settings(
        replicas=fleet.replicas,
        cost=cost,
        believed_cost=GENERIC,
        capacity_tokens=recording.capacity_tokens,
        page_size=fleet.page_size,
        max_batched_tokens=fleet.max_batched_tokens,
        order=fleet.order,
        max_tokens=1,
        leap_seconds=0.0,
        seed=fleet.seed,
    )
    simulation = Simulation(recording.trace, settings, fleet.policy)
    simulation.run()
    return outcome_of(simulation, SLO())
