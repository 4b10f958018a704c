"""E2: exploit the replica that has the prefix, or explore the one with the least load, weighed in GPU seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

from preble.sched.policies.base import Choice, Policy, ReplicaView, View, draw

if TYPE_CHECKING:
    from preble.sched.prefix_stats import PrefixStats

MOST_PREFERENCE = 0.5
"""The preference for decode-heavy replicas is at most this part of the prefill it is about."""

SESSION_PREFERENCE = 0.1
"""… and that for the session's last replica."""

GAP_CLOSED = 1.1
"""Rebalancing ends when the heavy replica has at most this times the load of the light one."""

LEAST_GAP = 1.0
"""Rebalancing needs a gap of at least so many GPU seconds: in an idle cluster every ratio is large."""

ENOUGH = 8
"""Requests in a half window that make their mean queueing time worth believing."""


class E2Paper(Policy):
    """Exploitation and exploration (Preble, section 3), with what its paper left open settled in seconds.

    *Exploit* if more of the prompt is cached somewhere than is missing there: of the replicas with the longest match
    take the one with the lowest load cost. Otherwise, or if all replicas have the same, *explore*: the lowest load cost
    of all. The load cost is L + M + P: computation placed on the replica within H, the price of what must be evicted
    (`View.eviction_seconds`), and the prefill of what is missing.

    Then, each with a switch of its own:

    - *rebalance*: if the heaviest replica's L is more than `th_bal` times the lightest one's, what would exploit the
      heavy one goes to the light one until the gap is closed. Looked at every `review_every` seconds.
    - *replicate*: if the mean queueing time of a key portion's requests is at least `th_auto` times that of the half
      window before, and more than a copy costs, the lightest replica without it gets a copy; one per half window. When
      waiting costs less than half a copy again, copies retire in the same rhythm.
    - *relieve*: a replica is left once waiting there rather than elsewhere costs more than `patience` times what
      computing the prefix again does. Waiting is what all queued prefill takes in full steps, so small requests that
      share a step do not count as many.
    - prefill/decode balance: exploration prefers replicas that mostly decode, by at most half of P: a preference, never
      an override, as that would herd.
    - late binding: a replica with more than `saturation` seconds of prefill in its queue, or with requests queued and
      no room for their pages, gets nothing more. If all are so, the request waits in the cluster.

    Args:
        eviction_cost: count M.
        rebalancing: … as above.
        autoscaling: replicate and retire.
        prefill_decode_balance: … as above.
        late_binding: … as above.
        th_bal: Th_bal in the paper.
        th_auto: how much a queueing time must grow for another copy.
        patience: at least 1; infinity never relieves.
        saturation: seconds.
    """

    name = "e2-paper"
    review_every = 1.0

    def __init__(
        self,
        *,
        eviction_cost: bool = True,
        rebalancing: bool = True,
        autoscaling: bool = True,
        prefill_decode_balance: bool = True,
        late_binding: bool = True,
        th_bal: float = 1.5,
        th_auto: float = 2.0,
        patience: float = 2.0,
        saturation: float = 4.0,
    ) -> None:
        self.eviction_cost = eviction_cost
        self.rebalancing = rebalancing
        self.autoscaling = autoscaling
        self.prefill_decode_balance = prefill_decode_balance
        self.late_binding = late_binding
        self.th_bal = th_bal
        self.th_auto = th_auto
        self.patience = patience
        self.saturation = saturation
        self._redirected: tuple[int, int] | None = None
        """The replica that is too heavy, and the light one that gets its requests."""
        self._paces: dict[int, float] = {}
        """Seconds per token of a full prefill step, as of the last review."""
        self._scaled: WeakSet[PrefixStats] = WeakSet()
        """Prefixes that were given a copy."""

    # Deciding

    def choose(self, view: View) -> Choice | None:
        replicas, matched = view.replicas, view.matched
        free: Sequence[int] = range(len(replicas))
        if self.late_binding:
            free = self._free(replicas)
            if not free:
                return None
        longest = max(matched)
        if longest <= view.request.prompt_tokens - longest or min(matched) == longest:
            return self._explore(view, free)
        holders = [index for index, tokens in enumerate(matched) if tokens == longest]
        stats = view.prefix if self.autoscaling else None
        if stats is not None:
            if self._is_hot(stats, view):
                copy = self._place_for_copy(stats, view, free, holders)
                if copy is not None:
                    return Choice(copy, "replicate", self._terms(view, copy))
            if stats.retired:
                holders = [i for i in holders if replicas[i].replica not in stats.retired] or holders
        if len(free) < len(replicas):
            available = [index for index in holders if index in free]
            if not available:
                return self._relieve(view, free)
            holders = available
        best, terms = self._cheapest(view, holders)
        if self._redirected is not None and self._redirected[0] == replicas[best].replica:
            for index in free:
                if replicas[index].replica == self._redirected[1]:
                    return Choice(index, "rebalance", self._terms(view, index))
        return self._relief(view, free, holders, best, longest, terms) or Choice(best, "exploit", terms)

    def _explore(self, view: View, free: Sequence[int]) -> Choice:
        best, terms = self._cheapest(view, free, preferring=True)
        return Choice(best, "explore", terms)

    def _relieve(self, view: View, free: Sequence[int]) -> Choice:
        index = self._soonest(view, free)
        return Choice(index, "relieve", self._terms(view, index))

    def _relief(
        self,
        view: View,
        free: Sequence[int],
        holders: Sequence[int],
        best: int,
        longest: int,
        terms: Mapping[str, float],
    ) -> Choice | None:
        """Somewhere else, if the first token comes so much sooner there that computing the prefix again is worth it."""
        replicas, matched = view.replicas, view.matched
        runner_up = max([tokens for tokens in matched if tokens < longest], default=None)
        if runner_up is None or not replicas[best].queued_prefill_tokens or self.patience == math.inf:
            return None
        prompt_tokens, price = view.request.prompt_tokens, terms["prefill_seconds"]
        here = _drain_seconds(replicas[best], prompt_tokens - longest)
        # The most that leaving could gain: the fastest replica is idle, and misses no more than the runner-up.
        least = (prompt_tokens - runner_up) * min(self._paces.values(), default=0.0)
        if here - least <= (self.patience - 1) * (least - price):
            return None
        other = self._soonest(view, free)
        if other in holders:
            return None
        gain = here - _drain_seconds(replicas[other], prompt_tokens - matched[other])
        extra = self._prefill(view, other) - price
        if gain <= 0 or gain <= (self.patience - 1) * extra:
            return None
        return Choice(other, "relieve", self._terms(view, other))

    def _soonest(self, view: View, free: Sequence[int]) -> int:
        """Where the request would get its first token first, by what is queued and what it misses."""
        replicas, matched, paces = view.replicas, view.matched, self._paces
        prompt_tokens = view.request.prompt_tokens
        best: list[int] = []
        soonest = 0.0
        for index in free:
            replica = replicas[index]
            tokens = replica.queued_prefill_tokens + prompt_tokens - matched[index]
            seconds = tokens * paces.get(replica.replica, 1.0)
            if not best or seconds < soonest:
                best, soonest = [index], seconds
            elif seconds == soonest:
                best.append(index)
        return draw(view, best)

    def _cheapest(
        self, view: View, indices: Sequence[int], *, preferring: bool = False
    ) -> tuple[int, Mapping[str, float]]:
        """The lowest L + M + P (less what is preferred), ties by lot; and its terms.

        No term is negative, preferences included, so the search ends where L alone is more than the lowest sum.
        """
        replicas, matched = view.replicas, view.matched
        if len(indices) == 1:
            return indices[0], self._terms(view, indices[0], eviction=False)
        prompt_tokens = view.request.prompt_tokens
        average = self._decode_share(replicas, indices) if preferring and self.prefill_decode_balance else None
        loads = [(replicas[i].window_prefill_seconds + replicas[i].window_decode_seconds, i) for i in indices]
        loads.sort()
        best: list[tuple[int, float, float, float]] = []
        lowest = 0.0
        for load, index in loads:
            if best and load > lowest:
                break
            cached = matched[index]
            missed = prompt_tokens - cached
            prefill = replicas[index].cost.prefill_seconds(missed, cached) if missed else self._prefill(view, index)
            total = load + prefill
            if preferring:
                total -= self._preference(view, index, prefill, average)
            eviction = 0.0
            if self.eviction_cost and not (best and total > lowest):
                eviction = view.eviction_seconds(index)
                total += eviction
            if not best or total < lowest:
                best, lowest = [(index, load, prefill, eviction)], total
            elif total == lowest:
                best.append((index, load, prefill, eviction))
        index, load, prefill, eviction = best[draw(view, list(range(len(best))))] if len(best) > 1 else best[0]
        terms = {
            "load_seconds": load,
            "prefill_seconds": prefill,
            "wait_seconds": _drain_seconds(replicas[index]),
        }
        if self.eviction_cost:
            terms["eviction_seconds"] = eviction
        return index, terms

    def _prefill(self, view: View, index: int) -> float:
        """P: what the request misses on a replica. The last token of a prompt is computed even if it is cached."""
        cached = view.matched[index]
        missed = view.request.prompt_tokens - cached
        return view.replicas[index].cost.prefill_seconds(missed or 1, cached if missed else cached - 1)

    @staticmethod
    def _decode_share(replicas: Sequence[ReplicaView], indices: Sequence[int]) -> float:
        shares = 0.0
        for index in indices:
            shares += _decode_share(replicas[index])
        return shares / len(indices)

    @staticmethod
    def _preference(view: View, index: int, prefill: float, average: float | None) -> float:
        preference = 0.0
        if average is not None:
            preference = MOST_PREFERENCE * max(_decode_share(view.replicas[index]) - average, 0.0)
        if index == view.session:
            preference += SESSION_PREFERENCE
        return preference * prefill

    def _terms(self, view: View, index: int, *, eviction: bool = True) -> dict[str, float]:
        replica = view.replicas[index]
        terms = {
            "load_seconds": replica.window_prefill_seconds + replica.window_decode_seconds,
            "prefill_seconds": self._prefill(view, index),
            "wait_seconds": _drain_seconds(replica),
        }
        if eviction and self.eviction_cost:
            terms["eviction_seconds"] = view.eviction_seconds(index)
        return terms

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        terms = self._terms(view, index)
        everybody = range(len(view.replicas))
        average = self._decode_share(view.replicas, everybody) if self.prefill_decode_balance else None
        terms["preference_seconds"] = self._preference(view, index, terms["prefill_seconds"], average)
        return terms

    # Late binding

    def accepts(self, replicas: Sequence[ReplicaView]) -> bool:
        return not self.late_binding or len(self._free(replicas)) > 0

    def _free(self, replicas: Sequence[ReplicaView]) -> Sequence[int]:
        """Those that are not saturated."""
        limit = self.saturation
        everybody = range(len(replicas))
        # What each request costs alone adds up to more than what they cost together, and pages counted once per request
        # to more than there are: these sums are at hand, and nearly always answer the question.
        if max([one.queued_prefill_seconds for one in replicas]) <= limit and not any(
            one.total_pages * one.page_size > one.capacity_tokens for one in replicas
        ):
            return everybody
        return [index for index in everybody if not self._is_saturated(replicas[index])]

    def _is_saturated(self, replica: ReplicaView) -> bool:
        if not replica.queued:
            return False
        if replica.unique_pages * replica.page_size > replica.capacity_tokens:
            return True
        return replica.queued_prefill_seconds > self.saturation and _drain_seconds(replica) > self.saturation

    # Autoscaling

    def _is_hot(self, stats: PrefixStats, view: View) -> bool:
        if min(stats.waits) < ENOUGH or stats.scaled == stats.half_at(view.now, view.window):
            return False
        before, requests_before, this, requests = stats.means(view.now, view.window)
        if min(requests_before, requests) < ENOUGH or this < self.th_auto * before:
            return False
        return this > self._copy_seconds(view)

    def _is_cool(self, stats: PrefixStats, view: View) -> bool:
        if not stats.copies or stats.scaled == stats.half_at(view.now, view.window):
            return False
        _, _, this, requests = stats.means(view.now, view.window)
        return requests >= ENOUGH and this < self._copy_seconds(view) / 2

    @staticmethod
    def _copy_seconds(view: View) -> float:
        """What computing the matched prefix once more costs, on the replica where it is cheapest."""
        return min(replica.cost.prefill_seconds(max(view.matched)) for replica in view.replicas)

    @staticmethod
    def _place_for_copy(stats: PrefixStats, view: View, free: Sequence[int], holders: list[int]) -> int | None:
        """A replica whose copy was retired, as it may still be there, else the lightest without one."""
        replicas = view.replicas
        retired = [index for index in free if replicas[index].replica in stats.retired]
        if retired:
            return retired[-1]
        others = [index for index in free if index not in holders]
        if not others:
            return None
        return min(others, key=lambda i: replicas[i].window_prefill_seconds + replicas[i].window_decode_seconds)

    def placed(self, view: View, choice: Choice) -> None:
        stats = view.prefix
        if stats is None or not self.autoscaling:
            return
        if choice.reason == "replicate":
            replica = view.replicas[choice.chosen].replica
            stats.copies = (*(one for one in stats.copies if one != replica), replica)
            stats.retired = tuple(one for one in stats.retired if one != replica)
            self._scaled.add(stats)
            stats.scaled = stats.half_at(view.now, view.window)
        elif self._is_cool(stats, view):
            stats.retired = (*stats.retired, stats.copies[-1])
            stats.copies = stats.copies[:-1]
            stats.scaled = stats.half_at(view.now, view.window)

    # Rebalancing

    def review(self, replicas: Sequence[ReplicaView], now: float) -> None:
        here = {one.replica for one in replicas}
        if self._paces.keys() - here:  # a replica is gone, and its copies are, should it come back
            for stats in self._scaled:
                stats.keep_copies(here)
        self._paces = {
            one.replica: one.cost.prefill_seconds(one.max_batched_tokens) / one.max_batched_tokens for one in replicas
        }
        if not self.rebalancing or len(replicas) < 2:
            self._redirected = None
            return
        loads = {one.replica: one.window_prefill_seconds + one.window_decode_seconds for one in replicas}
        heavy, light = max(loads, key=loads.__getitem__), min(loads, key=loads.__getitem__)
        if loads[heavy] > self.th_bal * loads[light] and loads[heavy] - loads[light] > LEAST_GAP:
            self._redirected = (heavy, light)
        elif self._redirected is not None:
            heavy, light = self._redirected
            if heavy not in loads or light not in loads or loads[heavy] <= GAP_CLOSED * loads[light]:
                self._redirected = None


def _decode_share(replica: ReplicaView) -> float:
    """The part of its load that is decoding; one half before there is any."""
    load = replica.window_prefill_seconds + replica.window_decode_seconds
    return replica.window_decode_seconds / load if load > 0.0 else 0.5


def _drain_seconds(replica: ReplicaView, more: int = 0) -> float:
    """How long it takes to compute all that is queued for prefill, and so many tokens more, in steps as full as can
    be."""
    full, rest = divmod(replica.queued_prefill_tokens + more, replica.max_batched_tokens)
    cost = replica.cost
    seconds = cost.prefill_seconds(rest) if rest else 0.0
    return seconds + full * cost.prefill_seconds(replica.max_batched_tokens) if full else seconds
