"""What no policy can beat: a bound on the latencies of a trace on a fleet.

Of the seconds of a step only one thing is used at first: they never fall when it has more to do. B are the tokens of
a step at most. A *token* is a position of a prompt together with everything before it, so prompts that share a prefix
share its tokens; it *belongs* to the first request of the trace that has it. All but the first `Trace.known_tokens`
tokens of a request belong to it. Requests arrive in the order of the trace (an open loop), so until a request has
arrived nobody can have computed a token that belongs to it: all who have that token come later. So much is left to do
with an endless cache, whoever does it, also if a request waits for a later one to compute what both have.

**Alone.** KV never moves between replicas. So on the replica that generates a request's first token, all tokens that
belong to the request have been computed since its arrival. A chunk starts behind what is computed; a step gets on by
one chunk of e <= B tokens that attends to s tokens, up to its end, and takes at least f(e, s), what that chunk takes
alone. Two things bound the sum over the steps:

- Let h(s) be the least of f(e, max(s, e)) / e over all e <= B. It never falls with s, so a step takes at least e
  h(s), and so at least the sum of h over the positions that it computes: all in all, the sum of h over all these
  tokens.
- In k steps, one of them has a chunk of at least 1/k of the tokens, and the others have one of at least one token.

Every output token after the first needs a step of its own, later than the one before. It is decoded or, if the
request was preempted, the last of a chunk of at least two tokens. This bounds each request, hence their mean and
every quantile.

**Together.** Suppose that a step takes at least the sum of a price for everything in it (`StepFloor`; what depends on
the batch has the price of the batch in which it is cheapest). Charge to a request the first computation of each token
that belongs to it, and of each of its output tokens. No work is charged twice, all of it lies between the request's
arrival and its first token (or its end), and N replicas do at most N seconds of it in a second. So the true schedule
is also one for a machine N times as fast that may divide and interrupt jobs as it likes, and there *shortest
remaining processing time first* has the least mean flow time of all schedules (Schrage, 1968,
doi:10.1287/opre.16.3.687).

For a quantile, at most m of all requests may take longer than it. Of those that arrive between a and b with W seconds
of work, the others have at least W less the m largest jobs of all; that is done between a and b plus the quantile.

A mean, or a quantile, is bounded by the larger of both bounds. Requests that no replica can hold count nowhere.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from preble.errors import InvalidRequest
from preble.sched.cost import CostModel, PiecewiseCost
from preble.sched.cost_presets import Mistral7BA100, Mistral7BA6000
from preble.sim.settings import Settings
from preble.sim.trace import Trace

Array = NDArray[np.float64]

QUANTILE = 0.99
STRIDE = 64
"""Tokens of context between two prices of a table; between them the lower one counts."""
FINENESS = 1.02
"""Sizes of chunk that are priced: each at most this times the one before."""
MOST_STEPS = 16
"""More steps than the fewest possible are looked at one by one up to here, then all together."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds that the figures of no policy are below, on one trace and fleet."""

    ttft_mean: float
    """Of the mean time to the first token."""
    ttft_p99: float
    """Of its 99th percentile."""
    e2e_mean: float
    """Of the mean time to the last token."""
    e2e_p99: float
    """Of its 99th percentile."""


@dataclass(frozen=True, slots=True)
class StepFloor:
    """Prices in seconds, of which a step takes at least the sum."""

    per_token: float = 0.0
    per_prefill_token: float = 0.0
    """… more, for one of a prefill chunk."""
    per_prefill_context: float = 0.0
    """For every token attended to at the end of a prefill chunk, once for the chunk."""
    per_pair: float = 0.0
    """For every token attended to by one of a prefill chunk."""
    per_decode: float = 0.0
    per_decode_context: float = 0.0


def bound(trace: Trace, settings: Settings) -> Bound:
    """The bound for a trace as `Simulation` runs it.

    Raises:
        InvalidRequest: sessions are in a closed loop: when their requests arrive is then up to the policy.
    """
    if settings.closed_loop:
        raise InvalidRequest("there is no bound for a closed loop: when requests arrive depends on the policy")
    usable = settings.kv_tokens // settings.page_size * settings.page_size
    served = replace(
        trace, requests=tuple(one for one in trace.requests if one.prompt_tokens + one.output_tokens <= usable)
    )
    if not served.requests:
        return Bound(0.0, 0.0, 0.0, 0.0)
    factors = [*settings.slowness, *[1.0] * (settings.replicas - len(settings.slowness))]
    speed = sum(1 / factor for factor in factors)
    first, end = _alone(served, settings.cost_model, settings.max_batched_tokens)
    first, end = first * min(factors), end * min(factors)
    prefill, output = _work(served, settings.cost_model, settings.max_batched_tokens)
    arrivals = np.array([one.arrival for one in served.requests])
    ttft_mean, ttft_p99 = _together(arrivals, prefill / speed)
    e2e_mean, e2e_p99 = _together(arrivals, (prefill + output) / speed)
    return Bound(
        max(float(first.mean()), ttft_mean),
        max(_quantile(first), ttft_p99),
        max(float(end.mean()), e2e_mean),
        max(_quantile(end), e2e_p99),
    )


def step_floor(cost: CostModel, max_batched_tokens: int) -> StepFloor:
    """Prices of which every step of at most `max_batched_tokens` tokens takes at least the sum; all 0 for a model that
    this module does not know, which is true and worth nothing."""
    if isinstance(cost, PiecewiseCost):
        prices = cost.prices
        return StepFloor(
            # Between two knots the price per token goes one way, so the least is at one of these.
            min(
                cost.decode_seconds(size, 0) / size - prices["per_decode"]
                for size in {1, max_batched_tokens, *cost.knots}
                if 0 < size <= max_batched_tokens
            ),
            prices["per_prefill_token"] + prices["prefill"] / max_batched_tokens,
            prices["per_prefill_context"],
            prices["per_pair"],
            prices["per_decode"],
            prices["per_decode_context"],
        )
    sizes = range(1, max_batched_tokens + 1)
    if isinstance(cost, Mistral7BA6000):
        # Of attention only the part that grows with the context, which it always exceeds; 0.32 ms is its least. The
        # extra of large chunks is left out: the same tokens in smaller ones are not charged it.
        context = 1.86e-4 / 900
        per_token = min((cost.decode_seconds(size, 0) - 0.32 / 900) / size for size in sizes)
        return StepFloor(per_token, per_prefill_context=context, per_decode_context=context)
    if isinstance(cost, Mistral7BA100):
        return StepFloor(min(cost.decode_seconds(size, 0) / size for size in sizes))
    return StepFloor()


# Each request alone


def _alone(trace: Trace, cost: CostModel, largest: int) -> tuple[Array, Array]:
    """[requests] each: seconds to the first token, and to the end."""
    known, requests = trace.known_tokens, trace.requests
    longest = max(one.prompt_tokens + one.output_tokens for one in requests)

    def chunk(new: int, attended: int) -> float:
        return cost.step_seconds(((new, max(new, attended)),), 0, 0)

    def output(attended: int) -> float:
        return min(cost.decode_seconds(1, attended), chunk(2, attended))

    sizes = _sizes(largest)
    spans = list(zip(sizes, [*(size - 1 for size in sizes[1:]), largest], strict=True))
    prefill_sums = _price_sums(lambda attended: min(chunk(low, attended) / high for low, high in spans), longest)
    output_sums = _price_sums(output, longest)
    first = np.empty(len(requests))
    for number, request in enumerate(requests):
        start, stop = int(known[number]), request.prompt_tokens
        fewest = _in_steps(chunk, start, stop, largest)
        first[number] = max(prefill_sums[stop] - prefill_sums[start], fewest)
    prompts = np.array([one.prompt_tokens for one in requests])
    outputs = np.array([one.output_tokens for one in requests])
    return first, first + output_sums[prompts + outputs - 1] - output_sums[prompts]


def _in_steps(chunk: Callable[[int, int], float], start: int, stop: int, largest: int) -> float:
    """The least of any number of steps: one of them computes the average, all others at least a token."""
    new, least = stop - start, chunk(1, start + 1)
    fewest = -(-new // largest)
    best = math.inf
    for steps in range(fewest, fewest + MOST_STEPS):
        if steps > 1 and steps * least >= best:
            return best
        size = -(-new // steps)
        best = min(best, chunk(size, stop if steps == 1 else start + size) + (steps - 1) * least)
    return min(best, (fewest + MOST_STEPS) * least)


def _sizes(largest: int) -> list[int]:
    """1 to `largest`, with gaps that grow; the first of each gap."""
    sizes, size = [], 1
    while size <= largest:
        sizes.append(size)
        size = max(size + 1, int(size * FINENESS))
    return sizes


def _price_sums(price: Callable[[int], float], longest: int) -> Array:
    """[longest + 1]: what the first tokens cost, by a price for each that never falls from one to the next."""
    prices = np.repeat([price(attended) for attended in range(1, longest + STRIDE, STRIDE)], STRIDE)
    return np.concatenate(([0.0], np.cumsum(prices[:longest])))


# All together


def _work(trace: Trace, cost: CostModel, largest: int) -> tuple[Array, Array]:
    """[requests] each: seconds of prefill that must be done for it, and of output."""
    floor = step_floor(cost, largest)
    stop = np.array([one.prompt_tokens for one in trace.requests], np.float64)
    outputs = np.array([one.output_tokens for one in trace.requests], np.float64)
    # Where all but the last token is known, that one may belong to another request, too.
    start = np.where(trace.known_tokens < stop - 1, trace.known_tokens, stop)
    pairs = (stop * (stop + 1) - start * (start + 1)) / 2
    # The context of a chunk is paid once for all its tokens, of which there are at most `largest`.
    per_pair = floor.per_pair + floor.per_prefill_context / largest
    prefill = (stop - start) * (floor.per_token + floor.per_prefill_token) + per_pair * pairs
    decodes = outputs - 1
    attended = decodes * stop + decodes * (decodes + 1) / 2
    # Decoded, or the last of two tokens of a chunk: the cheaper one of both, in each part of the price.
    each = floor.per_token + min(floor.per_decode, floor.per_token + 2 * floor.per_prefill_token)
    per_context = min(floor.per_decode_context, floor.per_prefill_context + 2 * floor.per_pair)
    return prefill, each * decodes + per_context * attended


def _together(arrivals: Array, work: Array) -> tuple[float, float]:
    """Mean and quantile of the flow times of these jobs on one machine that does a second of work per second."""
    done, now = 0.0, 0.0
    pending: list[tuple[float, int]] = []
    for number, (arrival, seconds) in enumerate(zip(arrivals.tolist(), work.tolist(), strict=True)):
        done += _shortest_first(pending, now, arrival, arrivals)
        now = max(now, arrival)
        heapq.heappush(pending, (seconds, number))
    done += _shortest_first(pending, now, math.inf, arrivals)
    mean = done / len(work)

    late = len(work) - math.ceil(QUANTILE * len(work) - 1e-6)
    excused = float(np.sort(work)[len(work) - late :].sum())
    before = np.concatenate(([0.0], np.cumsum(work)))
    idle_at_least = np.maximum.accumulate(arrivals - before[:-1])
    quantile = float((before[1:] + idle_at_least - arrivals).max()) - excused
    return mean, max(quantile, 0.0)


def _shortest_first(pending: list[tuple[float, int]], now: float, until: float, arrivals: Array) -> float:
    """Work on what is pending; returns the sum of the flow times of jobs that end."""
    flows = 0.0
    while pending and now < until:
        seconds, number = pending[0]
        if now + seconds > until:
            heapq.heapreplace(pending, (seconds - (until - now), number))
            return flows
        heapq.heappop(pending)
        now += seconds
        flows += now - float(arrivals[number])
    return flows


def _quantile(values: Array) -> float:
    return float(np.quantile(values, QUANTILE, method="inverted_cdf"))
