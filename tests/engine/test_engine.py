"""The engine on real (tiny) checkpoints: the same tokens as transformers, whatever happens to the pages."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from preble.engine.batch import Model
from preble.engine.engine import Engine
from preble.engine.host_runner import HostRunner
from preble.engine.loading import load_model
from preble.engine.messages import Delta, Submit
from preble.engine.tokenizer import Tokenizer
from preble.sampling import SamplingParams
from preble.sched.cost_fit import FittedCost
from preble.sched.events import Finished, StepTimed

CPU = torch.device("cpu")
NEW_TOKENS = 64


class Running:
    """A model that is loaded once and any number of engines over it."""

    def __init__(self, folder: Path) -> None:
        self.model: Model = load_model(folder, device=CPU, dtype="float32")
        self.tokenizer = Tokenizer(folder)

    def engine(self, **options: Any) -> Engine:
        return self.engine_over(self.model, **options)

    def engine_over(self, model: Model, *, pages: int = 64, page_size: int = 16, **options: Any) -> Engine:
        runner = HostRunner(model, pages=pages, page_size=page_size)
        return Engine(runner, self.tokenizer, **({"max_batched_tokens": 64} | options))


@pytest.fixture(scope="module")
def running(llama: Path) -> Running:
    return Running(llama)


def submit(request_id: str, prompt: list[int], max_tokens: int = NEW_TOKENS, **options: Any) -> Submit:
    options = {"temperature": 0.0, "ignore_eos": True} | options
    return Submit(
        request_id=request_id,
        token_ids=np.array(prompt, np.int32),
        prompt_length=len(prompt),
        max_length=len(prompt) + max_tokens,
        sampling=SamplingParams(max_tokens=max_tokens, **options),
        seed=options.get("seed") or 0,
    )


def finish(engine: Engine, between: Callable[[], None] = lambda: None) -> dict[str, list[Delta]]:
    """Step until nothing is left; all deltas by request."""
    deltas: dict[str, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.scheduler.check()
        between()
    return deltas


def tokens(deltas: Iterable[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def text(deltas: Iterable[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Ragged prompts, most of which share a stem with others."""
    rng = random.Random(seed)
    stems = [[rng.randrange(4, 260) for _ in range(100)] for _ in range(3)]
    return [
        rng.choice(stems)[: rng.choice([0, 17, 50, 100])] + [rng.randrange(4, 260) for _ in range(rng.randrange(1, 30))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_text_equals_transformers_generate(checkpoint: Callable[[str], Path], family: str) -> None:
    folder = checkpoint(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = prompts(1)[0]
    expected = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    engine = Running(folder).engine()
    engine.submit(submit("x", prompt))
    deltas = finish(engine)["x"]
    assert tokens(deltas) == expected
    assert deltas[-1].finish_reason == "length"


@pytest.fixture(scope="module")
def alone(running: Running) -> list[tuple[list[int], list[int]]]:
    """Sixteen prompts and what each gives in an engine of its own."""
    results = []
    for prompt in prompts(16):
        engine = running.engine()
        engine.submit(submit("x", prompt))
        results.append((prompt, tokens(finish(engine)["x"])))
    return results


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("budget", [16, 23, 512])
def test_batch_chunks_and_cache_change_no_token(
    running: Running, alone: list[tuple[list[int], list[int]]], page_size: int, budget: int
) -> None:
    engine = running.engine(pages=4096 // page_size, page_size=page_size, max_batched_tokens=budget)
    for round_ in range(2):  # the second one finds the prefixes of the first
        for number, (prompt, _) in enumerate(alone):
            engine.submit(submit(f"{round_}/{number}", prompt))
        deltas = finish(engine)
        for number, (prompt, expected) in enumerate(alone):
            mine = deltas[f"{round_}/{number}"]
            assert tokens(mine) == expected
            if round_ == 1:
                assert mine[0].cached_tokens == (len(prompt) - 1) // page_size * page_size
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize("boundary", range(1, 40, 3))
def test_a_chunk_boundary_anywhere_changes_no_token(
    running: Running, alone: list[tuple[list[int], list[int]]], boundary: int
) -> None:
    prompt, expected = max(alone, key=lambda pair: len(pair[0]))
    engine = running.engine(max_batched_tokens=boundary)
    engine.submit(submit("x", prompt))
    assert tokens(finish(engine)["x"]) == expected


def test_preemption_in_the_middle_changes_no_token(running: Running, alone: list[tuple[list[int], list[int]]]) -> None:
    rng = random.Random(1)
    longest = max(len(prompt) for prompt, _ in alone) + NEW_TOKENS
    engine = running.engine(pages=-(-longest // 16) + 2, max_batched_tokens=48)
    requests = {str(number): pair for number, pair in enumerate(alone)}
    for request_id, (prompt, _) in requests.items():
        engine.submit(submit(request_id, prompt))
    untouched = set(requests)

    def disturb() -> None:
        """The pool preempts on its own; this makes sure that no request is spared."""
        for sequence in list(engine.scheduler.running):
            if sequence.request_id in untouched and rng.random() < 0.1:
                untouched.discard(sequence.request_id)
                engine.scheduler.preempt(sequence.request_id)

    deltas = finish(engine, disturb)
    assert engine.stats().preemptions > len(requests) - len(untouched)
    assert len(untouched) < len(requests) // 4
    for request_id, (_, expected) in requests.items():
        assert tokens(deltas[request_id]) == expected


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32), budget=st.integers(8, 96), headroom=st.integers(0, 2))
def test_a_hundred_requests_end_and_leave_every_page(
    running: Running, page_size: int, seed: int, budget: int, headroom: int
) -> None:
    """Lengths, stop conditions, seeds and cancellations at random in a pool so small that requests are preempted."""
    rng = random.Random(seed)
    longest = 90
    pages = -(-longest // page_size) + headroom
    engine = running.engine(pages=pages, page_size=page_size, max_batched_tokens=budget)
    requests: dict[str, Submit] = {}
    for number, prompt in enumerate(prompts(100, seed)):
        prompt = prompt[: rng.randint(1, 70)]
        stop = {"stop": chr(rng.randrange(97, 123))} if rng.random() < 0.3 else {}
        length = rng.randint(1, min(20, longest - len(prompt)))
        requests[str(number)] = submit(
            str(number),
            prompt,
            length,
            min_tokens=rng.randint(0, length),
            temperature=rng.choice([0.0, 1.0]),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=[rng.randrange(260) for _ in range(rng.choice([0, 40]))],
            seed=rng.randrange(1000),
            **stop,
        )
    todo = list(requests.values())
    deltas: dict[str, list[Delta]] = {}
    cancelled: set[str] = set()
    preempted: set[str] = set()
    finished_events: list[str] = []
    while todo or engine.has_work:
        while todo and rng.random() < 0.7:
            engine.submit(todo.pop())
        if rng.random() < 0.05:
            victim = str(rng.randrange(100))
            if engine.scheduler.get(victim) is not None:
                engine.abort(victim)
                cancelled.add(victim)
        for sequence in list(engine.scheduler.running):  # the pool spares the oldest and those that are alone
            if sequence.request_id not in preempted and sequence.generated:
                preempted.add(sequence.request_id)
                engine.scheduler.preempt(sequence.request_id)
        report = engine.step()
        finished_events += [event.request_id for event in report.events if isinstance(event, Finished)]
        for delta in report.deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.scheduler.check()
    finished_events += [event.request_id for event in engine.step().events if isinstance(event, Finished)]
    stats = engine.stats()
    assert all(request_id in preempted or len(tokens(mine)) == 1 for request_id, mine in deltas.items())
    assert (stats.running, stats.waiting, stats.pages_in_use) == (0, 0, 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total == pages
    assert sorted(finished_events) == sorted(requests)
    for request_id in rng.sample(sorted(set(requests) - cancelled), 25):
        mine = deltas[request_id]
        assert [delta.finish_reason is not None for delta in mine] == [False] * (len(mine) - 1) + [True]
        single = running.engine(pages=4 * pages, page_size=page_size)
        single.submit(requests[request_id])
        expected = finish(single)[request_id]
        assert (tokens(mine), text(mine)) == (tokens(expected), text(expected))
        assert mine[-1].finish_reason == expected[-1].finish_reason


def test_a_request_resumed_elsewhere_continues_the_same_text(running: Running) -> None:
    first = running.engine()
    request = submit("x", prompts(1)[0], temperature=1.0, seed=5, frequency_penalty=0.5)
    first.submit(request)
    whole = finish(first)["x"]
    for cut in (1, 7, 40):
        delivered = whole[:cut]
        second = running.engine()
        second.submit(
            Submit(
                request_id="x",
                token_ids=np.concatenate([request.token_ids, np.array(tokens(delivered), np.int32)]),
                prompt_length=request.prompt_length,
                max_length=request.max_length,
                sampling=request.sampling,
                seed=request.seed,
            )
        )
        rest = finish(second)["x"]
        assert tokens(delivered) + tokens(rest) == tokens(whole)
        assert text(delivered) + text(rest) == text(whole)


def test_a_step_reports_what_it_computed_and_the_scheduler_learns_from_it(running: Running) -> None:
    engine = running.engine(max_batched_tokens=16)
    engine.submit(submit("x", prompts(1)[0][:40], 3))
    timed: list[StepTimed] = []
    while engine.has_work:
        timed += [event for event in engine.step().events if isinstance(event, StepTimed)]
    # Three chunks of the prompt, and two decodes for the second and third token.
    assert [(one.new_tokens, one.decodes, one.context_tokens, one.attended_pairs) for one in timed] == [
        (16, 0, 16, 16 * 16),
        (16, 0, 32, 16 * 32),
        (8, 0, 40, 8 * 40),
        (1, 1, 41, 41),
        (1, 1, 42, 42),
    ]
    assert all(one.seconds > 0 for one in timed)
    cost = engine.scheduler.cost
    assert isinstance(cost, FittedCost)
    assert cost.steps == 5


def test_pairs_add_up_over_the_requests_of_a_step(running: Running) -> None:
    engine = running.engine()
    engine.submit(submit("decoding", list(range(5, 25))))
    engine.step()
    engine.submit(submit("new", list(range(5, 35))))
    [timed] = [event for event in engine.step().events if isinstance(event, StepTimed)]
    # The new one finds a page of 16 tokens, and attends to it as well.
    assert (timed.new_tokens, timed.decodes, timed.context_tokens) == (1 + 14, 1, 21 + 30)
    assert timed.attended_pairs == 1 * 21 + 14 * 30


def test_the_order_and_hints_reach_the_scheduler(running: Running) -> None:
    engine = running.engine(local_order="preble")
    assert engine.scheduler.waiting.order.name == "preble"
    engine.submit(dataclasses.replace(submit("x", [5, 6, 7]), expected_tokens=12.5))
    [waiting] = engine.scheduler.waiting
    assert waiting.expected_tokens == 12.5
    assert waiting.arrived > 0


class Poisoned:
    """A model whose logits become NaN for one request's rows: those that come right after a given token."""

    def __init__(self, model: Model, token: int) -> None:
        self.config, self.device, self.dtype, self.attention = model.config, model.device, model.dtype, model.attention
        self._model = model
        self._token = token

    def forward(self, batch: Any, kv: Any) -> torch.Tensor:
        logits = self._model.forward(batch, kv).clone()
        logits[batch.token_ids[batch.logit_rows] == self._token] = float("nan")
        return logits


def test_nan_ends_the_one_request_with_an_error(running: Running, alone: list[tuple[list[int], list[int]]]) -> None:
    used = {token for prompt, output in alone[:4] for token in prompt + output}
    poison = next(token for token in range(running.model.config.vocabulary_size) if token not in used)
    engine = running.engine_over(Poisoned(running.model, poison), pages=256, max_batched_tokens=128)
    engine.submit(submit("bad", [5, 6, poison]))
    for number, (prompt, _) in enumerate(alone[:4]):
        engine.submit(submit(str(number), prompt))
    deltas = finish(engine)
    [failed] = deltas["bad"]
    assert failed.error is not None
    assert "NaN" in failed.error
    assert not failed.token_ids
    for number, (_, expected) in enumerate(alone[:4]):
        assert tokens(deltas[str(number)]) == expected
    stats = engine.stats()
    assert stats.pages_free + stats.pages_cached == stats.pages_total
