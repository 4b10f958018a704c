"""Handbooks of facts and questions about them, with the answers: what the built-in model is trained and graded on.

A handbook is what real prompts share: a table of people, tools and stock. It looks like this, and a question follows:

    Handbook
    - badge of Rania Blake: 9074
    - output of fetch_letter: address
    - keeper of dusty ladder: Rania Blake
    Q: badge of Rania Blake?
    A: 9074
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from preble.demo.words import DOMAINS, PERSON, Domain

Kind: TypeAlias = Literal["lookup", "absent", "two facts"]

TITLE = "Handbook"
UNKNOWN = "unknown"
"""The answer to a question about what is not in the handbook."""
MOST_FACTS = 400


@dataclass(frozen=True)
class Fact:
    """One line: an attribute of a subject has a value."""

    attribute: str
    """What is said of the subject: its badge, its output, its keeper."""
    subject: str
    """A person, a tool or a thing in stock."""
    value: str
    """What it is; the answer to a question about this fact."""

    @property
    def line(self) -> str:
        """As it stands in a handbook."""
        return f"- {self.attribute} of {self.subject}: {self.value}\n"


@dataclass(frozen=True)
class Question:
    """A question with the one answer that is right."""

    kind: Kind
    """Asks for a fact, for something that is not there, or for a fact about the value of another fact."""
    text: str
    """As it is asked, with its question mark."""
    answer: str
    """The one text that is right."""

    def is_answered_by(self, text: str) -> bool:
        """Whether a generated text is the answer, exactly but for the space around it."""
        return text.strip() == self.answer


@dataclass(frozen=True)
class Handbook:
    """Facts in the order in which they are listed."""

    facts: tuple[Fact, ...]
    """One for each line."""

    @classmethod
    def generate(cls, seed: int, facts: int = 60, *, attribute: str | None = None) -> Handbook:
        """A handbook like no other: the same for the same arguments, on every machine.

        Args:
            seed: chooses the names and values.
            facts: how many, 1 to 400. Each is some 9 tokens of the built-in model.
            attribute: list this attribute only, so that nothing but a subject's name tells two facts apart.

        Raises:
            ValueError: `facts` is out of range, or no subject has such an attribute.
        """
        if not 1 <= facts <= MOST_FACTS:
            raise ValueError(f"a handbook has 1 to {MOST_FACTS} facts, not {facts}")
        domains = [domain for domain in DOMAINS.values() if attribute is None or attribute in domain.attributes]
        if not domains:
            raise ValueError(f"nothing has the attribute {attribute!r}")
        rng = random.Random(seed)
        found: dict[tuple[str, str], Fact] = {}
        people = [_subject(rng, DOMAINS["people"]) for _ in range(max(facts // 8, 1))]
        while len(found) < facts:
            domain = rng.choice(domains)
            subject = rng.choice(people) if domain is DOMAINS["people"] and rng.random() < 0.5 else None
            subject = subject or _subject(rng, domain)
            names = [attribute] if attribute else rng.sample(sorted(domain.attributes), rng.choice((1, 1, 2, 3)))
            for name in names:
                if (name, subject) not in found and len(found) < facts:
                    found[name, subject] = Fact(name, subject, _value(rng, domain.attributes[name]))
        # Whoever keeps something is somebody of whom more is said, where anybody is.
        described = sorted({fact.subject for fact in found.values() if fact.attribute in DOMAINS["people"].attributes})
        listed = [
            Fact(fact.attribute, fact.subject, rng.choice(described or people)) if fact.value == PERSON else fact
            for fact in found.values()
        ]
        rng.shuffle(listed)
        return cls(tuple(listed))

    @cached_property
    def text(self) -> str:
        """The handbook as it stands in a prompt, with a line's end after each fact."""
        return f"{TITLE}\n" + "".join(fact.line for fact in self.facts)

    @cached_property
    def known(self) -> dict[tuple[str, str], str]:
        """The value of each (attribute, subject)."""
        return {(fact.attribute, fact.subject): fact.value for fact in self.facts}

    def prompt(self, question: Question) -> str:
        """The text that the built-in model continues with the answer."""
        return f"{self.text}Q: {question.text}\nA:"

    def messages(self, question: Question) -> list[dict[str, str]]:
        """The same as a chat: the handbook is the system's message. The chat template lays it out as `prompt` does."""
        return [{"role": "system", "content": self.text}, {"role": "user", "content": question.text}]

    def questions(self, seed: int, kinds: tuple[Kind, ...] = ("lookup",)) -> Iterator[Question]:
        """Questions without end, each of a random one of these kinds. The same for the same arguments.

        Raises:
            ValueError: nothing in this handbook can be asked in one of these ways.
        """
        rng = random.Random(f"questions {seed}")
        if "two facts" in kinds and not self.pairs:
            raise ValueError("no value of a fact in this handbook is the subject of another one")
        while True:
            kind = rng.choice(kinds)
            if kind == "lookup":
                yield lookup(rng.choice(self.facts))
            elif kind == "absent":
                yield self._absent(rng)
            else:
                yield two_facts(*rng.choice(self.pairs))

    @cached_property
    def pairs(self) -> list[tuple[Fact, Fact]]:
        """Facts whose value is the subject of another, with that other: what "two facts" asks about."""
        by_subject: dict[str, list[Fact]] = {}
        for fact in self.facts:
            by_subject.setdefault(fact.subject, []).append(fact)
        return [(first, second) for first in self.facts for second in by_subject.get(first.value, ())]

    def _absent(self, rng: random.Random) -> Question:
        """About a stranger, about one who has half of the name of somebody listed, or about what is not said of
        somebody."""
        while True:
            fact = rng.choice(self.facts)
            domain = next(domain for domain in DOMAINS.values() if fact.attribute in domain.attributes)
            case = rng.randrange(3)
            if case == 0:
                domain = rng.choice(list(DOMAINS.values()))
                subject = _subject(rng, domain)
            elif case == 1:
                first, second = fact.subject.split(domain.joint)
                kept = rng.random() < 0.5
                subject = domain.joint.join(
                    (first if kept else rng.choice(domain.first), rng.choice(domain.second) if kept else second)
                )
            else:
                subject = fact.subject
            attribute = fact.attribute if case == 1 else rng.choice(sorted(domain.attributes))
            if (attribute, subject) not in self.known:
                return Question("absent", f"{attribute} of {subject}?", UNKNOWN)


def lookup(fact: Fact) -> Question:
    """What a fact answers."""
    return Question("lookup", f"{fact.attribute} of {fact.subject}?", fact.value)


def two_facts(first: Fact, second: Fact) -> Question:
    """A question that names the first fact and asks for the second. The answer spells out both steps."""
    text = f"{second.attribute} of {first.attribute} of {first.subject}?"
    return Question("two facts", text, f"{first.value}: {second.value}")


def _subject(rng: random.Random, domain: Domain) -> str:
    return rng.choice(domain.first) + domain.joint + rng.choice(domain.second)


def _value(rng: random.Random, values: tuple[str, ...] | int | str) -> str:
    if isinstance(values, int):
        return "".join(rng.choice("0123456789") for _ in range(values))
    return values if isinstance(values, str) else rng.choice(values)
