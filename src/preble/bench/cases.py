"""What is measured: cases, the goals they stand for, and rates read off a trace."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from preble.bench.peers.worker import Trace, Work

PROMPT_TOKENS = 128
NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that start together; each is `shared` common and `own` further prompt tokens and `new_tokens` out."""

    requests: int
    own: int
    new_tokens: int
    shared: int = 0

    def work(self, vocabulary: int, seed: str) -> Work:
        """The same prompts for the same seed, and with another seed not one prefix in common with them."""
        source = random.Random(seed)
        prefix = [source.randrange(vocabulary) for _ in range(self.shared)]
        prompts = [prefix + [source.randrange(vocabulary) for _ in range(self.own)] for _ in range(self.requests)]
        return Work(prompts, self.new_tokens, self.shared)

    def smaller(self) -> Case:
        """A quarter of everything, for a quick look."""
        return replace(
            self,
            requests=-(-self.requests // 4),
            own=self.own // 4,
            new_tokens=self.new_tokens // 4,
            shared=self.shared // 4,
        )


ONE = Case(1, PROMPT_TOKENS, NEW_TOKENS)
EIGHT = Case(8, PROMPT_TOKENS, NEW_TOKENS)
SHARED = Case(32, own=20, new_tokens=16, shared=2000)


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of a case, in tokens per second, and how many times a peer's it should be."""

    label: str
    case: Case
    decode_only: bool
    goals: Mapping[str, float] = field(default_factory=dict)
    """Peer -> least ratio of Preble's rate to the peer's."""

    def rate(self, trace: Trace) -> float:
        """Generated tokens per second."""
        return decode_rate(trace) if self.decode_only else end_to_end_rate(trace)


def measures(shape: str) -> list[Measure]:
    """What to measure for a shape: the small ones are bound by memory and overhead, so llama.cpp sets their goals."""
    if shape == "2048x6":
        return [
            Measure("1 request, decode", ONE, True, {"hf": 2.0}),
            Measure("8 requests, decode", EIGHT, True, {"hf": 2.0}),
            Measure("8 requests, end to end", EIGHT, False, {"hf": 2.0}),
            Measure("32 requests share 2,000 tokens, end to end", SHARED, False, {"hf": 6.0}),
        ]
    return [
        Measure("1 request, decode", ONE, True, {"llama.cpp": 1.0}),
        Measure("8 requests, decode", EIGHT, True, {"llama.cpp": 1.1}),
        Measure("8 requests, end to end", EIGHT, False),
    ]


def decode_rate(trace: Trace) -> float:
    """Tokens per second while every request decodes: from the last request's first token to the first one's end."""
    start = max(arrivals[0] for arrivals in trace.arrivals)
    end = min(arrivals[-1] for arrivals in trace.arrivals)
    if end <= start:
        raise ValueError("no time in which all requests decode: the case generates too few tokens")
    return sum(start < when <= end for arrivals in trace.arrivals for when in arrivals) / (end - start)


def end_to_end_rate(trace: Trace) -> float:
    """Generated tokens per second from the start to the last token, prompts included in the time."""
    tokens = sum(len(arrivals) for arrivals in trace.arrivals)
    return tokens / (max(arrivals[-1] for arrivals in trace.arrivals) - trace.began)


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """Fraction of requests whose first generated token is the reference's.

    Later tokens of a random model part ways at the first near tie that bf16 rounds differently.
    """
    equal = sum(ours[0] == theirs[0] for ours, theirs in zip(tokens, reference, strict=True))
    return equal / len(reference)
