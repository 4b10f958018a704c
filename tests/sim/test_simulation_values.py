"""Traces, settings, SLOs and looks: the values around a simulation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_fleets import SETTINGS, TEN_AND_ONE, request, simulated, trace

from preble.errors import InvalidRequest
from preble.sim import SLO, Failure, Settings, Trace, TracedRequest, simulate
from preble.sim.outcome import distribution
from preble.sim.samples import MOST


def test_what_is_known_from_earlier_prompts() -> None:
    made = trace(
        request(0.0, [1, 2, 3], 1),
        request(1.0, [1, 2, 3], 1),
        request(2.0, [1, 2, 4, 5], 1, prompt_tokens=14),
        request(3.0, [1, 2, 4, 5], 1, prompt_tokens=14),
        request(4.0, [6], 1),
        request(5.0, [1], 1),
    )
    assert made.known_tokens.tolist() == [0, 11, 8, 13, 0, 3]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=30))
def test_token_ids_stand_for_no_history(prompts: list[list[int]]) -> None:
    """Where a block is one token, prompts share what they begin with, not the numbers that both of them have."""
    requests = tuple(TracedRequest(0.0, len(ids), 1, np.array(ids, np.int32)) for ids in prompts)
    expected = []
    for number, ids in enumerate(prompts):
        seen = {tuple(other[:stop]) for other in prompts[:number] for stop in range(len(other) + 1)}
        longest = max((stop for stop in range(len(ids) + 1) if tuple(ids[:stop]) in seen), default=0)
        expected.append(min(longest, len(ids) - 1))
    assert Trace("ids", 1, requests).known_tokens.tolist() == expected


def test_the_tokens_of_a_prompt() -> None:
    made = trace(request(0.0, [7, 9], 1, prompt_tokens=6))
    tokens = made.tokens(made.requests[0])
    assert tokens.tolist() == [7, 7, 7, 7, 9, 9]
    assert tokens.dtype == np.int32


def test_the_rate_of_a_trace() -> None:
    made = trace(*(request(10.0 + 2.0 * number, [1], 1, think=3.0) for number in range(5)))
    assert (made.duration, made.rate) == (8.0, 0.5)
    faster = made.scaled(4.0)
    assert (faster.duration, faster.rate) == (2.0, 2.0)
    assert [one.think for one in faster.requests] == [3.0] * 5
    assert len(made.first(2).requests) == 2
    assert trace().duration == trace().rate == trace(request(1.0, [1], 1)).rate == 0.0
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidRequest, match="positive multiple"):
            made.scaled(rate)


def test_an_empty_trace() -> None:
    (outcome,) = simulate(trace(), SETTINGS)
    assert (outcome.completed, outcome.makespan, outcome.goodput, outcome.hit_rate) == (0, 0.0, 0.0, 0.0)
    assert (outcome.imbalance, outcome.utilization) == (1.0, 0.0)
    assert outcome.to_dict()["ttft"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    json.dumps(outcome.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 0}, "replicas must be at least 1, not 0"),
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"max_batched_tokens": 0}, "max_batched_tokens must be"),
        ({"max_running": 0}, "max_running must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"capacity_tokens": 0}, "capacity_tokens must be at least 1"),
        ({"capacity_tokens": 63, "page_size": 64}, "capacity_tokens=63 is less than a page of 64"),
        ({"event_delay": -0.1}, "event_delay must be"),
        ({"event_delay": math.nan}, "event_delay must be"),
        ({"leap_seconds": math.inf}, "leap_seconds must be"),
        ({"failures": (Failure(1, 2.0),)}, "no replica 1 to fail; there are 1, from 0"),
        ({"failures": (Failure(0, math.nan),)}, "a failure is at a time from 0 on"),
        ({"failures": (Failure(0, 1.0, -1.0),)}, "lasts 0 seconds or more"),
        ({"slowness": (1.0, 2.0)}, "slowness must be"),
        ({"slowness": (0.0,)}, "slowness must be"),
        ({"cost": "gpu"}, "gpu"),
        ({"believed_cost": "gpu"}, "gpu"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        replace(SETTINGS, **changes)


def test_a_replica_holds_what_its_cost_model_stands_for() -> None:
    assert Settings(cost="mistral-7b-a6000").kv_tokens == 198_516
    assert Settings(cost=TEN_AND_ONE).kv_tokens == 200_000
    assert Settings(cost="mistral-7b-a6000", capacity_tokens=5000).kv_tokens == 5000


def test_settings_are_plain_values() -> None:
    settings = Settings(failures=(Failure(1, 2.0), Failure(0, 1.0, 3.0)), slowness=(2.0,), believed_cost="generic")
    plain = json.loads(json.dumps(settings.to_dict(), allow_nan=False))
    assert plain["failures"] == [
        {"replica": 1, "at": 2.0, "seconds": None},
        {"replica": 0, "at": 1.0, "seconds": 3.0},
    ]
    assert (plain["cost"], plain["believed_cost"], plain["capacity_tokens"]) == ("generic", "generic", 400_000)
    assert set(plain) == set(Settings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "failure"),
    [("1@60", Failure(1, 60.0)), ("0@0.5+20", Failure(0, 0.5, 20.0)), ("12@3+0.25", Failure(12, 3.0, 0.25))],
)
def test_a_failure_in_words(text: str, failure: Failure) -> None:
    assert Failure.parse(text) == failure


@pytest.mark.parametrize("text", ["", "1", "@5", "1@", "1@x", "-1@5", "1@5+", "1@5-2", "1@5+2+3", "a@5"])
def test_a_failure_in_other_words(text: str) -> None:
    with pytest.raises(InvalidRequest, match="REPLICA@SECONDS"):
        Failure.parse(text)


def test_an_slo_in_words() -> None:
    assert SLO.parse("ttft=2.0, tpot=0.05") == SLO(2.0, 0.05, math.inf)
    assert SLO.parse("e2e=10") == SLO(math.inf, math.inf, 10.0)
    assert str(SLO.parse("e2e=10,ttft=0.5")) == "ttft=0.5,e2e=10"
    for text in ("", "ttft", "ttft=", "ttft=0", "ttft=-1", "ttft=nan", "itl=1", "ttft=1;tpot=2"):
        with pytest.raises(InvalidRequest, match="an SLO names"):
            SLO.parse(text)


def test_quantiles_are_values_that_occurred() -> None:
    values = np.array([float(number) for number in range(1, 101)] + [math.nan])
    assert distribution(values) == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert distribution(np.array([3.0])) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0}


def test_looks_cover_a_run_however_long_it_takes() -> None:
    """40 requests at once, one after the other on two replicas, and one much later."""
    made = trace(*(request(0.0, [number], 20) for number in range(40)), request(1.0, [1], 1))
    simulation = simulated(made, "round-robin", replicas=2, max_running=1)
    samples = simulation.samples
    times = samples.times
    assert MOST // 2 <= len(times) <= MOST
    assert (np.diff(times) > 0).all()
    assert times[-1] > 0.9 * simulation.now
    assert np.diff(times).max() < 2.1 * np.diff(times).min(), "evenly spread"
    for name in ("running", "waiting", "busy_seconds", "prompt_tokens", "cached_tokens"):
        assert samples.column(name).shape == (len(times), 2)
    assert samples.column("running").max() == 1
    assert samples.column("waiting")[0].sum() == 39, "those not queued yet included"
    assert (np.diff(samples.column("busy_seconds"), axis=0) >= 0).all()
    assert (samples.column("busy_seconds") <= times[:, None]).all()
    assert samples.column("prompt_tokens")[-1].sum() <= 41 * 4


PROGRAM = """
import json
from preble.sim import Failure, Settings, make_workload, simulate
trace = make_workload("tool-use", requests=60, rate=30, seed=3)
settings = Settings(replicas=3, capacity_tokens=20_000, failures=(Failure(1, 0.5, 0.5),), event_delay=0.05, seed=2)
policies = ["e2", "pmc", "prefix-affinity", "sglang", "dynamo", "llm-d", "ray"]
print(json.dumps([one.to_dict() for one in simulate(trace, settings, policies)]))
"""


def test_two_processes_agree_to_the_last_bit() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(outputs) == 1
    (output,) = outputs
    outcomes = json.loads(output)
    assert all(one["completed"] == 60 for one in outcomes)
    assert any(one["moves"] for one in outcomes)


def test_importing_loads_nothing_heavy() -> None:
    code = "import preble.sim, sys; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "rich", "transformers", "anyio"} & set(loaded)
    assert "numpy" in loaded


def test_all_public_names() -> None:
    import preble.sim

    for name in preble.sim.__all__:
        value = getattr(preble.sim, name)
        assert value.__doc__ or not callable(value), name
