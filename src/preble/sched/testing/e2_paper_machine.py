"""What holds for the paper's E2 beyond what holds for every policy."""

from __future__ import annotations

from preble.sched.explanation import Explanation
from preble.sched.invariants import require
from preble.sched.placement import Placement, Waiting
from preble.sched.policies import E2Paper
from preble.sched.testing.machine import SchedulerMachine
from preble.sched.testing.model import ModelRequest


class E2PaperMachine(SchedulerMachine):
    """Checks its decisions against its rule."""

    def decided(self, before: Explanation, answer: Placement | Waiting) -> None:
        assert isinstance(self.policy, E2Paper)
        if isinstance(answer, Waiting):
            return
        cached = {one.replica: one.cached_tokens for one in before.candidates if one.state == "up"}
        longest = max(cached.values())
        holders = {replica for replica, tokens in cached.items() if tokens == longest}
        worth = longest > before.prompt_tokens - longest and len(holders) < len(cached)
        where = f"{answer}, though these tokens are cached: {cached}, of {before.prompt_tokens}"
        if answer.reason == "explore":
            require(not worth, where)
        else:
            require(worth, where)
            require(answer.reason in ("exploit", "rebalance", "replicate", "relieve"), where)
        if answer.reason == "exploit":
            require(answer.replica in holders, where)
        if answer.reason == "relieve" and not self.policy.autoscaling:  # which may retire a holder
            require(answer.replica not in holders, where)
        idle = all(one.in_flight == 0 for one in before.candidates)
        loads = [self.load(replica) for replica in cached]
        if idle and max(loads) - min(loads) <= 0.0:
            require(answer.reason in ("exploit", "explore", "replicate"), f"{where}, and nothing is out of balance")

    def must_wait(self, request: ModelRequest) -> None:
        super().must_wait(request)
        assert isinstance(self.policy, E2Paper)
        for replica in self.eligible:
            books = self.books(replica)
            full = books.unique_pages * books.page_size > books.capacity_tokens
            late = books.queued_prefill_seconds > self.policy.saturation
            require(bool(books.queued) and (full or late), f"{request.name} waits, and replica {replica} is free")

    def load(self, replica: int) -> float:
        """L: seconds of the requests placed there within the window."""
        books = self.books(replica)
        return books.window_prefill_seconds + books.window_decode_seconds
