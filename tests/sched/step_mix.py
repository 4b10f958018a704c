"""Engine steps to try cost models on: made up, timed by a model, grown."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from hypothesis import strategies as st

from preble.sched import CostModel, StepTimed


class Step(NamedTuple):
    """The arguments of `CostModel.step_seconds`."""

    prefills: tuple[tuple[int, int], ...]
    decodes: int
    decode_context: int


def mixed_step(random: Random, chunks: int = 1) -> Step:
    """A third each: 1 to 64 decodes, prefill of 16 to 2,048 tokens on up to 32k cached ones, both together."""
    kind = random.randrange(3)
    prefills = []
    for _ in range(chunks if kind else 0):
        new = int(2 ** random.uniform(4, 11))
        cached = 0 if random.random() < 0.4 else int(2 ** random.uniform(5, 15))
        prefills.append((new, new + cached))
    decodes = random.randint(1, 64) if kind != 1 else 0
    return Step(tuple(prefills), decodes, sum(int(2 ** random.uniform(5, 13)) for _ in range(decodes)))


def timed(step: Step, seconds: float, *, pairs_known: bool = True) -> StepTimed:
    """What a replica reports of the step."""
    prefills, decodes, decode_context = step
    return StepTimed(
        replica=0,
        new_tokens=sum(new for new, _ in prefills) + decodes,
        decodes=decodes,
        context_tokens=sum(attended for _, attended in prefills) + decode_context,
        seconds=seconds,
        attended_pairs=pairs_known * (sum(new * attended for new, attended in prefills) + decode_context),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Steps of any size, small ones and those around 2^20 pairs more often than chance would have them."""
    tokens = st.one_of(st.integers(1, 600), st.integers(1, 5000), st.sampled_from([64, 192, 256, 384, 1024]))
    prefills = [
        (new, new + draw(st.one_of(st.integers(0, 2000), st.just(max(0, 2**20 // new - new)), st.integers(0, 100_000))))
        for new in draw(st.lists(tokens, max_size=4))
    ]
    decodes = draw(st.integers(0, 300))
    return Step(tuple(prefills), decodes, draw(st.integers(decodes, 10_000 + decodes)) if decodes else 0)


@st.composite
def growing_steps(draw: st.DrawFn) -> tuple[Step, Step]:
    """A step, and one with a single argument larger."""
    step = draw(steps())
    prefills, decodes, context = step
    by = draw(st.one_of(st.integers(1, 3), st.integers(1, 1000)))
    ways = [
        Step(prefills, decodes, context + by) if decodes else step,
        Step(prefills, decodes + by, context + by),
        Step((*prefills, (by, by)), decodes, context),
    ]
    if prefills:
        place = draw(st.integers(0, len(prefills) - 1))
        new, attended = prefills[place]
        for chunk in ((new, attended + by), (new + by, attended + by), (min(new + by, attended), attended)):
            ways.append(Step((*prefills[:place], chunk, *prefills[place + 1 :]), decodes, context))
    return step, draw(st.sampled_from(ways))


def check_growth(model: CostModel, small: Step, large: Step) -> None:
    """No time is negative, and none falls with the growing argument; alone in a step, work costs the same."""
    before, after = model.step_seconds(*small), model.step_seconds(*large)
    assert 0 <= before <= after < float("inf")
    assert model.step_seconds((), 0, 0) == model.prefill_seconds(0) == model.prefill_seconds(0, 9) == 0
    assert model.decode_seconds(0, 0) == 0
    prefill_before = [model.prefill_seconds(new, attended - new) for new, attended in small.prefills]
    prefill_after = [model.prefill_seconds(new, attended - new) for new, attended in large.prefills]
    assert all(0 < a <= b for a, b in zip(prefill_before, prefill_after, strict=False))
    assert model.decode_seconds(*small[1:]) <= model.decode_seconds(*large[1:])
    for chunk, seconds in zip(small.prefills, prefill_before, strict=True):
        assert abs(seconds - model.step_seconds((chunk,), 0, 0)) <= 1e-12 * seconds
    assert abs(model.decode_seconds(*small[1:]) - model.step_seconds((), *small[1:])) <= 1e-12 * before
