"""Admission by the pages to be expected: what is learned of outputs, what is forecast, how rare preemptions are."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.sched import local
from preble.sched.events import Preempted
from preble.sched.local import LocalScheduler
from preble.sched.output_lengths import FIRST_GUESS, REMEMBERED, OutputLengths
from preble.sched.page_budget import PageBudget
from preble.sched.prefix_cache import PrefixCache
from preble.sched.sequence import Sequence

LENGTHS = st.integers(1, 400)


def going_on(lengths: OutputLengths, generated: float, ahead: float) -> float:
    return float(lengths.going_on(np.array([generated]), np.array([ahead]))[0, 0])


@given(ended=st.lists(LENGTHS, max_size=40), generated=st.lists(LENGTHS, min_size=1, max_size=5))
def test_chances_are_those_of_the_outputs_that_got_as_long(ended: list[int], generated: list[int]) -> None:
    lengths = OutputLengths()
    for tokens in ended:
        lengths.observe(tokens)
    ahead = np.arange(0.0, 500.0, 7.0)
    likely = lengths.going_on(np.array(generated, np.float64), ahead)
    for row, so_far in zip(likely, generated, strict=True):
        longer = [tokens for tokens in ended if tokens > so_far]
        for chance, more in zip(row, ahead, strict=True):
            still = sum(tokens > so_far + more for tokens in longer)
            imagined = np.exp(-more / max(so_far, FIRST_GUESS))
            assert chance == pytest.approx((still + imagined) / (len(longer) + 1))
        assert row[0] == 1.0
        assert (np.diff(row) <= 0).all()


def test_outputs_that_are_all_alike_end_where_the_others_did() -> None:
    lengths = OutputLengths()
    for _ in range(200):
        lengths.observe(100)
    assert going_on(lengths, 20, 79) > 0.99
    assert going_on(lengths, 20, 80) < 0.01
    assert going_on(lengths, 100, 100) == pytest.approx(np.exp(-1)), "longer than all: expected to double"


def test_only_the_last_outputs_count() -> None:
    lengths = OutputLengths()
    for tokens in [1000] * 50 + [10] * REMEMBERED:
        lengths.observe(tokens)
    assert going_on(lengths, 5, 20) < 0.01


def waiting(name: str, prompt: int, most: int, hint: float | None = None) -> Sequence:
    return Sequence(
        name, np.zeros(prompt, np.int32), prompt_length=prompt, max_length=prompt + most, expected_tokens=hint
    )


def test_a_request_fits_as_long_as_its_longest_output_does() -> None:
    cache = PrefixCache(pages=100, page_size=16)
    budget = PageBudget([], cache, OutputLengths())
    admitted = 0
    while budget.admit(waiting("x", 16, 1), 1):
        admitted += 1
    assert admitted == 48, "a page now, a sixteenth of one for the only output token, and one of margin for each other"


@pytest.mark.parametrize(("hint", "expected"), [(None, 4), (64.0, 10), (320.0, 3)])
def test_a_hint_replaces_what_is_expected(hint: float | None, expected: int) -> None:
    cache = PrefixCache(pages=60, page_size=16)
    outputs = OutputLengths()
    for _ in range(200):
        outputs.observe(160)
    budget = PageBudget([], cache, outputs)
    admitted = 0
    while budget.admit(waiting("x", 16, 1000, hint), 1):
        admitted += 1
    assert admitted == expected


def test_pages_that_come_free_in_time_count_as_room() -> None:
    cache = PrefixCache(pages=50, page_size=16)
    ending = waiting("ending", 40 * 16, 16)
    ending.node = cache.lock("", ending.tokens)
    ending.table.extend(cache.allocate(40) or [])
    budget = PageBudget([ending], cache, OutputLengths())
    assert budget.admit(waiting("grows to 17 pages", 16, 1000, 256.0), 1)
    ending.max_length += 300
    budget = PageBudget([ending], cache, OutputLengths())
    assert not budget.admit(waiting("grows to 17 pages", 16, 1000, 256.0), 1), "it ends with some chance only"


def test_alone_a_request_always_fits() -> None:
    budget = PageBudget([], PrefixCache(pages=4, page_size=16), OutputLengths())
    assert budget.admit(waiting("all pages", 16, 48), 1)
    assert not budget.admit(waiting("one more", 1, 1), 1)


class PromptsOnly:
    """The rule before: room for all prompts, and a page to grow for each running request."""

    def __init__(self, running: list[Sequence], cache: PrefixCache, outputs: OutputLengths) -> None:
        self.room = cache.available
        self.needed = sum(-(-one.length // cache.page_size) - len(one.table) for one in running)
        self.running = len(running)

    def admit(self, candidate: Sequence, pages: int) -> bool:
        if self.running and self.needed + pages + self.running > self.room:
            return False
        self.needed += pages
        self.running += 1
        return True


class Run:
    """A pool that is much too small for its queue, worked off."""

    def __init__(self, draw: Callable[[random.Random], float], *, hints: bool = False) -> None:
        rng = random.Random(0)
        scheduler = LocalScheduler(pages=120, page_size=8, max_batched_tokens=256, order="fcfs")
        outputs: dict[str, int] = {}
        for number in range(150):
            prompt = [rng.randrange(1000) for _ in range(rng.randrange(20, 60))]
            outputs[str(number)] = length = max(1, min(int(draw(rng)), 600))
            scheduler.add(
                Sequence(
                    str(number),
                    np.array(prompt, np.int32),
                    prompt_length=len(prompt),
                    max_length=len(prompt) + 600,
                    expected_tokens=length if hints else None,
                ),
                now=0.0,
            )
        self.steps = self.computed = self.late = 0
        while scheduler.waiting or scheduler.running:
            plan = scheduler.plan(now=float(self.steps))
            assert plan is not None
            ends = [
                (1, one.generated + 1 >= outputs[one.request_id])
                for one in (chunk.sequence for chunk in plan.chunks if chunk.samples)
            ]
            scheduler.commit(plan, ends)
            self.steps += 1
            self.computed += plan.tokens
            settled = len(scheduler.waiting) < 100
            self.late += sum(isinstance(event, Preempted) and settled for event in scheduler.take_events())
        self.preemptions = scheduler.preemptions


WORKLOADS: dict[str, Callable[[random.Random], float]] = {
    "geometric": lambda rng: rng.expovariate(1 / 100),
    "all alike": lambda rng: 100,
    "short and long": lambda rng: 10 if rng.random() < 0.8 else 400,
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_preemptions_become_rare(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_forecast = Run(WORKLOADS[name])
    with_hints = Run(WORKLOADS[name], hints=True)
    monkeypatch.setattr(local, "PageBudget", PromptsOnly)
    by_prompts = Run(WORKLOADS[name])
    assert by_prompts.preemptions > 80, "else the workload shows nothing"
    assert by_forecast.preemptions < by_prompts.preemptions / 4
    assert by_forecast.late < by_prompts.late / 5, "once there was something to learn from"
    assert with_hints.preemptions == 0
    assert by_forecast.computed < by_prompts.computed
    assert by_forecast.steps < 1.5 * by_prompts.steps, "without leaving the pages empty"
