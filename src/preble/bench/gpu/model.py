"""How fast a model of the shape of Llama-3-8B decodes and prefills, beside the bandwidth of the memory it lies in."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path

from preble.bench.gpu.idle import WatchedRunner
from preble.bench.gpu.place import Place, Times
from preble.bench.gpu.predictions import (
    COPY,
    DECODE_BATCHES,
    IDLE_AHEAD,
    IDLE_IN_STEP,
    PREFILLS,
    READ,
    decode_model_key,
    prefill_key,
)
from preble.bench.gpu.random_model import (
    LLAMA_8B,
    TOY,
    Driver,
    make_runner,
    make_tokenizer,
    model_config,
    random_prompts,
    random_weights,
    read_bytes,
    token_bytes,
)
from preble.bench.gpu.record import Record
from preble.engine.device.queue import make_queue
from preble.engine.device.runner import DeviceRunner
from preble.engine.runner import Runner
from preble.engine.tokenizer import Tokenizer

CONTEXT = 1024
STEPS = 64
"""Decode steps that are timed, half of them before the context is `CONTEXT` long."""
WARM_STEPS = 8
TOKEN_BUDGET = 8192
PREFILL_TOKENS = 65_536
"""Prefilled for one figure."""
IDLE_BATCH = 32
IDLE_STEPS = 40


def run_model(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Decode under CUDA graphs at several batch sizes, prefill, and the gaps between decode steps."""
    shape = TOY if place.toy else LLAMA_8B
    batches = (2,) if place.toy else DECODE_BATCHES
    length = 64 if place.toy else CONTEXT
    steps = 4 if place.toy else STEPS
    config = model_config(shape, 16 * length)
    weights = random_weights(place, shape)
    record.say(f"weights made: {shape.parameters / 1e9:.2f} billion")
    began = time.perf_counter()
    queue = make_queue(place.device)
    runner = make_runner(
        place,
        config,
        weights,
        queue=queue,
        tokens=max(max(batches) * (length + 2 * steps + 64), 256 if place.toy else PREFILL_TOKENS + 4096),
        max_running=max(batches),
        max_batched_tokens=128 if place.toy else TOKEN_BUDGET,
    )
    place.synchronize()
    record.note("seconds to capture the graphs", time.perf_counter() - began)
    with tempfile.TemporaryDirectory(prefix="preble-bench-") as folder:
        tokenizer = make_tokenizer(shape, Path(folder))
    bench = _Bench(place, record, runner, tokenizer)
    bench.prefill(length // 2, 2, warm_up=True)
    for tokens in (32,) if place.toy else PREFILLS:
        bench.prefill(tokens, 3 if place.toy else PREFILL_TOKENS // tokens)
    bandwidths = [one for key in (COPY, READ) if (one := record.ceiling(key)) is not None]
    for batch in batches:
        times = bench.decode(batch, length - steps // 2, steps)
        nbytes = read_bytes(shape, place) + batch * length * token_bytes(shape, place)
        rate = record.rate(decode_model_key(batch), batch, times, "tok/s")
        if bandwidths:
            roofline = batch * max(bandwidths) * 1e12 / nbytes
            share = f"{decode_model_key(batch)}, of the roofline"
            record.figure(share, 100 * rate / roofline, "%", roofline=roofline, bytes_per_step=nbytes)
    for ahead, key in ((1, IDLE_AHEAD), (0, IDLE_IN_STEP)):
        bench.idle(key, 2 if place.toy else IDLE_BATCH, length, WatchedRunner(runner, queue, ahead))


class _Bench:
    def __init__(self, place: Place, record: Record, runner: DeviceRunner, tokenizer: Tokenizer) -> None:
        self._place = place
        self._record = record
        self._runner = runner
        self._tokenizer = tokenizer
        self._seed = 0

    def _driver(self, runner: Runner | None = None) -> Driver:
        """A fresh engine, which knows of no prefix."""
        gc.collect()
        budget = 128 if self._place.toy else TOKEN_BUDGET
        most = 2 if self._place.toy else max(DECODE_BATCHES)
        return Driver.make(runner or self._runner, self._tokenizer, max_running=most, max_batched_tokens=budget)

    def _submit(self, driver: Driver, count: int, length: int, new_tokens: int) -> None:
        self._seed += 1
        driver.submit(random_prompts(count, length, self._runner.config.vocabulary_size, self._seed), new_tokens)

    def prefill(self, tokens: int, requests: int, *, warm_up: bool = False) -> None:
        """Distinct prompts with one token of output each, from the first step to the last token."""
        seconds: list[float] = []
        for _ in range(1 if self._place.toy or warm_up else 3):
            driver = self._driver()
            self._submit(driver, requests, tokens, 1)
            self._place.synchronize()
            began = time.perf_counter()
            driver.finish()
            seconds.append(time.perf_counter() - began)
        if not warm_up:
            self._record.rate(prefill_key(tokens), requests * tokens, Times(seconds), "tok/s")

    def _decoding(self, batch: int, length: int, new_tokens: int, runner: Runner | None = None) -> Driver:
        """An engine whose requests are all past their prompts, some decode steps ago."""
        driver = self._driver(runner)
        self._submit(driver, batch, length - WARM_STEPS, new_tokens + 2 * WARM_STEPS)
        while any(not tokens for tokens in driver.outputs.values()):
            driver.step()
        for _ in range(WARM_STEPS):
            driver.step()
        return driver

    def decode(self, batch: int, length: int, steps: int) -> Times:
        """Seconds from step to step while `batch` requests decode, each with `length` tokens or a few more."""
        # Requests that were prefilled earlier have decoded since then: they must not end before the last one does.
        budget = 128 if self._place.toy else TOKEN_BUDGET
        head_start = batch * length // budget + 2
        driver = self._decoding(batch, length, steps + head_start)
        seconds: list[float] = []
        before = time.perf_counter()
        while len(seconds) < steps:
            came = driver.step()
            now = time.perf_counter()
            if came != batch:
                raise RuntimeError(f"a step gave {came} tokens instead of {batch}")
            seconds.append(now - before)
            before = now
        self._abort(driver)
        return Times(seconds)

    def idle(self, key: str, batch: int, length: int, watched: WatchedRunner) -> None:
        """The share of the time between decode steps in which the device does nothing."""
        steps = 3 if self._place.toy else IDLE_STEPS
        driver = self._decoding(batch, length, steps + 16, watched)
        for _ in range(steps):
            driver.step()
        self._place.synchronize()
        idle = watched.idle(steps)
        self._abort(driver)
        if idle is not None:
            self._record.figure(key, 100 * idle.share, "%", longest_seconds=idle.longest, steps=idle.steps)

    def _abort(self, driver: Driver) -> None:
        for name in driver.outputs:
            driver.engine.abort(name)
        driver.finish()
        self._place.synchronize()
