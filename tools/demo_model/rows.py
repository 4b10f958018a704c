"""Training rows: a handbook, then questions about it with their answers, until the row is full."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

import torch
from tokenizers import Tokenizer

from preble.demo import Handbook, Question
from preble.demo.handbook import Kind
from preble.demo.words import DOMAINS, PERSON
from tools.demo_model.curriculum import Level
from tools.demo_model.vocabulary import EOS, build_tokenizer

LONGEST_ROW = 3072
"""Tokens of a training row at most, and the longest prompt with its answer that the model is made for."""
TOKENS_PER_FACT = 9
"""The most, with the line's end. Fewer where a value is one word."""
LONG_VALUES = [
    attribute for domain in DOMAINS.values() for attribute, values in domain.attributes.items() if values in (4, PERSON)
]
"""Attributes whose values have two tokens: four digits, or a person's name."""
KINDS: tuple[Kind, ...] = get_args(Kind)
ATTRIBUTES = sorted({attribute for domain in DOMAINS.values() for attribute in domain.attributes})


@dataclass(frozen=True)
class Batch:
    """Rows of one length, and what is to be predicted in them."""

    tokens: torch.Tensor
    """Token ids, int64 [rows, length]."""
    places: torch.Tensor
    """Positions in the flattened `tokens` whose next token is one of an answer, int64 [N]."""
    targets: torch.Tensor
    """That next token, int64 [N]."""
    kinds: torch.Tensor
    """The index in `KINDS` of the question that each of them answers, int64 [N]; -1 at the end of an answer."""


class RowMaker:
    """Makes batches from a seed, without end."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"rows {seed}")
        tokenizer = build_tokenizer()
        (self._eos,) = tokenizer.encode(EOS, add_special_tokens=False).ids
        self._encode = lru_cache(maxsize=1 << 16)(lambda text: _encoded(tokenizer, text))
        """Texts are encoded in fragments that are seen again and again: facts share none, their words do."""

    def batch(self, facts: int, level: Level) -> Batch:
        """As many rows as make up the level's tokens for a step, each with another handbook of `facts` facts."""
        length = row_length(facts)
        rows, places, targets, kinds = [], [], [], []
        for row in range(max(level.tokens // length, 1)):
            tokens, answers = self._row(facts, length, level)
            rows.append(tokens[:length])
            for begin, end, kind in answers:
                for place in range(begin, min(end, length)):
                    places.append(row * length + place)
                    targets.append(tokens[place + 1])
                    kinds.append(-1 if tokens[place + 1] == self._eos else KINDS.index(kind))
        return Batch(torch.tensor(rows), torch.tensor(places), torch.tensor(targets), torch.tensor(kinds))

    def _row(self, facts: int, length: int, level: Level) -> tuple[list[int], list[tuple[int, int, Kind]]]:
        """More than `length` tokens, and per answer the range of positions whose next token is supervised."""
        rng = self._rng
        handbook = self._handbook(facts, level)
        tokens = list(self._encode(""))
        for line in handbook.text.splitlines(keepends=True):
            tokens += self._encode(line)[1:]
        answers: list[tuple[int, int, Kind]] = []
        for question in self._questions(handbook, level):
            plain = rng.random() < level.plain
            tokens += self._encode(f"Q {question.text[:-1]}:" if plain else f"Q: {question.text}\nA:")[1:]
            answer = [*self._encode(f" {question.answer}")[1:], self._eos]
            answers.append((len(tokens) - 1, len(tokens) - 1 + len(answer), question.kind))
            tokens += [*answer, *self._encode("\n")[1:]]
            if len(tokens) > length:
                break
        return tokens, answers

    def _handbook(self, facts: int, level: Level) -> Handbook:
        seed, (variant,) = (
            self._rng.getrandbits(62),
            self._rng.choices(
                ("any", "one attribute", "alike"),
                (1 - level.one_attribute - level.alike, level.one_attribute, level.alike),
            ),
        )
        if variant == "any":
            return Handbook.generate(seed, facts)
        if variant == "one attribute":
            return Handbook.generate(seed, facts, attribute=self._rng.choice(ATTRIBUTES))
        attribute = self._rng.choice(LONG_VALUES)
        handbook = Handbook.generate(seed, facts, attribute=attribute)
        halves = [_halves(fact.value) for fact in handbook.facts]
        few = self._rng.sample([first for first, _ in halves], min(self._rng.randint(1, 6), facts))
        return Handbook(
            tuple(
                replace(fact, value=self._rng.choice(few) + second)
                for fact, (_, second) in zip(handbook.facts, halves, strict=True)
            )
        )

    def _questions(self, handbook: Handbook, level: Level) -> Iterator[Question]:
        shares: dict[Kind, float] = {"absent": level.absent, "two facts": level.two_facts if handbook.pairs else 0}
        shares["lookup"] = 1 - sum(shares.values())
        asked = {
            kind: handbook.questions(self._rng.getrandbits(62), (kind,)) for kind, share in shares.items() if share
        }
        kinds: Sequence[Kind] = list(asked)
        while True:
            yield next(asked[self._rng.choices(kinds, [shares[kind] for kind in kinds])[0]])


def row_length(facts: int) -> int:
    """Tokens of a row: the handbook, and room for 3 to 35 questions."""
    return min(TOKENS_PER_FACT * facts + 8 + min(max(12 * facts, 48), 512), LONGEST_ROW)


def _halves(value: str) -> tuple[str, str]:
    """The texts of the two tokens of a value."""
    at = value.index(" ") if " " in value else 2
    return value[:at], value[at:]


def _encoded(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    return tuple(tokenizer.encode(text).ids)
