"""What the demo asks, and what it shows of it."""

from __future__ import annotations

from collections import Counter

import pytest

from preble.cli import demo_workload
from preble.cli.demo_answers import facts_behind
from preble.cli.demo_workload import FACTS, KINDS, Workload
from preble.demo import Handbook
from preble.demo.handbook import Kind


def test_it_is_the_same_every_time_and_longer_where_more_is_asked() -> None:
    short, long = Workload.generate(20), Workload.generate(300)
    assert long == Workload.generate(300)
    assert short.tasks == long.tasks[:20]
    assert short.handbooks == long.handbooks


def test_each_prompt_is_a_handbook_and_a_question_about_it() -> None:
    workload = Workload.generate(300)
    assert [len(handbook.facts) for handbook in workload.handbooks] == list(FACTS)
    assert len(set(workload.handbooks)) == len(FACTS)
    for task in workload.tasks:
        handbook = workload.handbooks[task.rank]
        assert task.handbook is handbook
        assert task.prompt == handbook.prompt(task.question)
        assert bool(facts_behind(task.question, handbook)) == (task.question.kind != "absent")
    asked = Counter(task.rank for task in workload.tasks)
    assert set(asked) == set(range(len(FACTS)))
    assert asked[0] > 2 * asked[len(FACTS) - 1]
    assert {task.question.kind for task in workload.tasks} == set(KINDS)
    assert len(workload.longest_prompt) >= max(len(task.prompt) for task in workload.tasks)


def test_the_samples_are_of_every_kind_about_a_handbook_of_their_own() -> None:
    workload = Workload.generate(1)
    assert [question.kind for question in workload.samples] == [KINDS[0], *KINDS]
    assert workload.sample not in workload.handbooks


@pytest.mark.parametrize("shortening", demo_workload.SHORTENINGS)
def test_a_shortened_workload_asks_what_can_be_asked(shortening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_workload, "KINDS", ("lookup", "absent", "two facts"))
    workload = Workload.generate(100, shortening)
    assert [len(handbook.facts) for handbook in workload.handbooks] == [facts // shortening for facts in FACTS]
    assert {task.question.kind for task in workload.tasks} >= {"lookup", "absent"}


@pytest.mark.parametrize(("kind", "facts"), [("lookup", 1), ("absent", 0), ("two facts", 2)])
def test_the_facts_behind_a_question(kind: Kind, facts: int) -> None:
    handbook = Handbook.generate(1, 120)
    questions = handbook.questions(2, (kind,))
    for _ in range(20):
        question = next(questions)
        found = facts_behind(question, handbook)
        assert len(found) == facts
        if found:
            assert question.answer.endswith(found[-1].value)
            assert all(fact in handbook.facts for fact in found)
