"""The requests that the chaos tests make, and what comes of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from preble import Cluster
from preble.outputs import Chunk, GenerationOutput
from preble.stream import Stream

PREFIXES = (
    "",
    "You are a helpful assistant. ",
    "You are a helpful assistant. Answer briefly and to the point, in one sentence. ",
    "Translate the following into French, and mind the accents: ",
    "The quick brown fox jumps over the lazy dog and goes on to say that there is nothing new under the sun, but ",
)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},  # the seed comes from the request's id
    {"temperature": 0.8, "top_p": 0.9, "seeded": True},
    {"temperature": 1.2, "top_k": 40, "seeded": True, "stop": ["a", "e", "zq"], "min_tokens": 3},
    {"temperature": 1.0, "seeded": True, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.7, "seeded": True, "logprobs": 3},
    {"temperature": 1.0, "seeded": True, "n": 2},
    {"temperature": 0.0, "presence_penalty": 1.0, "stop": ["t", "\n"], "logprobs": 0},
)


@dataclass(frozen=True)
class Case:
    """A request that gives the same output whenever it is made."""

    name: str
    prompt: str
    chat: bool
    streamed: bool
    options: dict[str, Any]

    def stream(self, cluster: Cluster) -> Stream:
        if self.chat:
            messages = [{"role": "user", "content": self.prompt}]
            return cluster.stream_chat(messages, request_id=self.name, **self.options)
        return cluster.stream(self.prompt, request_id=self.name, **self.options)


@dataclass
class Text:
    """One continuation, put together from the chunks of a stream, or as an output gives it."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        assert self.finish_reason is None, "the last chunk was not the last"
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += [(one.token_id, one.logprob) for one in chunk.logprobs]
        self.finish_reason = chunk.finish_reason


def make_cases(count: int, seed: int) -> list[Case]:
    """Prompts of 1 to 180 tokens, many of which share prefixes, and 5 to 60 tokens of output, or fewer."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        options = dict(KINDS[number % len(KINDS)]) | {
            "max_tokens": rng.randint(5, 60),
            "ignore_eos": rng.random() < 0.8,
        }
        if options.pop("seeded", False):
            options["seed"] = rng.randrange(1 << 40)
        words = "".join(rng.choices("abcdefghij klmnop qrstuvwxyz éß€", k=rng.randint(1, 50)))
        cases.append(
            Case(f"case {number}", rng.choice(PREFIXES) + words, rng.random() < 0.2, rng.random() < 0.8, options)
        )
    return cases


async def texts_of(case: Case, cluster: Cluster) -> list[Text]:
    """Make the request, and put together what it gives, chunk by chunk where it is a streamed one."""
    stream = case.stream(cluster)
    if not case.streamed:
        return completions(await stream.finish())
    texts = [Text() for _ in range(case.options.get("n", 1))]
    async for chunk in stream:
        texts[chunk.index].add(chunk)
    require_same(case, texts, completions(stream.output))
    return texts


async def begin(case: Case, cluster: Cluster, *, chunks: int) -> None:
    """Make the request, and leave it after some chunks."""
    async with case.stream(cluster) as stream:
        async for _ in stream:
            chunks -= 1
            if chunks < 0:
                return


def completions(output: GenerationOutput) -> list[Text]:
    return [
        Text(one.text, one.token_ids, [(other.token_id, other.logprob) for other in one.logprobs], one.finish_reason)
        for one in output.completions
    ]


def require_same(case: Case, got: list[Text], expected: list[Text]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason), case
        assert [token for token, _ in one.logprobs] == [token for token, _ in other.logprobs], case
        # A resumed request computes in other batches: the last bits may differ.
        assert [value for _, value in one.logprobs] == pytest.approx([value for _, value in other.logprobs], abs=1e-4)
