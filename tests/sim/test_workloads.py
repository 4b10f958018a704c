"""Making a workload: what is asked for, what comes back, and that nothing else decides it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from preble.errors import InvalidRequest
from preble.sim.trace import Trace, TracedRequest
from preble.sim.workloads import ARRIVALS, WORKLOADS, make_workload
from preble.sim.workloads.sessions import SECONDS_PER_TOKEN

GROWING = ("tool-use", "embodied", "chat", "agents")
"""Workloads in which every prompt of a session goes on from the one before."""


def content(request: TracedRequest) -> tuple[object, ...]:
    """Everything but when it arrives."""
    return (
        request.prompt_tokens,
        request.output_tokens,
        request.blocks.tolist(),
        request.session,
        request.think,
    )


def contents(trace: Trace) -> list[tuple[object, ...]]:
    return [content(request) for request in trace.requests]


def sessions(trace: Trace) -> list[list[TracedRequest]]:
    found: defaultdict[str, list[TracedRequest]] = defaultdict(list)
    for request in trace.requests:
        if request.session is not None:
            found[request.session].append(request)
    return list(found.values())


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_trace_keeps_what_a_trace_promises(name: str) -> None:
    trace = make_workload(name, requests=300, rate=WORKLOADS[name].rate)
    size = trace.block_size
    assert (trace.name, len(trace.requests)) == (name, 300)
    assert size == WORKLOADS[name].block_size
    arrivals = [request.arrival for request in trace.requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0

    before: dict[int, tuple[int, ...]] = {}  # an id stands for all blocks before it
    partial: set[int] = set()
    for request in trace.requests:
        assert request.prompt_tokens >= 1
        assert request.output_tokens >= 1
        assert request.think >= 0
        assert request.blocks.dtype == np.int32
        assert request.blocks.shape == (-(-request.prompt_tokens // size),)
        assert request.blocks.min() >= 0
        numbers = request.blocks.tolist()
        if request.prompt_tokens % size:
            assert numbers[-1] not in before
            partial.add(numbers[-1])
        for place, number in enumerate(numbers):
            parent = (place, numbers[place - 1] if place else -1)
            assert before.setdefault(number, parent) == parent
        assert not partial & set(numbers[:-1])


@pytest.mark.parametrize("name", WORKLOADS)
def test_fewer_requests_are_the_beginning_of_more(name: str) -> None:
    rate = WORKLOADS[name].rate
    for arrivals in ARRIVALS:
        few = make_workload(name, requests=100, rate=rate, seed=3, arrivals=arrivals)
        more = make_workload(name, requests=200, rate=rate, seed=3, arrivals=arrivals).first(100)
        assert contents(few) == contents(more)
        assert [one.arrival for one in few.requests] == [one.arrival for one in more.requests]


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_kind_of_arrivals_does_not_change_the_requests(name: str) -> None:
    rate = WORKLOADS[name].rate
    made = [make_workload(name, requests=150, rate=rate, arrivals=arrivals) for arrivals in ARRIVALS]
    assert all(contents(one) == contents(made[0]) for one in made)
    assert len({tuple(request.arrival for request in one.requests) for one in made}) == len(ARRIVALS)


def test_a_seed_is_another_trace() -> None:
    for name in WORKLOADS:
        one, other = (make_workload(name, requests=50, rate=1, seed=seed) for seed in (1, 2))
        assert contents(one) != contents(other)
        assert one.requests[-1].arrival != other.requests[-1].arrival


def test_another_process_makes_the_same_trace() -> None:
    code = (
        "from preble.sim.workloads import make_workload\n"
        "for name in ('tool-use', 'programming', 'video-qa'):\n"
        "    for one in make_workload(name, requests=60, rate=7, seed=5).requests:\n"
        "        print(one.arrival, one.think, one.output_tokens, one.session, *one.blocks.tolist())\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(printed) == 1
    assert printed.pop().count("\n") == 180


@pytest.mark.parametrize("name", GROWING)
def test_every_prompt_of_a_session_goes_on_from_the_one_before(name: str) -> None:
    trace = make_workload(name, requests=600, rate=WORKLOADS[name].rate, arrivals="uniform")
    turns = 0
    for session in sessions(trace):
        assert session[0].think == 0
        for one, following in pairwise(session):
            turns += 1
            assert following.prompt_tokens > one.prompt_tokens + one.output_tokens
            whole = one.prompt_tokens // trace.block_size
            assert following.blocks[:whole].tolist() == one.blocks[:whole].tolist()
            assert following.think > 0
    assert turns > 100


@pytest.mark.parametrize("name", [*GROWING, "video-qa", "long-document"])
def test_in_an_open_loop_a_turn_leaves_time_for_the_answer_before(name: str) -> None:
    trace = make_workload(name, requests=600, rate=WORKLOADS[name].rate, arrivals="uniform")
    for session in sessions(trace):
        for one, following in pairwise(session):
            pause = following.think + one.output_tokens * SECONDS_PER_TOKEN
            assert following.arrival - one.arrival >= pause - 1e-6


def test_sessions_take_turns() -> None:
    trace = make_workload("chat", requests=400, rate=6)
    order = [request.session for request in trace.requests]
    changes = sum(one != following for one, following in pairwise(order))
    assert changes > 350


def test_more_requests_a_second_come_from_more_sessions_at_a_time() -> None:
    slow, fast = (len(sessions(make_workload("chat", requests=1_000, rate=rate))) for rate in (1, 20))
    assert fast > 1.5 * slow


def test_samples_of_a_problem_are_the_same_prompt_in_a_row() -> None:
    requests = make_workload("programming", requests=400, rate=4.5).requests
    assert all(request.session is None and request.think == 0 for request in requests)
    whole = [request.blocks[: request.prompt_tokens // 16].tolist() for request in requests]
    repeats = sum(one == following for one, following in pairwise(whole))
    assert 0.6 < repeats / 400 < 0.9


def test_nothing_is_shared_in_the_control() -> None:
    requests = make_workload("unique", requests=500, rate=6).requests
    numbers = np.concatenate([request.blocks for request in requests])
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.parametrize("name", [name for name, one in WORKLOADS.items() if one.prefixes])
def test_one_prefix_is_shared_by_all(name: str) -> None:
    requests = make_workload(name, requests=60, rate=5, prefixes=1).requests
    assert len({request.blocks[0] for request in requests}) == 1


def test_workloads_are_described() -> None:
    assert list(WORKLOADS) == [
        "tool-use",
        "embodied",
        "programming",
        "video-qa",
        "long-document",
        "chat",
        "agents",
        "unique",
    ]
    assert all(name == one.name and one.summary and one.source for name, one in WORKLOADS.items())
    paper = {name: (one.prefixes, one.requests, one.rate) for name, one in list(WORKLOADS.items())[:5]}
    assert paper == {
        "tool-use": (1_000, 3_600, 18),
        "embodied": (200, 3_600, 15),
        "programming": (160, 2_812, 4.5),
        "video-qa": (150, 900, 3),
        "long-document": (24, 393, 0.7),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "tools"}, "no workload 'tools'; there are tool-use, embodied, .*, unique"),
        ({"arrivals": "steady"}, "no arrivals of kind 'steady'; there are poisson, bursty, uniform, at-once"),
        ({"requests": 0}, "at least 1 request, not 0"),
        ({"rate": 0.0}, "positive number of requests per second, not 0.0"),
        ({"rate": float("nan")}, "positive number of requests per second, not nan"),
        ({"rate": float("inf")}, "positive number of requests per second, not inf"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"prefixes": 0}, "at least 1 prefix, not 0"),
        ({"popularity": -0.5}, "at least 0 and finite, not -0.5"),
        ({"popularity": float("inf")}, "at least 0 and finite, not inf"),
        ({"name": "unique", "prefixes": 4}, "'unique' share no prefix"),
        ({"name": "unique", "popularity": 0.0}, "'unique' share no prefix"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"name": "chat", "requests": 10, "rate": 1.0, **change}
    with pytest.raises(InvalidRequest, match=message):
        make_workload(**arguments)  # type: ignore[arg-type]
