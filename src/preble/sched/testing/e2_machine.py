"""What holds for E2 beyond what holds for every policy."""

from __future__ import annotations

from preble.sched.explanation import Explanation
from preble.sched.invariants import require, require_close
from preble.sched.placement import Placement, Waiting
from preble.sched.policies import E2
from preble.sched.policies.e2 import has_room
from preble.sched.testing.machine import SchedulerMachine
from preble.sched.testing.model import ModelRequest


class E2Machine(SchedulerMachine):
    """Checks E2's decisions against its rule."""

    def decided(self, before: Explanation, answer: Placement | Waiting) -> None:
        assert isinstance(self.policy, E2)
        candidates = {one.replica: one for one in before.candidates if one.state == "up"}
        scores = {replica: one.costs["score_seconds"] for replica, one in candidates.items()}
        if isinstance(answer, Waiting):
            best = [replica for replica, score in scores.items() if score <= min(scores.values())]
            require(
                not scores or not all(has_room(self.books(replica)) for replica in best),
                f"{answer}, though there is room where it costs least: {scores}",
            )
            return
        require_close(scores[answer.replica], min(scores.values()), f"{answer}, and the scores are {scores}")
        cached = {replica: one.cached_tokens for replica, one in candidates.items()}
        longest, here = max(cached.values()), cached[answer.replica]
        where = f"{answer}, though these tokens are cached: {cached}, of {before.prompt_tokens}"
        if answer.reason == "exploit":
            require(here == longest > min(cached.values()), where)
        elif answer.reason == "replicate":
            require(here < longest and 2 * longest > before.prompt_tokens, where)
        else:
            require(answer.reason == "explore", where)

    def must_wait(self, request: ModelRequest) -> None:
        super().must_wait(request)
        assert isinstance(self.policy, E2)
        require(self.policy.late_binding, f"{request.name} waits")
        require(
            not all(has_room(self.books(replica)) for replica in self.eligible),
            f"{request.name} waits, and every replica has room",
        )
