"""The engine: one replica's model, KV pages and local scheduler, advanced one step at a time."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import torch

from preble.engine.batch import ForwardBatch, Model, SequenceSlice
from preble.engine.generation import Generation
from preble.engine.kv_cache import KVCache
from preble.engine.messages import Delta, StepReport, Submit
from preble.engine.sampler import Sampler
from preble.outputs import ReplicaStats
from preble.sched.events import StepTimed
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence
from preble.sched.step_plan import StepPlan

if TYPE_CHECKING:
    from preble.engine.tokenizer import Tokenizer

RATE_WINDOW = 10.0
"""Seconds over which `tokens_per_second` is averaged."""


class Engine:
    """Runs requests on one device. Synchronous, not thread-safe: one thread owns it.

    Args:
        model: may be shared with other engines on the device; it is only read.
        tokenizer: for the text of the output.
        replica: this engine's number in the cluster.
        pages: KV pages to reserve.
        page_size: tokens in a page.
        max_batched_tokens: tokens that one step computes at most, decodes and prefill chunks together.
        max_running: requests in a step at most.
        local_order: name of the order in which waiting requests are served (`preble.sched.orders`).

    Raises:
        InvalidRequest: there is no such order.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        replica: int = 0,
        pages: int,
        page_size: int,
        max_batched_tokens: int,
        max_running: int = 256,
        local_order: str = "hrrn",
    ) -> None:
        self.scheduler = LocalScheduler(
            pages=pages,
            page_size=page_size,
            max_batched_tokens=max_batched_tokens,
            max_running=max_running,
            replica=replica,
            order=local_order,
        )
        self.computed_tokens = 0
        self.generated_tokens = 0
        self._model = model
        self._tokenizer = tokenizer
        self._sampler = Sampler()
        self._replica = replica
        self._kv = KVCache(
            layers=model.config.layers,
            pages=pages,
            page_size=page_size,
            kv_heads=model.config.kv_heads,
            head_dim=model.config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        self._recent: deque[tuple[float, int]] = deque()
        """(when, generated tokens so far) of the steps in the rate window."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute something."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, request: Submit) -> None:
        """Queue a request."""
        self.scheduler.add(
            Sequence(
                request.request_id,
                request.token_ids,
                prompt_length=request.prompt_length,
                max_length=request.max_length,
                namespace=request.namespace,
                priority=request.priority,
                deadline=request.deadline,
                expected_tokens=request.expected_tokens,
                payload=Generation(request, self._tokenizer, self._model.config),
            ),
            now=time.monotonic(),
        )

    def abort(self, request_id: str) -> None:
        """End a request between two steps; its pages are free or cached at once. Unknown ids are ignored."""
        self.scheduler.abort(request_id)

    def step(self) -> StepReport:
        """Compute one step and report it. With nothing to compute, reports what `abort` left to tell."""
        began = time.monotonic()
        plan = self.scheduler.plan(now=began)
        deltas = [] if plan is None else self._run(plan, began)
        events = self.scheduler.take_events()
        if plan is not None:
            timed = _timed(self._replica, plan, time.monotonic() - began)
            self.scheduler.learn(timed)
            events.append(timed)
        return StepReport(self._replica, self.stats(), deltas, events)

    def stats(self) -> ReplicaStats:
        """The replica as it is between two steps."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        now = time.monotonic()
        recent = self._recent
        while recent and recent[0][0] < now - RATE_WINDOW:
            recent.popleft()
        rate = 0.0
        if recent and now > recent[0][0]:
            rate = (self.generated_tokens - recent[0][1]) / (now - recent[0][0])
        return ReplicaStats(
            replica=self._replica,
            device=str(self._model.device),
            attention=self._model.attention,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_total=cache.pool.total,
            pages_in_use=cache.in_use,
            pages_cached=cache.cached,
            pages_free=cache.pool.free,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            computed_tokens=self.computed_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=scheduler.preemptions,
            tokens_per_second=rate,
        )

    def _run(self, plan: StepPlan, began: float) -> list[Delta]:
        batch = self._prepare(plan)
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        logits = self._model.forward(batch, self._kv)
        self.computed_tokens += plan.tokens
        for chunk in plan.chunks:
            generation: Generation = chunk.sequence.payload
            if generation.started is None:
                generation.started = began
        result = self._sampler.sample(
            logits,
            [sequence.payload.sampling for sequence in sampling],
            [sequence.length for sequence in sampling],
        )
        invalid = set(result.invalid)
        deltas: list[Delta] = []
        outcomes: list[tuple[int, bool] | None] = []
        for row, sequence in enumerate(sampling):
            generation = sequence.payload
            if row in invalid:
                deltas.append(generation.fail(sequence, "the model's logits hold NaN or no finite value"))
                outcomes.append(None)
                continue
            token = result.tokens[row]
            delta = generation.advance(sequence, token, result.logprobs[row])
            deltas.append(delta)
            outcomes.append((token, delta.finish_reason is not None))
        self._recent.append((began, self.generated_tokens))
        self.generated_tokens += len(sampling) - len(invalid)
        self.scheduler.commit(plan, outcomes)
        return deltas

    def _prepare(self, plan: StepPlan) -> ForwardBatch:
        """Flatten the plan into the model's input."""
        page_size = self.scheduler.page_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sequences: list[SequenceSlice] = []
        logit_rows: list[int] = []
        for chunk in plan.chunks:
            sequence, start, stop = chunk.sequence, chunk.start, chunk.start + chunk.count
            runs = sequence.table.slots(stop, page_size)
            sequences.append(SequenceSlice(len(token_ids), chunk.count, stop, runs))
            if chunk.count == 1:
                token_ids.append(int(sequence.tokens[start]))
                positions.append(start)
                slots.append(sequence.table.pages[start // page_size] * page_size + start % page_size)
            else:
                token_ids += sequence.tokens[start:stop].tolist()
                positions += range(start, stop)
                slots += _tail(runs, chunk.count)
            if chunk.samples:
                logit_rows.append(len(token_ids) - 1)
        device = self._model.device
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            sequences=sequences,
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        )


def _timed(replica: int, plan: StepPlan, seconds: float) -> StepTimed:
    """What the step computed, and how long it took."""
    contexts = [chunk.start + chunk.count for chunk in plan.chunks]
    return StepTimed(
        replica,
        new_tokens=plan.tokens,
        decodes=sum(chunk.count == 1 for chunk in plan.chunks),
        context_tokens=sum(contexts),
        seconds=seconds,
        attended_pairs=sum(chunk.count * context for chunk, context in zip(plan.chunks, contexts, strict=True)),
    )


def _tail(runs: tuple[tuple[int, int], ...], count: int) -> list[int]:
    """The last `count` slots of the runs, in order."""
    spans: list[range] = []
    for start, length in reversed(runs):
        taken = min(length, count)
        spans.append(range(start + length - taken, start + length))
        count -= taken
        if not count:
            break
    return [slot for span in reversed(spans) for slot in span]
