"""Chance: lengths within their bounds and of the mean asked for, and parts that do not move each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble.sim.workloads.conversation import Conversation
from preble.sim.workloads.draws import Draws, Skewed
from preble.sim.workloads.prompts import Segment


def draws(seed: int = 0, prefixes: int = 50, popularity: float = 1.1) -> Draws:
    return Draws(np.random.SeedSequence(seed), prefixes, popularity)


def test_drawn_lengths_have_the_mean_asked_for_and_more_below_it_than_above() -> None:
    lengths = Skewed(200, 0.8, 1, 100_000)
    generator = np.random.default_rng(1)
    found = np.array([lengths.draw_tokens(generator) for _ in range(20_000)])
    assert found.mean() == pytest.approx(200, rel=0.03)
    assert np.log(found).std() == pytest.approx(0.8, rel=0.03)
    assert (found < 200).mean() > 0.6


@given(st.integers(0, 1_000))
@settings(max_examples=25, deadline=None)
def test_lengths_stay_within_their_bounds(seed: int) -> None:
    lengths = Skewed(100, 1.5, 40, 180)
    generator = np.random.default_rng(seed)
    drawn = [lengths.draw_tokens(generator) for _ in range(50)]
    spread = lengths.spread(np.full(50, 0.02), generator)
    assert min(drawn + spread) >= 40
    assert max(drawn + spread) <= 180


@given(st.integers(0, 1_000), st.sampled_from([0.0, 1.1, 1.5]), st.integers(20, 200))
@settings(max_examples=25, deadline=None)
def test_the_mean_over_requests_does_not_hang_on_a_seed(seed: int, popularity: float, prefixes: int) -> None:
    made = draws(seed, prefixes, popularity)
    lengths = made.lengths(Skewed(10_000, 0.6, 100, 100_000))
    assert float(np.array(lengths) @ made.weights) == pytest.approx(10_000, rel=0.06)
    assert len(set(lengths)) == prefixes


def test_one_prefix_has_the_mean_length() -> None:
    assert draws(prefixes=1).lengths(Skewed(500, 1.0, 1, 5_000)) == [500]


def test_parts_do_not_move_each_other() -> None:
    plain, busy = draws(), draws()
    busy.lengths(Skewed(100, 0.5, 1, 1_000))
    busy.sessions.random(1_000)
    assert [plain.prefix() for _ in range(200)] == [busy.prefix() for _ in range(200)]
    assert plain.sessions.random() != busy.sessions.random()


def test_chosen_prefixes_follow_the_weights() -> None:
    made = draws(prefixes=8)
    found = np.bincount([made.prefix() for _ in range(20_000)], minlength=8) / 20_000
    assert made.weights.sum() == pytest.approx(1)
    assert np.abs(found - made.weights).max() < 0.015
    assert made.weights[0] / made.weights[3] == pytest.approx(4**1.1)


def test_a_conversation_ends_before_its_context_is_full() -> None:
    ten = Skewed(10, 0, 10, 10)
    talk = Conversation(opening=ten, answer=ten, message=ten, pause=ten, turns=Skewed(50, 0, 50, 50), context=100)
    turns = talk.session(7, (Segment("system", 40),), np.random.default_rng(0)).turns
    assert [turn.path for turn in turns] == [(Segment("system", 40), Segment(7, own)) for own in (10, 30, 50)]
    assert {(turn.output_tokens, turn.think) for turn in turns} == {(10, 10.0)}
