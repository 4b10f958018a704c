"""What it costs to put messages between the cluster and a worker process into bytes, and to read them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from preble.engine.messages import Delta, StepReport, Submit
from preble.engine.wire import decode_commands, decode_news, encode_commands, encode_news
from preble.outputs import ReplicaStats
from preble.sampling import SamplingParams
from preble.sched.events import Event, Progressed, StepTimed

REPEATS = 200
Costs: TypeAlias = dict[str, float]


def message_costs(requests: int, prompt_tokens: int) -> Costs:
    """Seconds, the least of many: writing and reading a step's report on `requests` that decode, and a submission.

    Args:
        requests: how many the step is of.
        prompt_tokens: of the request that is submitted.
    """
    report = StepReport(
        0,
        ReplicaStats(0, "cpu", "torch", requests, 0, 100, 50, 10, 40, 1000, 500, 2000, 1000, 0, 100.0),
        [Delta(f"request-{number}", (7,), " word", (), 0, 1.0) for number in range(requests)],
        _events(requests, prompt_tokens),
    )
    submit = Submit(
        "request-1",
        np.arange(prompt_tokens, dtype=np.int32),
        prompt_tokens,
        prompt_tokens + 256,
        SamplingParams(),
        1,
    )
    frames = {"report": encode_news([report]), "submit": encode_commands([submit])}
    return {
        "write report": _least(lambda: encode_news([report])),
        "read report": _least(lambda: [decode_news(frame) for frame in frames["report"]]),
        "write submit": _least(lambda: encode_commands([submit])),
        "read submit": _least(lambda: [decode_commands(frame) for frame in frames["submit"]]),
    }


def _events(requests: int, context: int) -> list[Event]:
    progress = [Progressed(0, f"request-{number}", context, (7,)) for number in range(requests)]
    return [*progress, StepTimed(0, requests, requests, requests * context, 0.01)]


def _least(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
