"""Cost models by name: what the paper's authors fitted on four set-ups, and a prior for a GPU nobody measured."""

from __future__ import annotations

from collections.abc import Sequence

from preble.sched.by_name import by_name
from preble.sched.cost import CostModel, PiecewiseCost

MANY_PAIRS = 2**20
"""Tokens computed times tokens attended to, from which the Mistral formulas charge a request's attention by itself."""


class Mistral7BA6000(CostModel):
    """Mistral 7B on one A6000.

    The authors' formula, in ms, for n new tokens in a step that attends to S tokens in all: (linear(n) + attention(S) +
    the extras) / 0.9, with an extra of 0.00113 e + 0.00175 s + 2.19e-6 e s for each prefill chunk of e tokens on s
    where e s > 2^20. A decode would need a context of a million tokens to be charged one.

    Taken literally, linear(n) falls: -118 + 1.25 n - 0.00256 n² between 192 and 384 tokens peaks at 34.59 ms for
    244.1 tokens, crosses 0 at 360 and reaches -14.8 at 383, before 0.1084 n + 4.21 takes over with 45.85. Here it stays
    at its peak until then: the smallest function that is nowhere below the formula and never falls.

    Below 192 tokens it is flat, 22 ms, and stays so: reading the weights takes that long whatever is computed. So a
    small prefill beside running decodes is nearly free, and one of 10 tokens alone costs as much as one of 190.
    attention(S) is 0.32 up to S = 1024 and 0.000186 S + 0.159 above: the time to read that much KV. The authors halve
    it when most KV is shared, which a step's sums do not tell.
    """

    name = "mistral-7b-a6000"

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        tokens, context = decodes, decode_context
        extra = 0.0
        for new, attended in prefills:
            tokens += new
            context += attended
            if new * attended > MANY_PAIRS:
                extra += 1.13e-3 * new + 1.75e-3 * attended + 2.19e-6 * new * attended
        if not tokens:
            return 0.0
        return (self._linear(tokens) + (1.86e-4 * context + 0.159 if context > 1024 else 0.32) + extra) / 900

    def prefill_seconds(self, new_tokens: int, cached_tokens: int = 0) -> float:
        if not new_tokens:
            return 0.0
        attended = cached_tokens + new_tokens
        milliseconds = self._linear(new_tokens) + (1.86e-4 * attended + 0.159 if attended > 1024 else 0.32)
        if new_tokens * attended > MANY_PAIRS:
            milliseconds += 1.13e-3 * new_tokens + 1.75e-3 * attended + 2.19e-6 * new_tokens * attended
        return milliseconds / 900

    def decode_seconds(self, decodes: int, context_tokens: int) -> float:
        if not decodes:
            return 0.0
        return (self._linear(decodes) + (1.86e-4 * context_tokens + 0.159 if context_tokens > 1024 else 0.32)) / 900

    @staticmethod
    def _linear(tokens: int) -> float:
        """Milliseconds of everything but attention."""
        if tokens >= 384:
            return 0.10842571 * tokens + 4.209777
        if tokens < 192:
            return 22.0
        peak = min(tokens, 1.25 / (2 * 2.56e-3))
        return -118 + 1.25 * peak - 2.56e-3 * peak * peak


class Mistral7BA100(CostModel):
    """Mistral 7B on one A100.

    The authors' formula, in ms, for n new tokens: (linear(n) + the extras) / 0.85. linear(n) is 8.96 below 64 tokens,
    10.5 below 256, then 0.05031337 n + 5.505997, which starts at 18.4; each prefill chunk of e tokens on s with
    e s >= 2^20 adds 0.123864 - 0.000745359 e + 0.001720227 s + 1.362658e-6 e s. It never falls as it stands, because s
    counts the chunk's own tokens: with e <= s, s is at least 1,024 wherever the extra is charged, and it grows with e
    from s = 547 on.

    The formula charges decodes nothing for their context, while reading the KV of 64 decodes on 2,000 tokens each takes
    about as long as reading the weights. It is kept as published, for the sake of comparison.
    """

    name = "mistral-7b-a100"

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        tokens = decodes
        extra = 0.0
        for new, attended in prefills:
            tokens += new
            if new * attended >= MANY_PAIRS:
                extra += self._extra(new, attended)
        return (self._linear(tokens) + extra) / 850 if tokens else 0.0

    def prefill_seconds(self, new_tokens: int, cached_tokens: int = 0) -> float:
        if not new_tokens:
            return 0.0
        attended = cached_tokens + new_tokens
        extra = self._extra(new_tokens, attended) if new_tokens * attended >= MANY_PAIRS else 0.0
        return (self._linear(new_tokens) + extra) / 850

    def decode_seconds(self, decodes: int, context_tokens: int) -> float:
        return self._linear(decodes) / 850 if decodes else 0.0

    @staticmethod
    def _linear(tokens: int) -> float:
        """Milliseconds of everything but attention."""
        if tokens >= 256:
            return 0.05031337 * tokens + 5.505997
        return 8.96 if tokens < 64 else 10.5

    @staticmethod
    def _extra(new: int, attended: int) -> float:
        """Milliseconds of a large chunk's attention."""
        return 0.123864 + 1.720227e-3 * attended + (1.362658e-6 * attended - 7.45359e-4) * new


def _llama_3_70b(
    name: str, fixed: float, per_token: float, per_context: float, per_pair: float, per_decode_context: float
) -> CostModel:
    """Llama-3 70B on two GPUs: the authors' formula for one request, in ms, made one for a whole step.

    They time a request of e tokens on s by itself: fixed + per_token e + per_context s + per_pair e s. In a batch the
    constant, most of it the time to read 140 GB of weights, is paid once per step, not once per request: 64 decodes
    would cost two seconds otherwise. `per_token` is charged for every token, those of decodes too; the other
    terms add up over the prefill chunks.

    Decodes pay for their context what reading its KV takes, and not `per_context`, which was fitted to prefills and is
    40 times as much: a token's KV is 320 KiB (80 layers x 8 KV heads x 128 x 2 x 2 bytes), read by two GPUs at 80 % of
    their memory's bandwidth (2.04 TB/s an A100, 3.35 TB/s an H100).
    """
    return PiecewiseCost(
        name,
        (0, 1),
        (fixed / 1000, (fixed + per_token) / 1000),
        per_prefill_context=per_context / 1000,
        per_pair=per_pair / 1000,
        per_decode_context=per_decode_context / 1000,
    )


GENERIC = PiecewiseCost(
    "generic",
    (0, 256, 1024),
    (8e-3, 10e-3, 28e-3),
    prefill=1e-3,
    per_pair=1.5e-9,
    per_decode_context=5e-8,
)
"""A prior for a GPU nobody measured: an 8B model in 16 bits on one recent data-centre GPU, give or take a factor of 3.

A step reads 16 GB of weights, 8 ms; up to 256 tokens that hides most of the computing, beyond it each costs 23 µs.
Reading the KV of a token costs 50 ns (128 KiB at 2.7 TB/s), computing its attention to another 1.5 ns.
"""

PRESETS: dict[str, CostModel] = {
    model.name: model
    for model in (
        GENERIC,
        Mistral7BA6000(),
        Mistral7BA100(),
        _llama_3_70b("llama-3-70b-2xa100", 28.931389, 0.182233431, 4.003651e-3, 2.550501e-6, 1.004e-4),
        _llama_3_70b("llama-3-70b-2xh100", 18.667307, 7.987911e-2, 2.685316e-3, 7.443449e-7, 6.11e-5),
    )
}
"""The cost models that have a name. They hold no state: replicas may share them."""


def make_cost(cost: str | CostModel) -> CostModel:
    """The cost model of this name; an object is taken as it is.

    Raises:
        InvalidRequest: there is none of this name.
    """
    if isinstance(cost, CostModel):
        return cost
    return by_name("cost", cost, PRESETS, "a preble.sched.CostModel")
