"""The engine: one replica's model, KV pages and local scheduler, advanced one step at a time."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preble.engine.generation import Generation
from preble.engine.messages import Abort, Command, Delta, Pause, Ready, StepReport, Submit
from preble.engine.runner import Launched, Runner
from preble.outputs import ReplicaStats
from preble.sched.events import StepTimed
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence
from preble.sched.step_plan import StepPlan

if TYPE_CHECKING:
    from preble.engine.token_text import TokenText

RATE_WINDOW = 10.0
"""Seconds over which `tokens_per_second` is averaged."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way."""

    plan: StepPlan
    launched: Launched
    began: float
    """`time.monotonic()` before it was planned."""


class Engine:
    """Runs requests on one device. Synchronous, not thread-safe: one thread owns it.

    Where the runner works ahead, a step is launched before the one before it is read back, so that the device never
    waits for the host.

    Args:
        runner: computes the steps, on KV pages of its own.
        tokenizer: for the text of the output.
        replica: this engine's number in the cluster.
        max_batched_tokens: tokens that one step computes at most, decodes and prefill chunks together.
        max_running: requests in a step at most.
        local_order: name of the order in which waiting requests are served (`preble.sched.orders`).

    Raises:
        InvalidRequest: there is no such order.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: TokenText,
        *,
        replica: int = 0,
        max_batched_tokens: int,
        max_running: int = 256,
        local_order: str = "hrrn",
    ) -> None:
        self.scheduler = LocalScheduler(
            pages=runner.pages,
            page_size=runner.page_size,
            max_batched_tokens=max_batched_tokens,
            max_running=max_running,
            replica=replica,
            order=local_order,
        )
        self.computed_tokens = 0
        self.generated_tokens = 0
        self._runner = runner
        self._tokenizer = tokenizer
        self._replica = replica
        self._flights: deque[Flight] = deque()
        """Steps whose results are not read yet, the oldest first."""
        self.paused = False
        """Whether it was told to take no steps."""
        self._taken = 0
        self._landed = 0.0
        """`time.monotonic()` when the last result was read."""
        self._recent: deque[tuple[float, int]] = deque()
        """(when, generated tokens so far) of the steps in the rate window."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute something or read a result."""
        if self.paused:
            return bool(self._flights)
        return bool(self.scheduler.running or self.scheduler.waiting or self._flights)

    def ready(self) -> Ready:
        """What the cluster must know before it sends requests."""
        return Ready(self._runner.pages, self.scheduler.max_batched_tokens, self.stats())

    def obey(self, command: Command) -> None:
        """Take in a command between two steps."""
        self._taken += 1
        if isinstance(command, Submit):
            self.submit(command)
        elif isinstance(command, Abort):
            self.abort(command.request_id)
        elif isinstance(command, Pause):
            self.paused = command.paused
        else:
            self.scheduler.reset_prefix_cache()

    def submit(self, request: Submit) -> None:
        """Queue a request."""
        generation = Generation(request, self._tokenizer, self._runner.config)
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
                lockstep=self._runner.lockstep(generation.sampling),
                payload=generation,
            ),
            now=time.monotonic() if request.arrived is None else request.arrived,
        )

    def abort(self, request_id: str) -> None:
        """End a request between two steps; its pages are free or cached at once. Unknown ids are ignored."""
        self.scheduler.abort(request_id)

    def step(self) -> StepReport:
        """Launch a step, and report those whose results are due. With neither, reports what commands left to tell."""
        began = time.monotonic()
        self.scheduler.expire(began)
        plan = None if self.paused else self.scheduler.plan(now=began)
        if plan is not None:
            self._flights.append(Flight(plan, self._runner.launch(plan), began))
            self.computed_tokens += plan.tokens
        deltas: list[Delta] = []
        timings: list[StepTimed] = []
        while len(self._flights) > (0 if plan is None else self._runner.ahead):
            flight = self._flights.popleft()
            deltas += self._land(flight)
            now = time.monotonic()
            timings.append(_timed(self._replica, flight.plan, now - max(flight.began, self._landed)))
            self.scheduler.learn(timings[-1])
            self._landed = now
        events = [*self.scheduler.take_events(), *timings]
        return StepReport(self._replica, self.stats(), deltas, events, self._taken)

    def received(self) -> StepReport:
        """That all commands so far have arrived; reports no step."""
        return StepReport(self._replica, self.stats(), taken=self._taken)

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
            device=str(self._runner.device),
            attention=self._runner.attention,
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

    def _land(self, flight: Flight) -> list[Delta]:
        """Take in the result of a step."""
        result = flight.launched.result()
        invalid = set(result.invalid)
        for chunk in flight.plan.chunks:
            generation: Generation = chunk.sequence.payload
            if generation.started is None:
                generation.started = flight.began
        deltas: list[Delta] = []
        outcomes: list[tuple[int, bool] | None] = []
        generated = 0
        for row, chunk in enumerate(chunk for chunk in flight.plan.chunks if chunk.samples):
            sequence = chunk.sequence
            if sequence.finished:
                outcomes.append(None)
                continue
            generation = sequence.payload
            if row in invalid:
                deltas.append(generation.fail(sequence, "the model's logits hold NaN or no finite value"))
                outcomes.append(None)
                continue
            token = result.tokens[row]
            delta = generation.advance(sequence, token, result.logprobs[row])
            deltas.append(delta)
            outcomes.append((token, delta.finish_reason is not None))
            generated += 1
        self._recent.append((flight.began, self.generated_tokens))
        self.generated_tokens += generated
        self.scheduler.commit(flight.plan, outcomes)
        return deltas


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
