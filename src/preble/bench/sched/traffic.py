"""Requests that come and go at one scheduler, and what each costs it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from time import perf_counter_ns, thread_time_ns

import numpy as np
from numpy.typing import NDArray

from preble.bench.sched.replica import FakeReplica, Flight, make_flight
from preble.bench.sched.workload import VOCABULARY
from preble.sched import Event, GlobalScheduler, Placement
from preble.sched.hashing import Tokens

RATE = 100.0
"""Requests that arrive per virtual second."""
IN_FLIGHT_PER_REPLICA = 8
SHARE_IN_FLIGHT = 0.5
"""Of a replica's tokens, at most this part belongs to requests in flight: their pages cannot be evicted."""
OUTPUT_TOKENS = 43
"""Per request; the mean of the paper's tool-use traces."""
QUEUED = 8
"""A request is admitted when so many arrived after it."""
CAPACITY_TOKENS = 200_000
"""Of each replica."""
BLOCK = 1000
"""Requests between two signs of progress."""
OUTPUTS = 1024
"""Different outputs; their pages differ all the same, for the prompts before them do."""


@dataclass(frozen=True, slots=True)
class Times:
    """What a run of requests cost the scheduler, in nanoseconds, int64 [requests].

    A *whole decision* is all that the scheduler does between two arrivals: one request is submitted, another one's
    prompt is computed, others generate, one ends. So it is everything that one request costs in its life, only not the
    same one's.
    """

    submit: NDArray[np.int64]
    """`submit` alone, processor time of the thread."""
    whole: NDArray[np.int64]
    """A whole decision, processor time of the thread."""
    submit_wall: NDArray[np.int64]
    """`submit` alone as a clock on the wall sees it, whatever else the machine does."""
    whole_wall: NDArray[np.int64]

    @property
    def per_second(self) -> float:
        """Whole decisions per second of processor time."""
        return 1e9 / float(self.whole.mean())


def in_flight_per_replica(prompt_tokens: int, capacity_tokens: int) -> int:
    """How many requests of a length a replica works on, those included that wait there."""
    return max(min(IN_FLIGHT_PER_REPLICA, int(SHARE_IN_FLIGHT * capacity_tokens / prompt_tokens)), 1)


class Traffic:
    """A scheduler with its replicas, and the requests between them.

    Only the scheduler's calls are timed. Prompts, the replicas' own books and the making of events are not.

    Args:
        scheduler: with replicas 0 to `replicas` - 1 of `capacity_tokens` each.
        prompts: int32 [n] each; they need not be endless.
        replicas: how many there are.
        page_size: tokens in a page.
        capacity_tokens: of each replica.
        rate: requests that arrive per virtual second.
    """

    def __init__(
        self,
        scheduler: GlobalScheduler,
        prompts: Iterator[Tokens],
        *,
        replicas: int,
        page_size: int,
        capacity_tokens: int = CAPACITY_TOKENS,
        rate: float = RATE,
    ) -> None:
        self.scheduler = scheduler
        self.replicas = [FakeReplica(number, page_size, capacity_tokens // page_size) for number in range(replicas)]
        self.submitted = 0
        self.finished = 0
        self.most_in_flight = IN_FLIGHT_PER_REPLICA * replicas
        self.pages_per_request = 0
        """Whole pages of the last request."""
        self._prompts = prompts
        self._page_size = page_size
        self._capacity_tokens = capacity_tokens
        self._rate = rate
        self._outputs = np.random.default_rng(0).integers(VOCABULARY, size=(OUTPUTS, OUTPUT_TOKENS), dtype=np.int32)
        self._unplaced: dict[str, Flight] = {}
        self._queued: deque[tuple[FakeReplica, Flight]] = deque()
        self._running: deque[tuple[FakeReplica, Flight]] = deque()

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return self.submitted / self._rate

    @property
    def hit_rate(self) -> float:
        """Cached fraction of the prompt tokens of all requests admitted since the last `forget_hits`."""
        prompt_tokens = sum(replica.prompt_tokens for replica in self.replicas)
        return sum(replica.cached_tokens for replica in self.replicas) / prompt_tokens if prompt_tokens else 0.0

    @property
    def resident_pages(self) -> int:
        """Pages in the caches of all replicas."""
        return sum(len(replica.cache) for replica in self.replicas)

    def forget_hits(self) -> None:
        """Start the hit rate anew."""
        for replica in self.replicas:
            replica.prompt_tokens = replica.cached_tokens = 0

    def run(self, requests: int, *, streamed: bool = False, advance: Callable[[], None] | None = None) -> Times:
        """Let so many requests arrive.

        Args:
            requests: fewer arrive where the prompts end.
            streamed: replicas report every token by itself; otherwise the output of a request as two events.
            advance: called after every `BLOCK` requests.
        """
        times = np.zeros((4, requests), np.int64)
        count = 0
        for count, prompt in enumerate(islice(self._prompts, requests), 1):
            self._arrive(prompt, streamed, times[:, count - 1])
            if advance is not None and count % BLOCK == 0:
                advance()
        return Times(*times[:, :count])

    def drain(self) -> None:
        """Let all requests end.

        Raises:
            AssertionError: the scheduler lost one.
        """
        while self._queued or self._running or self._poll():
            self._apply(self._end_oldest())
        if self.finished != self.submitted:
            raise AssertionError(f"{self.submitted} requests were submitted, {self.finished} finished")

    def _arrive(self, prompt: Tokens, streamed: bool, times: NDArray[np.int64]) -> None:
        request_id = str(self.submitted)
        output = self._outputs[self.submitted % OUTPUTS]
        now = self.now
        self.submitted += 1
        self.most_in_flight = in_flight_per_replica(len(prompt), self._capacity_tokens) * len(self.replicas)
        submit = self.scheduler.submit
        wall, began = perf_counter_ns(), thread_time_ns()
        answer = submit(request_id, prompt, now=now, max_tokens=OUTPUT_TOKENS)
        took = thread_time_ns() - began
        took_wall = perf_counter_ns() - wall
        flight = self._unplaced[request_id] = make_flight(request_id, prompt, output, self._page_size)
        self.pages_per_request = len(flight.pages)
        if isinstance(answer, Placement):
            self._placed(answer)
        applied, applied_wall = self._apply(self._work(streamed))
        times[:] = took, took + applied, took_wall, took_wall + applied_wall

    def _work(self, streamed: bool) -> list[Event]:
        """What the replicas report between two arrivals."""
        events: list[Event] = []
        while len(self._queued) > QUEUED:
            replica, flight = self._queued.popleft()
            events += replica.prefill(flight)
            self._running.append((replica, flight))
        if streamed:
            for replica, flight in self._running:
                if flight.told < len(flight.output) - 1:
                    events += replica.decode(flight, 1)
        if self.submitted - self.finished > self.most_in_flight:
            events += self._end_oldest()
        return events

    def _end_oldest(self) -> list[Event]:
        events: list[Event] = []
        if not self._running:
            if not self._queued:
                return []
            replica, flight = self._queued.popleft()
            events += replica.prefill(flight)
        else:
            replica, flight = self._running.popleft()
        events += replica.finish(flight)
        self.finished += 1
        return events

    def _apply(self, events: list[Event]) -> tuple[int, int]:
        """Tell the scheduler; returns the nanoseconds that it took, of the thread and on the wall."""
        apply, now = self.scheduler.apply, self.now
        released: list[Placement] = []
        wall, began = perf_counter_ns(), thread_time_ns()
        for event in events:
            released += apply(event, now=now)
        took = thread_time_ns() - began
        took_wall = perf_counter_ns() - wall
        for placement in released:
            self._placed(placement)
        return took, took_wall

    def _poll(self) -> bool:
        """Whether requests that waited were placed."""
        released = self.scheduler.poll(self.now)
        for placement in released:
            self._placed(placement)
        return bool(released)

    def _placed(self, placement: Placement) -> None:
        flight = self._unplaced.pop(placement.request_id)
        self._queued.append((self.replicas[placement.replica], flight))


def percentile(times: NDArray[np.int64], fraction: float) -> float:
    """The smallest of `times` that `fraction` of them do not exceed, in the same unit."""
    return float(np.sort(times)[max(math.ceil(fraction * len(times)) - 1, 0)])
