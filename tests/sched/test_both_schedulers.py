"""The global scheduler over real local schedulers: what it believes of each replica is what the replica has."""

from __future__ import annotations

import random

import numpy as np
import pytest

from preble.sched import Finished, GlobalScheduler, Placement, ReplicaDown, ReplicaUp
from preble.sched.local import LocalScheduler
from preble.sched.sequence import Sequence

PAGE = 2
PAGES = 24


class Cluster:
    """Replicas that generate random tokens, and the scheduler over them."""

    def __init__(self, policy: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.scheduler = GlobalScheduler(3, capacity_tokens=PAGES * PAGE, page_size=PAGE, policy=policy, window=5.0)
        self.locals = {replica: self.local(replica) for replica in range(3)}
        self.histories: dict[str, list[int]] = {}
        self.prompt_lengths: dict[str, int] = {}
        self.now = 0.0
        self.finished: list[list[int]] = []
        self.moved: set[tuple[int, str]] = set()
        """Where requests were taken off, and which; what is reported of them from there comes too late."""

    def local(self, replica: int) -> LocalScheduler:
        return LocalScheduler(pages=PAGES, page_size=PAGE, max_batched_tokens=9, replica=replica)

    def submit(self, name: str) -> None:
        """A new conversation, or the next turn of one."""
        prompt = self.random.choice([*self.finished[-4:], [0, 1, 0, 1], []])[:20]
        prompt = prompt + [self.random.randrange(2) for _ in range(self.random.randrange(1, 8))]
        self.histories[name] = prompt
        self.prompt_lengths[name] = len(prompt)
        decision = self.scheduler.submit(name, prompt, now=self.now)
        if isinstance(decision, Placement):
            self.start(decision)

    def start(self, placement: Placement) -> None:
        prompt_length = self.prompt_lengths[placement.request_id]
        tokens = np.array(self.histories[placement.request_id], np.int32)
        length = min(len(tokens) + self.random.randrange(1, 9), PAGES * PAGE)
        self.locals[placement.replica].add(
            Sequence(placement.request_id, tokens, prompt_length=prompt_length, max_length=length), now=self.now
        )

    def step(self, replica: int) -> None:
        local = self.locals[replica]
        if local.running and self.random.random() < 0.1:
            local.preempt(self.random.choice(local.running).request_id)
        plan = local.plan(now=self.now)
        if plan is not None:
            results: list[tuple[int, bool] | None] = []
            for chunk in plan.chunks:
                if chunk.samples:
                    token = self.random.randrange(2)
                    self.histories[chunk.sequence.request_id].append(token)
                    results.append((token, chunk.sequence.length + 1 >= chunk.sequence.max_length))
            local.commit(plan, results)
        for event in local.take_events():
            if isinstance(event, Finished) and (replica, event.request_id) not in self.moved:
                self.finished.append(self.histories.pop(event.request_id))
            for placement in self.scheduler.apply(event, now=self.now):
                self.start(placement)

    def crash(self, replica: int) -> None:
        """The requests move to other replicas, or wait for one, and go on with the tokens they have."""
        lost = {one.request_id for one in [*self.locals[replica].running, *self.locals[replica].waiting]}
        self.locals[replica] = self.local(replica)
        moved = self.scheduler.apply(ReplicaDown(replica), now=self.now)
        assert lost <= {one.request_id for one in moved} | set(self.scheduler.waiting)
        for placement in [*moved, *self.scheduler.apply(ReplicaUp(replica), now=self.now)]:
            self.start(placement)

    def drain(self, replica: int) -> None:
        """What it does not work on moves; it reports of that once more, with its next step."""
        waiting = {one.request_id for one in self.locals[replica].waiting}
        moved = self.scheduler.drain(replica, now=self.now)
        assert set(moved.request_ids) == waiting
        self.moved.update((replica, name) for name in moved.request_ids)
        for name in moved.request_ids:
            self.locals[replica].abort(name)
        for placement in moved.placements:
            self.start(placement)

    def compare(self) -> None:
        self.scheduler.check()
        for books in self.scheduler.replicas:
            local = self.locals[books.replica]
            held = {int(name) for node in local.cache._tree.nodes() for name in node.hashes}
            assert self.scheduler.resident_pages(books.replica) == held
            assert books.in_flight == len(local.running) + len(local.waiting)
            assert books.decoding == sum(one.remaining == 1 and one.generated > 0 for one in local.running)
            assert books.queued == len(local.waiting)


@pytest.mark.parametrize("policy", ["e2", "round-robin"])
@pytest.mark.parametrize("seed", range(4))
def test_beliefs_follow_the_facts(policy: str, seed: int) -> None:
    cluster = Cluster(policy, seed)
    for turn in range(300):
        cluster.now += 0.1
        if turn < 150:
            cluster.submit(f"r{turn}")
        if turn in (70, 120):
            cluster.crash(turn % 3)
        if turn == 50:
            for local in cluster.locals.values():
                local.reset_prefix_cache()
        if turn > 120 and not cluster.moved and cluster.locals[2].waiting:
            cluster.drain(2)
        for replica in cluster.locals:
            cluster.step(replica)
        cluster.compare()
    assert cluster.moved
    assert not cluster.histories
    assert len(cluster.finished) == 150
    assert all(books.queued_prefill_tokens == 0 for books in cluster.scheduler.replicas)
    assert any(local.preemptions for local in cluster.locals.values())
