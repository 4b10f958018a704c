"""Handbooks and questions: the oracle must be right itself."""

from __future__ import annotations

from itertools import islice
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.demo import Handbook, Question
from preble.demo.handbook import MOST_FACTS, UNKNOWN, Kind
from preble.demo.words import DOMAINS

ATTRIBUTES = sorted({attribute for domain in DOMAINS.values() for attribute in domain.attributes})
SEEDS = st.integers(0, 2**32)


@given(SEEDS, st.integers(1, MOST_FACTS), st.none() | st.sampled_from(ATTRIBUTES))
def test_a_handbook_says_each_thing_once(seed: int, facts: int, attribute: str | None) -> None:
    handbook = Handbook.generate(seed, facts, attribute=attribute)
    assert len(handbook.facts) == len(handbook.known) == facts
    assert handbook.text.count("\n") == facts + 1
    assert handbook == Handbook.generate(seed, facts, attribute=attribute)
    if attribute is not None:
        assert {fact.attribute for fact in handbook.facts} == {attribute}


def answer_by_reading(handbook: Handbook, question: Question) -> str:
    """The answer, from the text alone."""
    lines = dict(line.removeprefix("- ").split(": ") for line in handbook.text.splitlines()[1:])
    asked = question.text.removesuffix("?")
    if asked.count(" of ") == 1:
        return lines.get(asked, UNKNOWN)
    outer, inner = asked.split(" of ", 1)
    return f"{lines[inner]}: {lines[f'{outer} of {lines[inner]}']}"


@given(SEEDS, st.integers(120, 240))
def test_every_answer_stands_in_the_text(seed: int, facts: int) -> None:
    handbook = Handbook.generate(seed, facts)
    kinds = get_args(Kind)
    asked = list(islice(handbook.questions(seed, kinds), 40))
    assert {question.kind for question in asked} == set(kinds)
    for question in asked:
        assert question.answer == answer_by_reading(handbook, question)
        assert (question.answer == UNKNOWN) == (question.kind == "absent")


def test_an_answer_is_graded_exactly() -> None:
    question = Question("lookup", "badge of Rania Blake?", "9074")
    assert [question.is_answered_by(text) for text in (" 9074", "9074\n", "907", "90744", "9074 9074", "")] == [
        True,
        True,
        *[False] * 4,
    ]


def test_a_prompt_is_the_handbook_and_the_question() -> None:
    handbook = Handbook.generate(0, 2)
    question = next(handbook.questions(0))
    assert handbook.prompt(question) == f"{handbook.text}Q: {question.text}\nA:"
    assert [message["content"] for message in handbook.messages(question)] == [handbook.text, question.text]


def test_what_cannot_be_made_is_refused() -> None:
    for facts in (0, -1, MOST_FACTS + 1):
        with pytest.raises(ValueError, match=f"1 to {MOST_FACTS} facts, not {facts}"):
            Handbook.generate(0, facts)
    with pytest.raises(ValueError, match="nothing has the attribute 'colour'"):
        Handbook.generate(0, 4, attribute="colour")
    with pytest.raises(ValueError, match="no value of a fact"):
        next(Handbook.generate(0, 4, attribute="badge").questions(0, ("two facts",)))
