"""Prompts to schedule: shared prefixes as popular as words of a language, or no prefix in common at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from preble.sched.hashing import Tokens

VOCABULARY = 32_000
ZIPF = 1.1
"""Exponent of the prefixes' popularity: the one of rank k is used in proportion to k ** -ZIPF."""
DRAWN_AT_ONCE = 4096
TEXT = 1 << 20
"""Tokens of the text that distinct prompts are windows of."""
STRIDE = 7919
"""Tokens from one distinct prompt's window to the next one's; a prime, so that windows hardly ever recur."""
STAMP = 2
"""Tokens at the front of a distinct prompt that say its number."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of one length that begin with one of `prefixes` texts."""

    name: str
    prompt_tokens: int
    prefixes: int
    goal: float
    """Whole decisions per second that the scheduler should make."""
    shared: float = 0.85
    """Fraction of a prompt that is its prefix."""

    @property
    def shared_tokens(self) -> int:
        """Length of a prefix."""
        return int(self.prompt_tokens * self.shared)

    def prompts(self, seed: int) -> Iterator[Tokens]:
        """Endless prompts, int32 [prompt_tokens], the same for the same seed."""
        source = np.random.default_rng(seed)
        prefixes = source.integers(VOCABULARY, size=(self.prefixes, self.shared_tokens), dtype=np.int32)
        popularity = np.arange(1, self.prefixes + 1) ** -ZIPF
        popularity /= popularity.sum()
        own = self.prompt_tokens - self.shared_tokens
        while True:
            for rank in source.choice(self.prefixes, DRAWN_AT_ONCE, p=popularity):
                yield np.concatenate((prefixes[rank], source.integers(VOCABULARY, size=own, dtype=np.int32)))


TOOL_USE = Workload("tool use", 1_835, 1_000, goal=15_000)
WORKLOADS = (
    TOOL_USE,
    Workload("10k-token prompts", 10_000, 200, 8_000),
    Workload("32k-token prompts", 32_000, 50, 4_000),
)


def distinct_prompts(prompt_tokens: int, seed: int) -> Iterator[Tokens]:
    """Up to VOCABULARY ** STAMP prompts, int32 [prompt_tokens], that differ from their first page on: windows of one
    random text that start with the prompt's number."""
    text = np.random.default_rng(seed).integers(VOCABULARY, size=TEXT, dtype=np.int32)
    starts = len(text) - prompt_tokens
    for number in range(VOCABULARY**STAMP):
        start = number * STRIDE % starts
        prompt = text[start : start + prompt_tokens].copy()
        prompt[:STAMP] = divmod(number, VOCABULARY)
        yield prompt
