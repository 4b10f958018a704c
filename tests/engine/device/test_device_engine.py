"""The device path end to end: the tokens of the CPU path, whatever runs ahead, is preempted, padded or shared."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_world import DeviceWorld, finish, prompts, runner_of, submit, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preble.engine.device import sharing
from preble.engine.device.runner import DeviceRunner
from preble.engine.engine import Engine
from preble.engine.messages import Delta
from preble.kernels.fp8 import decoded
from preble.kernels.operations import TRITON
from preble.kernels.prefix_groups import SharingCosts
from preble.sched.events import StepTimed

FREE = SharingCosts(token_seconds=1.0, piece_seconds=0.0, launch_seconds=0.0, most_pieces=1)
"""Sharing costs nothing, so that whatever can be shared is."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DeviceWorld:
    return DeviceWorld(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def always_shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shares every prefix that two decodes have in common; the list gets how many tiles each step used."""
    used: list[int] = []
    find = sharing.PrefixSharing.find

    def watched(self: sharing.PrefixSharing, chunks: Any, size: int) -> Any:
        found = find(self, chunks, size)
        used.append(0 if found is None else found.tiles)
        return found

    monkeypatch.setattr(sharing.SharingCosts, "estimate", classmethod(lambda cls, **model: FREE))
    monkeypatch.setattr(sharing.PrefixSharing, "find", watched)
    return used


def expected(world: DeviceWorld, requests: list[Any]) -> dict[str, list[int]]:
    """What the CPU engine gives to each request alone."""
    results = {}
    for request in requests:
        results |= {name: tokens(mine) for name, mine in finish(world.host(), [request]).items()}
    return results


def given_tokens(deltas: dict[str, list[Delta]]) -> dict[str, list[int]]:
    return {name: tokens(mine) for name, mine in deltas.items()}


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("budget", [9, 64])
def test_tokens_are_those_of_the_cpu(world: DeviceWorld, ahead: int, budget: int) -> None:
    requests = [submit(str(number), prompt, 6 + number % 5) for number, prompt in enumerate(prompts(10))]
    engine = world.device(ahead=ahead, max_batched_tokens=budget)
    assert given_tokens(finish(engine, requests)) == expected(world, requests)
    again = [dataclasses.replace(request, request_id=request.request_id + "'") for request in requests]
    deltas = finish(engine, again)
    assert given_tokens(deltas) == expected(world, again)
    for request in again:
        assert deltas[request.request_id][0].cached_tokens == (len(request.token_ids) - 1) // 16 * 16


# numpy, in which the interpreter computes, warns of numbers in unused memory that the kernels mask out afterwards.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
@pytest.mark.parametrize("family", ["llama", "mistral", pytest.param("qwen2", marks=pytest.mark.long), "qwen3"])
def test_the_kernels_give_the_same_tokens(tmp_path: Path, family: str, always_shared: list[int]) -> None:
    """In the interpreter without a GPU: all kernels together, decodes beside prefill chunks, shared prefixes."""
    world = DeviceWorld(tmp_path, family, operations=TRITON, max_running=4, max_batched_tokens=48)
    requests = [submit(str(number), [*range(4, 37), 50 + number], 2 + number) for number in range(3)]
    requests.append(submit("other", [99, 98, 97], 3))
    assert given_tokens(finish(world.device(), requests)) == expected(world, requests)
    assert any(always_shared) == (family != "mistral"), "all layers of this one have a window"


def test_what_decodes_share_is_read_once_and_gives_the_same(world: DeviceWorld, always_shared: list[int]) -> None:
    requests = [submit(str(number), prompt, 12) for number, prompt in enumerate(prompts(12, seed=3))]
    assert given_tokens(finish(world.device(ahead=1), requests)) == expected(world, requests)
    assert sum(tiles > 0 for tiles in always_shared) > 10


def test_layers_with_a_window_read_their_own(tmp_path: Path, always_shared: list[int]) -> None:
    """Of two layers one sees everything, and shares; the other sees 24 tokens, which no two requests have in common."""
    world = DeviceWorld(tmp_path, "qwen2 half windowed")
    assert world.host_model.config.layer_windows == (None, 24)
    requests = [submit(str(number), prompt, 12) for number, prompt in enumerate(prompts(12, seed=3))]
    assert given_tokens(finish(world.device(), requests)) == expected(world, requests)
    assert any(always_shared)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    ahead=st.sampled_from([0, 1, 1, 2]),
    budget=st.sampled_from([8, 17, 64]),
    running=st.sampled_from([1, 3, 8]),
    headroom=st.integers(0, 4),
)
def test_nothing_that_happens_changes_a_token(
    world: DeviceWorld, seed: int, ahead: int, budget: int, running: int, headroom: int
) -> None:
    """Aborts, preemptions, sampling with seeds and stop tokens, in pools so small that requests are preempted."""
    rng = random.Random(seed)
    requests = []
    for number, prompt in enumerate(prompts(9, seed, stem=40, tail=12)):
        requests.append(
            submit(
                str(number),
                prompt,
                rng.randint(1, 14),
                temperature=rng.choice([0.0, 0.0, 1.0]),
                seed=rng.randrange(100),
                top_p=rng.choice([1.0, 0.8]),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=[rng.randrange(260) for _ in range(rng.choice([0, 30]))],
                logprobs=rng.choice([None, None, None, 1]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.4]),
            )
        )
    pages = 5 + headroom
    engine = world.device(pages=pages, ahead=ahead, max_batched_tokens=budget, max_running=running)
    aborted: set[str] = set()

    def disturb(engine: Engine) -> None:
        if rng.random() < 0.05:
            name = str(rng.randrange(9))
            if engine.scheduler.get(name) is not None:
                aborted.add(name)
                engine.abort(name)
        for sequence in list(engine.scheduler.running):
            if rng.random() < 0.05:
                engine.scheduler.preempt(sequence.request_id)

    deltas = finish(engine, requests, disturb)
    for request in requests:
        if request.request_id in aborted:
            continue
        mine = deltas[request.request_id]
        [alone] = finish(world.device(ahead=0), [request]).values()
        assert tokens(mine) == tokens(alone)
        assert [delta.finish_reason is not None for delta in mine] == [False] * (len(mine) - 1) + [True]
        if request.sampling.temperature == 0.0:
            assert tokens(mine) == expected(world, [request])[request.request_id]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"logit_bias": {7: 3.0, 9: -1e9}},
        {"logit_bias": {token: 0.01 * token for token in range(40)}},
        {"min_tokens": 5, "stop_token_ids": list(range(4, 18)), "ignore_eos": False},
        {"min_tokens": 5, "stop_token_ids": list(range(4, 200)), "ignore_eos": False},
        {"logprobs": 3},
    ],
)
def test_every_way_to_change_the_logits_is_that_of_the_cpu(world: DeviceWorld, options: dict[str, Any]) -> None:
    requests = [submit(str(number), prompt, 10, **options) for number, prompt in enumerate(prompts(3, seed=5))]
    assert given_tokens(finish(world.device(), requests)) == expected(world, requests)


def test_log_probabilities_are_those_of_the_cpu(world: DeviceWorld) -> None:
    request = submit("x", prompts(1)[0], 6, logprobs=2)
    others = [submit(str(number), prompt, 12) for number, prompt in enumerate(prompts(3, seed=1))]
    [mine] = [deltas for name, deltas in finish(world.device(), [*others, request]).items() if name == "x"]
    [alone] = finish(world.host(), [request]).values()
    for one, other in zip(mine, alone, strict=True):
        assert one.logprobs[0].token_id == other.logprobs[0].token_id
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-4)
        assert [token for token, _ in one.logprobs[0].top] == [token for token, _ in other.logprobs[0].top]


def test_a_request_for_which_the_host_samples_waits_for_its_tokens_and_no_other_does(world: DeviceWorld) -> None:
    engine = world.device(ahead=1)
    for request in (submit("host", [5, 6, 7], 8, logprobs=0), submit("device", [8, 9, 10], 8)):
        engine.submit(request)
    steps = {"host": 0, "device": 0}
    with torch.inference_mode():
        while engine.has_work:
            for delta in engine.step().deltas:
                steps[delta.request_id] += 1
            if steps["device"] == 8 and not steps.get("then"):
                steps["then"] = steps["host"]
    assert steps["host"] == steps["device"] == 8
    assert steps["then"] < 6, "every other step"


def test_seeded_text_continues_elsewhere(world: DeviceWorld) -> None:
    request = submit("x", prompts(1)[0], 16, temperature=1.0, seed=5, frequency_penalty=0.5, repetition_penalty=1.2)
    [whole] = given_tokens(finish(world.device(), [request])).values()
    for cut in (1, 9):
        resumed = dataclasses.replace(
            request, token_ids=np.concatenate([request.token_ids, np.array(whole[:cut], np.int32)])
        )
        [rest] = given_tokens(finish(world.device(), [resumed])).values()
        assert whole[:cut] + rest == whole


def test_what_was_generated_elsewhere_counts_for_min_tokens(world: DeviceWorld) -> None:
    request = submit("x", prompts(1)[0], 16, min_tokens=12, stop_token_ids=[7], logit_bias={7: 1e4})
    [whole] = given_tokens(finish(world.device(), [request])).values()
    assert whole.index(7) == 12, "it is what comes as soon as it may"
    resumed = dataclasses.replace(request, token_ids=np.concatenate([request.token_ids, np.array(whole[:9], np.int32)]))
    [rest] = given_tokens(finish(world.device(), [resumed])).values()
    assert whole[:9] + rest == whole


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_invalid_logits_end_the_one_request_with_an_error(world: DeviceWorld, bad: float) -> None:
    engine = world.device()
    runner = runner_of(engine)
    model = runner._forward.model
    forward = model.forward

    def poisoned(batch: Any, kv: Any, attention: Any) -> torch.Tensor:
        logits = forward(batch, kv, attention)
        last = batch.token_ids if batch.logit_rows is None else batch.token_ids[batch.logit_rows]
        logits[last == 3, 17] = bad
        return logits

    model.forward = poisoned  # type: ignore[method-assign]
    good = [submit(str(number), prompt, 8) for number, prompt in enumerate(prompts(4))]
    deltas = finish(engine, [submit("bad", [5, 6, 3], 8), *good])
    [failed] = deltas.pop("bad")
    assert failed.error is not None
    assert "NaN" in failed.error
    assert not failed.token_ids
    assert given_tokens(deltas) == expected(world, good)


def test_a_step_is_launched_before_the_one_before_is_read(world: DeviceWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    launch = DeviceRunner.launch

    def watched(self: DeviceRunner, plan: Any) -> Any:
        calls.append("launch")
        step = launch(self, plan)
        wait = step.done.wait

        class Watched:
            def wait(self) -> None:
                calls.append("read")
                wait()

        return dataclasses.replace(step, done=Watched())

    engines = [world.device(ahead=1), world.device(ahead=0)]  # which run something when they are made
    monkeypatch.setattr(DeviceRunner, "launch", watched)
    finish(engines[0], [submit("x", [5, 6, 7], 5)])
    assert calls == ["launch", "launch", "read", "launch", "read", "launch", "read", "launch", "read", "read"]
    calls.clear()
    finish(engines[1], [submit("x", [5, 6, 7], 3)])
    assert calls == ["launch", "read"] * 3


def test_steps_that_overlap_are_timed_apart(world: DeviceWorld) -> None:
    """Costs are learned from what the device took for a step, not from how long its result was waited for."""
    engine = world.device(ahead=2)
    engine.submit(submit("x", [5, 6, 7], 20))
    seconds = []
    began = time.monotonic()
    with torch.inference_mode():
        while engine.has_work:
            seconds += [event.seconds for event in engine.step().events if isinstance(event, StepTimed)]
    assert len(seconds) == 20
    assert all(one > 0 for one in seconds)
    assert sum(seconds) <= time.monotonic() - began


def test_a_token_beyond_the_end_is_thrown_away(world: DeviceWorld) -> None:
    """Only the host sees that a text ends; by then the step behind has computed one token more."""
    request = submit("x", prompts(1)[0], 12)
    [free] = given_tokens(finish(world.device(), [request])).values()
    stopped = submit("x", prompts(1)[0], 12, stop_token_ids=[free[4]])
    engine = world.device()
    [mine] = given_tokens(finish(engine, [stopped])).values()
    assert mine == free[: free.index(free[4]) + 1]
    assert engine.generated_tokens == len(mine)
    assert engine.computed_tokens == len(request.token_ids) + len(mine), "the last one for nothing"


def test_fp8_pages_hold_nearly_the_same_numbers(tmp_path: Path) -> None:
    world = DeviceWorld(tmp_path, "qwen3")
    request = submit("x", prompts(1)[0], 4, logprobs=0)
    engines = [world.device(), world.device(kv_dtype="fp8")]
    [exact], [close] = (list(finish(engine, [request]).values()) for engine in engines)
    assert abs(close[0].logprobs[0].logprob - exact[0].logprobs[0].logprob) < 0.3
    stored, coded = (runner_of(engine)._forward.kv for engine in engines)
    assert coded.keys.dtype == torch.uint8
    count = len(request.token_ids)  # the first pages of both
    for layer in range(world.host_model.config.layers):
        scales = coded.scales(layer)
        for name, scale in (("keys", scales["key_scales"]), ("values", scales["value_scales"])):
            wanted = getattr(stored, name)[layer, :count]
            got = decoded(getattr(coded, name)[layer, :count]) * scale[:, None]
            assert (got - wanted).norm() < 0.08 * wanted.norm(), (layer, name)
            assert scale.max() < 10 * wanted.abs().max() / 448, "numbers use the range there is"
