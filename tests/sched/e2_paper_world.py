"""A scheduler by E2, and replicas that do at once what they are told to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from preble.sched import (
    Admitted,
    CostModel,
    E2Paper,
    Evicted,
    Finished,
    GlobalScheduler,
    Placement,
    Progressed,
    ReplicaView,
    Stored,
    Waiting,
)
from preble.sched.hashing import page_hashes

PAGE = 10


class PerToken(CostModel):
    """So many seconds per token, and nothing else."""

    name = "per-token"

    def __init__(self, prefill: float = 0.001, decode: float = 0.0) -> None:
        self.prefill, self.decode = prefill, decode

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return self.prefill * sum(new for new, _ in prefills) + self.decode * decodes


class World:
    """A scheduler and replicas that do at once what they are told to."""

    def __init__(self, replicas: int = 2, *, cost: CostModel | None = None, seed: int = 0, **switches: Any) -> None:
        capacity = switches.pop("capacity_tokens", 1_000_000)
        window = switches.pop("window", 100.0)
        self.policy = E2Paper(**switches)
        self.now = 0.0
        self.scheduler = GlobalScheduler(
            replicas,
            capacity_tokens=capacity,
            page_size=PAGE,
            policy=self.policy,
            cost=cost or PerToken(),
            seed=seed,
            window=window,
        )
        self.submitted = 0
        self.sequences: Counter[int] = Counter()
        self.prompts: dict[str, list[int]] = {}

    def submit(self, prompt: list[int], **options: Any) -> Placement:
        answer = self.try_to(prompt, **options)
        assert isinstance(answer, Placement)
        return answer

    def try_to(self, prompt: list[int], **options: Any) -> Placement | Waiting:
        self.submitted += 1
        options = {"expected_tokens": 1, **options}
        answer = self.scheduler.submit(f"r{self.submitted}", prompt, now=self.now, **options)
        self.prompts[answer.request_id] = prompt
        return answer

    def start(self, placement: Placement) -> list[Placement]:
        """Admit the request and compute its prompt, and a first token."""
        replica, name, prompt = placement.replica, placement.request_id, self.prompts[placement.request_id]
        self.scheduler.apply(Admitted(replica, name, placement.cached_tokens), now=self.now)
        self.store(replica, prompt)
        return self.scheduler.apply(Progressed(replica, name, len(prompt), (7,)), now=self.now)

    def finish(self, placement: Placement) -> list[Placement]:
        released = self.start(placement)
        return released + self.scheduler.apply(Finished(placement.replica, placement.request_id), now=self.now)

    def run(self, prompt: list[int], **options: Any) -> Placement:
        placement = self.submit(prompt, **options)
        self.finish(placement)
        return placement

    def store(self, replica: int, prompt: list[int]) -> None:
        self.sequences[replica] += 1
        self.scheduler.apply(Stored(replica, self.sequences[replica], "", names(prompt)), now=self.now)

    def evict(self, replica: int, prompt: list[int], first_page: int = 0) -> None:
        self.sequences[replica] += 1
        event = Evicted(replica, self.sequences[replica], "", names(prompt)[first_page:])
        self.scheduler.apply(event, now=self.now)

    def load(self, replica: int) -> float:
        books = self.books(replica)
        return books.window_prefill_seconds + books.window_decode_seconds

    def books(self, replica: int) -> ReplicaView:
        return next(one for one in self.scheduler.replicas if one.replica == replica)


def names(prompt: list[int]) -> np.ndarray:
    return page_hashes(np.array(prompt, np.int32), PAGE)


def tokens(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


DOCUMENT = tokens(1000, 1000)


def ask(number: int, length: int = 100, document: list[int] = DOCUMENT) -> list[int]:
    """The document and a question of its own."""
    return document + tokens(10_000 * (number + 1), length)
