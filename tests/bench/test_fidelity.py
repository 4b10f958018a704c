"""The benchmark of the simulator's fidelity: what it records, what it fits, and that it runs whole."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest

from preble.bench.fidelity.comparison import FIGURES, compare, recorded_figures
from preble.bench.fidelity.recording import Fleet, Recording, Step, cycles, record
from preble.bench.fidelity.replay import Calibration, MeanCost, StepTimes, VaryingCost, replay
from preble.bench.fidelity.requests import make_requests, prompt_ids
from preble.cli import main
from preble.sched import GlobalScheduler, Placement, StepTimed, Waiting
from preble.sched.cost import CostModel, PiecewiseCost
from preble.sched.cost_presets import GENERIC
from preble.sched.events import Event
from preble.sched.hashing import Tokens
from preble.sim.outcome import outcome_of
from preble.sim.settings import Settings
from preble.sim.simulation import Simulation
from preble.sim.slo import SLO

CPU = PiecewiseCost("cpu", (0, 64, 512), (2e-3, 15e-3, 90e-3), per_decode=1.5e-3, prefill=5e-3)
"""What steps of a machine might take."""


class Listening:
    """A global scheduler that notes the steps it hears of."""

    def __init__(self, fleet: Fleet, capacity: int) -> None:
        self.simulation: Simulation | None = None
        self.steps: list[Step] = []
        self._scheduler = GlobalScheduler(
            fleet.replicas,
            capacity_tokens=capacity,
            page_size=fleet.page_size,
            max_batched_tokens=fleet.max_batched_tokens,
            cost=GENERIC,
        )

    @property
    def policy_name(self) -> str:
        return self._scheduler.policy_name

    def submit(
        self, request_id: str, token_ids: Tokens, *, now: float, max_tokens: int, session: str | None
    ) -> Placement | Waiting:
        return self._scheduler.submit(request_id, token_ids, now=now, max_tokens=max_tokens, session=session)

    def apply(self, event: Event, *, now: float) -> list[Placement]:
        if isinstance(event, StepTimed):
            assert self.simulation is not None
            local = self.simulation.replicas[event.replica].local
            self.steps.append(Step(now, now, bool(local.running or local.waiting), event))
        return self._scheduler.apply(event, now=now)


def made_recording(cost: CostModel, *, requests: int = 300, rate: float = 4.0, capacity: int = 20_000) -> Recording:
    """As if a machine whose steps take what `cost` says had been recorded."""
    fleet, trace = Fleet(), make_requests(requests, rate, 0)
    router = Listening(fleet, capacity)
    settings = Settings(
        replicas=fleet.replicas,
        cost=cost,
        believed_cost=GENERIC,
        capacity_tokens=capacity,
        page_size=fleet.page_size,
        max_batched_tokens=fleet.max_batched_tokens,
        max_tokens=1,
        leap_seconds=0.0,
    )
    router.simulation = Simulation(trace, settings, router)
    router.simulation.run()
    outcome = outcome_of(router.simulation, SLO())
    return Recording(
        fleet=fleet,
        trace=trace,
        capacity_tokens=capacity,
        steps=tuple(router.steps),
        ttft=outcome.ttft,
        e2e=outcome.e2e,
        queued=outcome.queueing,
        cached_tokens=outcome.cached_tokens,
        replica=outcome.replica,
        seconds=outcome.makespan,
    )


def test_requests_share_prefixes_and_nothing_else() -> None:
    trace = make_requests(200, 5.0, 3)
    assert len(trace.requests) == 200
    assert trace.rate == pytest.approx(5.0, rel=0.2)
    assert 0.5 < trace.known_tokens.sum() / sum(one.prompt_tokens for one in trace.requests) < 0.9
    for one, again, other in zip(
        trace.requests, make_requests(200, 5.0, 3).requests, make_requests(200, 5.0, 4).requests, strict=True
    ):
        assert (one.arrival, one.prompt_tokens) == (again.arrival, again.prompt_tokens)
        assert np.array_equal(one.blocks, again.blocks)
        assert one.arrival == 0 or one.arrival != other.arrival


def test_prompts_share_as_many_tokens_as_blocks() -> None:
    trace = make_requests(40, 1.0, 0)
    prompts = [prompt_ids(trace, one, 1024) for one in trace.requests]
    assert all(prompt.dtype == np.int32 and 16 <= prompt.min() <= prompt.max() < 1024 for prompt in prompts)
    for one, prompt in zip(trace.requests, prompts, strict=True):
        assert len(prompt) == one.prompt_tokens
        named = trace.tokens(one)
        for other, its in zip(trace.requests, prompts, strict=True):
            length = min(len(prompt), len(its))
            same = np.argmin(np.append(named[:length] == trace.tokens(other)[:length], False))
            assert np.array_equal(prompt[:same], its[:same])
            # Random tokens may agree by chance, one or two of them.
            assert np.argmin(np.append(prompt[:length] == its[:length], False)) <= same + 2


def step(replica: int, ended: float, seconds: float, *, more: bool, taken_in: float | None = None) -> Step:
    return Step(ended, ended if taken_in is None else taken_in, more, StepTimed(replica, 1, 1, 10, seconds, 10))


def test_what_a_replica_does_between_steps_belongs_to_them() -> None:
    steps = [
        step(0, 1.0, 0.5, more=True),
        step(1, 1.2, 0.1, more=False),
        step(0, 1.7, 0.5, more=False),
        step(1, 1.9, 0.1, more=True),
        step(0, 2.9, 0.5, more=True),
        step(0, 3.1, 0.5, more=True),  # never shorter than it says itself
    ]
    assert [one.seconds for one in cycles(steps)] == pytest.approx([0.5, 0.1, 0.7, 0.1, 0.5, 0.5])
    assert [one.replica for one in cycles(steps)] == [0, 1, 0, 1, 0, 0]


def test_latency_outside_steps_is_that_of_waking_up_and_of_reports() -> None:
    made = made_recording(CPU, requests=4, rate=1.0)
    arrivals = (0.0, 1.0, 1.2, 5.0)
    recording = replace(
        made,
        trace=replace(
            made.trace,
            requests=tuple(replace(one, arrival=at) for one, at in zip(made.trace.requests, arrivals, strict=True)),
        ),
        replica=np.array([0, 0, 0, 1]),
        queued=np.array([0.1, 0.2, 0.4, 0.8]),
        steps=(
            step(0, 0.6, 0.5, more=False, taken_in=0.61),
            step(0, 1.5, 0.3, more=True, taken_in=1.53),
            step(0, 1.9, 0.3, more=False, taken_in=1.92),
        ),
    )
    # The third came during a step, or between two: it waited for a step, not for a thread.
    assert recording.latency == pytest.approx((0.1 + 0.2 + 0.8) / 4 + 0.02)
    late = tuple(replace(one, arrival=1.55) if one.arrival == 1.2 else one for one in recording.trace.requests)
    between = replace(recording, trace=replace(recording.trace, requests=late))
    assert between.latency == recording.latency


def test_a_calibration_finds_the_constant_and_the_factor() -> None:
    generator = np.random.default_rng(0)
    expected = generator.uniform(1e-3, 50e-3, 5_000)
    noise = generator.gamma(20.0, 0.05, 5_000)
    found = Calibration.of((2e-3 + 1.5 * expected) * noise, expected)
    assert found.constant == pytest.approx(2e-3, rel=0.2)
    assert found.factor == pytest.approx(1.5, rel=0.05)
    assert found.ratios.mean() == pytest.approx(1.0)
    assert found.ratios.std() == pytest.approx(noise.std(), rel=0.05)
    assert found.seconds(10e-3) == pytest.approx(17e-3, rel=0.05)


def test_a_calibration_is_never_negative() -> None:
    expected = np.array([1e-3, 2e-3, 10e-3])
    steep = Calibration.of(expected * [1.0, 2.0, 3.0], expected)
    assert steep.constant == 0.0
    assert steep.factor == pytest.approx(35 / 13)
    falling = Calibration.of(1 / expected, expected)
    assert falling.constant == 0.0
    assert falling.factor > 0
    nothing = Calibration.of(np.empty(0), np.empty(0))
    assert nothing.seconds(3.0) == 3.0
    assert nothing.ratios.tolist() == [1.0]


def noisy(cost: CostModel, steps: Sequence[tuple[int, int]], seed: int = 0) -> list[StepTimed]:
    """(prefill tokens, decodes) as a machine would time them, with noise of mean 1."""
    generator = np.random.default_rng(seed)
    timed = []
    for new, decodes in steps:
        context = new + 500 * decodes
        seconds = cost.step_seconds(((new, new),) if new else (), decodes, 500 * decodes) * generator.gamma(
            1.5, 1 / 1.5
        )
        timed.append(StepTimed(0, new + decodes, decodes, context, seconds, new * new + 500 * decodes))
    return timed


def test_recorded_steps_take_as_long_in_sum_as_they_did() -> None:
    """The fit by itself underrates them, as it takes little notice of those far off."""
    generator = np.random.default_rng(1)
    shapes = [(0, int(generator.integers(1, 12))) for _ in range(1_500)]
    shapes += [(int(generator.integers(32, 400)), int(generator.integers(0, 8))) for _ in range(500)]
    timed = noisy(CPU, shapes)
    times = StepTimes.of(timed)
    real = sum(one.seconds for one in timed)
    fitted = sum(times.fitted.expected_seconds(one) or 0.0 for one in timed)
    assert fitted < 0.9 * real
    sums = []
    for cost in (MeanCost(times), VaryingCost(times, 0)):
        total = sum(cost.step_seconds(((new, new),) if new else (), decodes, 500 * decodes) for new, decodes in shapes)
        sums.append(total)
        assert cost.step_seconds((), 0, 0) == 0.0
    assert sums == pytest.approx([real, real], rel=0.05)


def test_a_varying_machine_varies_as_recorded() -> None:
    timed = noisy(CPU, [(0, 4)] * 1_000)
    times = StepTimes.of(timed)
    cost = VaryingCost(times, 0)
    drawn = np.array([cost.decode_seconds(4, 2_000) for _ in range(4_000)])
    real = np.array([one.seconds for one in timed])
    for share in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(drawn, share) == pytest.approx(np.quantile(real, share), rel=0.15)
    again = VaryingCost(times, 0)
    assert [again.decode_seconds(4, 2_000) for _ in range(5)] == drawn[:5].tolist()


def test_a_machine_like_the_model_is_foretold() -> None:
    """Where steps take what a model says, without noise, what is simulated is what was recorded."""
    recording = made_recording(CPU, requests=120, rate=5.0)
    assert 0.3 < recording.utilization < 0.9
    mean, varying, held_out = compare(recording)
    assert mean.requests == varying.requests == 120
    assert 30 < held_out.requests < 90
    for one in (mean, varying):
        assert list(one.errors) == list(FIGURES)
        assert one.worst < 0.05
        assert one.hit_rate == pytest.approx(recording.hit_rate, abs=0.02)
    # Half of so few steps says little of the longest ones.
    assert abs(held_out.errors["ttft mean"]) < 0.1
    assert abs(held_out.errors["latency mean"]) < 0.1
    assert max(mean.spread.values()) == 0


def test_the_replay_has_the_recorded_capacity_and_policy() -> None:
    recording = made_recording(CPU, requests=60)
    times = StepTimes.of(cycles(recording.steps))
    outcome = replay(recording, MeanCost(times))
    assert outcome.completed == 60
    assert outcome.policy == "e2"
    little = replay(replace(recording, capacity_tokens=3_000), MeanCost(times))
    assert little.evicted_tokens > outcome.evicted_tokens
    assert little.hit_rate < outcome.hit_rate
    other = replay(replace(recording, fleet=replace(recording.fleet, policy="round-robin")), MeanCost(times))
    assert other.policy == "round-robin"


def test_errors_are_relative_to_what_was_recorded() -> None:
    recording = made_recording(CPU, requests=60)
    halved = replace(recording, ttft=recording.ttft / 2, e2e=recording.e2e * 2)
    mean = compare(halved)[0]
    assert mean.errors["ttft mean"] == pytest.approx(1.0, abs=0.1)
    assert mean.errors["latency mean"] == pytest.approx(-0.5, abs=0.05)
    assert mean.worst == max(abs(error) for error in mean.errors.values())
    assert mean.as_json()["met"] is False
    figures = recorded_figures(recording)
    assert figures["ttft mean"] == pytest.approx(recording.ttft.mean())
    assert figures["latency p99"] == recording.e2e.max()


def test_reports_that_come_late_count_as_latency() -> None:
    recording = made_recording(CPU, requests=60)
    late = replace(
        recording,
        ttft=recording.ttft + 0.05,
        e2e=recording.e2e + 0.05,
        steps=tuple(replace(one, taken_in=one.ended + 0.05) for one in recording.steps),
    )
    assert late.latency == pytest.approx(recording.latency + 0.05)
    on_time, afterwards = compare(recording)[0], compare(late)[0]
    for figure in FIGURES:
        assert afterwards.figures[figure] == pytest.approx(on_time.figures[figure] + 0.05)


def test_a_real_run_is_recorded_whole() -> None:
    trace = make_requests(12, 6.0, 0)
    ended: list[int] = []
    recording = anyio.run(lambda: record(Fleet(), trace, advance=lambda: ended.append(1)))
    assert len(ended) == 12
    prompts = sum(one.prompt_tokens for one in trace.requests) - recording.cached_tokens.sum()
    outputs = sum(one.output_tokens - 1 for one in trace.requests)  # the last token is not computed
    assert sum(one.timed.new_tokens for one in recording.steps) == prompts + outputs
    assert [one.prompt_tokens for one in recording.trace.requests] == [one.prompt_tokens for one in trace.requests]
    late = np.array([one.arrival for one in recording.trace.requests]) - [one.arrival for one in trace.requests]
    assert late.min() >= 0
    assert (recording.queued <= recording.ttft).all()
    assert (recording.ttft <= recording.e2e).all()
    assert recording.e2e.max() <= recording.seconds
    assert recording.capacity_tokens % 16 == 0
    assert all(0 < one.ended <= min(one.taken_in, recording.seconds) for one in recording.steps)
    assert {one.timed.replica for one in recording.steps} == set(recording.replica.tolist())
    assert 0 < recording.latency < recording.ttft.mean()
    assert (recording.busy_seconds <= recording.seconds).all()


def test_the_command_runs_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "fidelity.json"
    assert main(["bench", "fidelity", "--requests", "24", "--load", "0.5", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for text in ("recorded", "mean", "varying", "ttft p99", "latency mean", "load average"):
        assert text in shown
    document = json.loads(file.read_text())
    assert document["settings"]["requests"] == len(document["recorded"]["requests"]) == 24
    assert document["settings"]["goal"] == 0.15
    assert document["simulated"][0]["name"] == "mean"
    for one in document["simulated"]:
        assert set(one["figures"]) == set(one["errors"]) == set(FIGURES)
        assert all(math.isfinite(value) and value > 0 for value in one["figures"].values())
        assert all(math.isfinite(value) for value in one["errors"].values())
        assert one["met"] == (one["worst"] <= 0.15)


@pytest.mark.parametrize("arguments", ["--requests 19", "--load 0", "--load 1", "--seed -1"])
def test_arguments_out_of_range(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fidelity", *arguments.split()]) == 1
    assert "--requests must be at least 20, --load between 0 and 1, --seed at least 0" in capsys.readouterr().err
