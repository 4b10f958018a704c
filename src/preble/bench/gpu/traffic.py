"""The workloads of the cluster benchmark: prompts that share prefixes, and when they arrive. By seed, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preble.sched.hashing import Tokens

OUTPUTS = (16, 64)
"""Tokens that requests generate: from the first to the second."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how much it generates."""

    prompt: Tokens
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that begin with one of some texts, which are as popular as words of a language."""

    name: str
    texts: int
    text_tokens: tuple[int, int]
    """The length of a text: from, to."""
    own_tokens: tuple[int, int]
    """What a request has behind it: from, to."""
    zipf: float
    """The text of rank k is asked for in proportion to k ** -zipf."""

    def requests(self, count: int, *, vocabulary: int, seed: int) -> list[Request]:
        """The same for the same seed; the texts are the same for all seeds."""
        texts_source = np.random.default_rng([len(self.name), self.texts])
        texts = [
            texts_source.integers(vocabulary, size=length, dtype=np.int32)
            for length in texts_source.integers(*self.text_tokens, size=self.texts, endpoint=True)
        ]
        source = np.random.default_rng(seed)
        popularity = np.arange(1, self.texts + 1) ** -self.zipf
        ranks = source.choice(self.texts, count, p=popularity / popularity.sum())
        own = source.integers(*self.own_tokens, size=count, endpoint=True)
        outputs = source.integers(*OUTPUTS, size=count, endpoint=True)
        return [
            Request(np.concatenate([texts[rank], source.integers(vocabulary, size=length, dtype=np.int32)]), int(new))
            for rank, length, new in zip(ranks, own, outputs, strict=True)
        ]


TOOL_USE = Workload("tool use", texts=200, text_tokens=(1400, 1720), own_tokens=(220, 340), zipf=0.8)
"""The instructions and examples of one of many tools, then a task: 1.8k tokens, 85 % of them shared."""
LONG_DOCUMENTS = Workload("long documents", texts=32, text_tokens=(8000, 10_000), own_tokens=(30, 120), zipf=0.6)
"""One of some documents, then a question about it."""
TOY_TRAFFIC = Workload("tool use", texts=3, text_tokens=(64, 128), own_tokens=(4, 9), zipf=0.8)


def arrivals(count: int, rate: float, *, seed: int) -> NDArray[np.float64]:
    """When requests of a Poisson process of `rate` per second arrive, in seconds [count]."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum()
