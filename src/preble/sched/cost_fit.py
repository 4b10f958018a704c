"""A cost model that learns from the steps it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preble.errors import InvalidRequest
from preble.sched.cost import CostModel, PiecewiseCost
from preble.sched.events import StepTimed

Array = NDArray[np.float64]

FORMAT = "preble-cost-1"
KNOTS = (0, 16, 64, 128, 192, 256, 384, 512, 1024, 2048)
"""Tokens per step between which the base is linear."""
PRICES = ("prefill", "per_prefill_token", "per_prefill_context", "per_pair", "per_decode", "per_decode_context")
"""The other terms, as `PiecewiseCost` calls them."""
KEPT_STEPS = 64
"""Steps remembered of each kind: those with prefill chunks, and those that only decode."""
FIRST_FIT = 8
"""Steps seen before the first fit, so that a slow first one does not decide it."""
LONGEST_WAIT = 64
"""Steps from one fit to the next, at most."""
START_WEIGHT = 0.02
"""What a point taken from `start` counts beside a remembered step."""
TOLERANCE = 0.15
"""Relative errors beyond this count linearly instead of by their square."""
SHORTEST, LONGEST = 1e-6, 3600.0
"""Seconds of a step between which a timing is believed."""
MOST_TOKENS = 10**9
"""Tokens attended to in a step above which its sums are not believed."""

PREFILL, SECONDS, START_SECONDS = len(KNOTS), -2, -1
"""Columns of a table of steps: 1 if it has prefill chunks, what it took, what `start` says. The first columns, up to
`SECONDS`, are what the terms multiply."""

RAMP_STARTS = np.array(KNOTS[:-1], dtype=np.float64)
RAMP_LENGTHS = np.diff(np.array(KNOTS, dtype=np.float64))


class FittedCost(CostModel):
    """Begins as `start` and learns from timings what steps really cost.

    It becomes a `PiecewiseCost` whose terms are fitted to recent steps by least squares of the relative errors, none
    below 0: a sum of rising terms with such factors cannot be negative or fall. Sizes of step that were not seen keep
    the proportions of `start`, at the speed observed. Steps far off count less, so that a few which waited for a
    compilation or another process do no harm, while a lasting change of speed is followed within a few hundred steps.

    The sums of a step do not tell how many prefill chunks it had; the price of their context is learned as if one.
    """

    def __init__(self, start: CostModel) -> None:
        """`start` may be fitted itself: what it predicts now is what this one begins as."""
        self.origin: str = start.origin if isinstance(start, FittedCost) else start.name
        """Name of the model that all this began with."""
        self.name = f"fitted (from {self.origin})"
        self.steps = 0
        """Timings learned from; those not believed are not counted."""
        self.model: CostModel = start.model if isinstance(start, FittedCost) else start
        """What it predicts with, until it learns again."""
        self._start = self.model
        self._terms: Array | None = None
        self._next_fit = FIRST_FIT
        self._new: list[tuple[float, ...]] = []
        self._points = _table(_points(self._start))
        self._prefills = self._decodes = self._points[:0]

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return self.model.step_seconds(prefills, decodes, decode_context)

    def prefill_seconds(self, new_tokens: int, cached_tokens: int = 0) -> float:
        return self.model.prefill_seconds(new_tokens, cached_tokens)

    def decode_seconds(self, decodes: int, context_tokens: int) -> float:
        return self.model.decode_seconds(decodes, context_tokens)

    def observe(self, event: StepTimed) -> None:
        """Learn from a step. One whose time or sums cannot be true is ignored."""
        shape = _shape(event)
        if shape is None:
            return
        computed, attended, pairs, decodes, decode_context = shape
        self._new.append(_row(self._start, computed, attended, pairs, decodes, decode_context, event.seconds))
        self.steps += 1
        if self.steps >= self._next_fit:
            self._learn()
            self._next_fit = self.steps + min(max(self.steps // 2, FIRST_FIT), LONGEST_WAIT)

    def expected_seconds(self, event: StepTimed) -> float | None:
        """How long it would have expected the step to take; `None` if its time or sums cannot be true."""
        shape = _shape(event)
        if shape is None:
            return None
        computed, attended, _, decodes, decode_context = shape
        return self.model.step_seconds(((computed, attended),) if computed else (), decodes, decode_context)

    def to_dict(self) -> dict[str, Any]:
        """What it predicts, in types that JSON knows, for `from_dict`."""
        model = self.model
        if not isinstance(model, PiecewiseCost):
            model = _model(self.name, self._fit())
        return {
            "format": FORMAT,
            "start": self.origin,
            "knots": list(model.knots),
            "base": list(model.base),
            **model.prices,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FittedCost:
        """The model that `to_dict` wrote, ready to learn on.

        Raises:
            InvalidRequest: `to_dict` did not write this; the message names what is wrong.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise InvalidRequest(f"a fitted cost model must be a mapping with format {FORMAT!r}, not {data!r:.80}")
        wrong = "{} of a fitted cost model must be {}, not {!r:.80}"
        if not isinstance(data.get("start"), str):
            raise InvalidRequest(wrong.format("start", "a name", data.get("start")))
        for key in ("knots", "base"):
            if not (isinstance(data.get(key), list) and all(map(_is_number, data[key]))):
                raise InvalidRequest(wrong.format(key, "a list of numbers", data.get(key)))
        for key in PRICES:
            if not _is_number(data.get(key)):
                raise InvalidRequest(wrong.format(key, "a number", data.get(key)))
        prices = {key: float(data[key]) for key in PRICES}
        return cls(PiecewiseCost(data["start"], data["knots"], data["base"], **prices))

    def _learn(self) -> None:
        """Remember the new steps and fit the terms anew."""
        new = _table(self._new)
        self._new.clear()
        prefill = new[:, PREFILL] > 0
        self._prefills = np.concatenate((self._prefills, new[prefill]))[-KEPT_STEPS:]
        self._decodes = np.concatenate((self._decodes, new[~prefill]))[-KEPT_STEPS:]
        self._terms = self._fit()
        self.model = _model(self.name, self._terms)

    def _fit(self) -> Array:
        """The terms that suit the remembered steps best: float64 [base terms + prices], none negative."""
        steps = np.concatenate((self._prefills, self._decodes, self._points))
        features, seconds, by_start = steps[:, :SECONDS], steps[:, SECONDS], steps[:, START_SECONDS]
        weights = np.ones(len(steps))
        seen = len(steps) - len(self._points)
        weights[seen:] = START_WEIGHT
        if seen:
            by_start *= _median(seconds[:seen] / by_start[:seen])
            seconds[seen:] = by_start[seen:]
        if self._terms is None:
            guess, predicted = np.zeros(features.shape[1]), by_start
        else:
            guess, predicted = self._terms, features @ self._terms
        # Errors are relative to the larger of the two times: one far too short weighs no more than one far too long.
        scale = np.maximum(seconds, predicted)
        error = np.abs(seconds - predicted) / scale
        weighted = features * (weights / (scale * scale * np.maximum(error / TOLERANCE, 1.0)))[:, None]
        return _nonnegative_least_squares(weighted.T @ features, weighted.T @ seconds, guess)


def _median(values: Array) -> float:
    """numpy's own imports its masked arrays when it is first called: 70 ms in the middle of serving."""
    ordered, count = np.sort(values), len(values)
    return float(ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def _shape(event: StepTimed) -> tuple[int, int, int, int, int] | None:
    """A step as prefill tokens, what they attended to, the pairs of both, decodes, and their context; `None` if its
    time or sums cannot be true."""
    tokens, decodes, context = event.new_tokens, event.decodes, event.context_tokens
    if not (SHORTEST <= event.seconds <= LONGEST and 0 <= decodes <= tokens and 0 < tokens <= context <= MOST_TOKENS):
        return None
    computed = tokens - decodes
    if not computed:
        return 0, 0, 0, decodes, context
    # A chunk of c tokens on s, beside decodes on d in all: context is s + d and pairs c s + d, which differ by
    # (c - 1) s. If pairs are not known, every request is taken to attend to equally many tokens.
    known = context < event.attended_pairs <= tokens * context
    if known and decodes and computed > 1:
        attended = (event.attended_pairs - context) // (computed - 1)
    else:
        attended = context // (decodes + 1)
    attended = min(max(attended, computed), context - decodes)
    pairs = event.attended_pairs - (context - attended) if known else computed * attended
    return computed, attended, pairs, decodes, context - attended


def _points(start: CostModel) -> list[tuple[float, ...]]:
    """Rows for steps of all sizes, as `start` would time them."""
    rows = [_row(start, 0, 0, 0, decodes, decodes * each) for decodes in (1, 8, 32, 128) for each in (128, 4096)]
    for decodes in (0, 32):
        for computed in (16, 128, 512, 2048):
            for cached in (0, 2048, 32768):
                attended = computed + cached
                rows.append(_row(start, computed, attended, computed * attended, decodes, decodes * 1024))
    return rows


def _row(
    start: CostModel,
    computed: int,
    attended: int,
    pairs: int,
    decodes: int,
    decode_context: int,
    seconds: float | None = None,
) -> tuple[float, ...]:
    """A step in numbers: what the prices multiply, its seconds (by default what `start` says), what `start` says."""
    by_start = start.step_seconds(((computed, attended),) if computed else (), decodes, decode_context)
    by_start = max(by_start, SHORTEST)
    return computed, attended, pairs, decodes, decode_context, by_start if seconds is None else seconds, by_start


def _table(rows: Sequence[tuple[float, ...]]) -> Array:
    """The steps with all that their terms multiply: float64 [steps, base terms + prices + 2], none negative."""
    steps = np.array(rows, dtype=np.float64)
    tokens = steps[:, 0] + steps[:, 3]
    ramps = np.maximum((tokens[:, None] - RAMP_STARTS) / RAMP_LENGTHS, 0.0)
    np.minimum(ramps[:, :-1], 1.0, out=ramps[:, :-1])
    return np.column_stack((np.ones(len(steps)), ramps, steps[:, 0] > 0, steps))


def _model(name: str, terms: Array) -> PiecewiseCost:
    """The cost model of these terms. No step of it is free, whatever timings led to them: callers may divide by it."""
    base = np.maximum(np.cumsum(terms[: len(KNOTS)]), SHORTEST).tolist()
    prices = dict(zip(PRICES, terms[len(KNOTS) :].tolist(), strict=True))
    return PiecewiseCost(name, KNOTS, base, **prices)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nonnegative_least_squares(gram: Array, moment: Array, guess: Array) -> Array:
    """The x >= 0 with the least x gram x - 2 x moment, by active sets (Lawson and Hanson), from a guess >= 0."""
    unit = np.sqrt(np.diagonal(gram))
    gram = gram / (unit[:, None] * unit) + 1e-9 * np.eye(len(unit))
    moment = moment / unit
    x = guess * unit
    free = x > 0
    for _ in range(3 * len(x)):
        while free.any():
            best = np.zeros_like(x)
            best[free] = np.linalg.solve(gram[free][:, free], moment[free])
            below = free & (best <= 0)
            if not below.any():
                x = best
                break
            # Go there as far as no number turns negative, and hold the first that would at 0.
            room = np.where(below, x / np.where(below, x - best, 1.0), np.inf)
            x = np.maximum(x + room.min() * (best - x), 0.0)
            free &= room > room.min()
            x[~free] = 0.0
        gain = np.where(free, 0.0, moment - gram @ x)
        if gain.max() <= 1e-9:
            break
        free[gain.argmax()] = True
    return x / unit
