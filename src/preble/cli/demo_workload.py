"""What the demo asks: graded questions about a few shared handbooks. The same every time."""

from __future__ import annotations

import random
from dataclasses import dataclass

from preble.demo import Handbook, Question
from preble.demo.handbook import Kind

KINDS: tuple[Kind, ...] = ("lookup", "absent", "two facts")
"""What is asked: the kinds of question that the built-in model was trained on."""
FACTS = (120, 220, 80, 180, 50, 150, 200, 100)
"""Lengths of the handbooks, the most popular one first: 440 to 1,950 tokens of the built-in model."""
SKEW = 0.8
"""The handbook of rank r is asked about r ** -SKEW times as often as the first."""
SAMPLE_FACTS = 120
"""Length of the handbook of the first few answers, which is none of the others."""
SHORTENINGS = (1, 2, 4, 8, 16, 32)
"""By how much handbooks are cut where a model's context is short."""


@dataclass(frozen=True)
class Task:
    """A question about a handbook."""

    rank: int
    """Which handbook, by popularity from 0."""
    handbook: Handbook
    question: Question

    @property
    def prompt(self) -> str:
        """The handbook and the question, as the model gets it."""
        return self.handbook.prompt(self.question)


@dataclass(frozen=True)
class Workload:
    """Handbooks, and what is asked about them, in order."""

    sample: Handbook
    """For the first few answers."""
    samples: tuple[Question, ...]
    """Two of the first kind and one of each other kind, about `sample`."""
    handbooks: tuple[Handbook, ...]
    """By popularity."""
    tasks: tuple[Task, ...]

    @classmethod
    def generate(cls, requests: int, shortening: int = 1) -> Workload:
        """A workload of so many tasks, of handbooks that have a `shortening`th of their facts."""
        rng = random.Random(0)
        handbooks = [Handbook.generate(rank, facts // shortening) for rank, facts in enumerate(FACTS)]
        asked = [handbook.questions(rank, _kinds_about(handbook)) for rank, handbook in enumerate(handbooks)]
        popularity = [(rank + 1) ** -SKEW for rank in range(len(FACTS))]
        ranks = rng.choices(range(len(FACTS)), popularity, k=requests)
        tasks = tuple(Task(rank, handbooks[rank], next(asked[rank])) for rank in ranks)
        sample = Handbook.generate(len(FACTS), SAMPLE_FACTS // shortening)
        first, *others = _kinds_about(sample)
        samples = [next(sample.questions(number, (kind,))) for number, kind in enumerate((first, first, *others))]
        return cls(sample, tuple(samples), tuple(handbooks), tasks)

    @property
    def longest_prompt(self) -> str:
        """Of all prompts that could be asked, about the longest."""
        handbook = max(self.handbooks, key=lambda handbook: len(handbook.text))
        return handbook.prompt(max((task.question for task in self.tasks), key=lambda question: len(question.text)))


def _kinds_about(handbook: Handbook) -> tuple[Kind, ...]:
    """The kinds that can be asked: in a short handbook perhaps no value of a fact is the subject of another."""
    try:
        next(handbook.questions(0, KINDS))
    except ValueError:
        return tuple(kind for kind in KINDS if kind != "two facts")
    return KINDS
