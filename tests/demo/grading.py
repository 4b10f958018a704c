"""Graded accuracy as an oracle: whatever is done to requests and KV pages, the built-in model's answers stay right.

The model looks every answer up in the handbook that stands in the prompt, so an answer is right only if the KV of the
page with that fact is. An exam therefore asks for something on every page.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice, takewhile
from operator import itemgetter
from typing import Any

import torch

from preble import Cluster, GenerationOutput, SamplingParams
from preble.demo import CHECKPOINT, Handbook, Question
from preble.demo.handbook import TITLE, lookup
from preble.engine.config import ModelConfig
from preble.engine.engine import Engine
from preble.engine.kv_cache import KVCache
from preble.engine.messages import Submit
from preble.engine.options import EngineOptions
from preble.engine.source import EngineSource
from preble.engine.tokenizer import Tokenizer

MODEL = "demo"
LONGEST_ANSWER = 12
"""Tokens; every right answer ends by itself before."""
GREEDY: dict[str, Any] = {"max_tokens": LONGEST_ANSWER, "temperature": 0.0}


class WrongAnswers(AssertionError):
    """Some answers are not those of the reference."""


@dataclass(frozen=True)
class Item:
    """A question about a handbook, and on which page its fact stands."""

    handbook: Handbook
    question: Question
    page: int

    @cached_property
    def prompt(self) -> str:
        return self.handbook.prompt(self.question)


Exam = Sequence[Item]


@cache
def handbook(number: int, facts: int = 60) -> Handbook:
    """Of some 520 tokens, or what `facts` makes of it."""
    return Handbook.generate(70 + number, facts)


@cache
def facts_by_page(handbook: Handbook, page_size: int) -> dict[int, Exam]:
    """A question for every fact, by the page on which its value begins; first those that lie furthest inside. What the
    model copies a value from is that value and the tokens right beside it."""
    found: dict[int, list[tuple[int, Item]]] = {}
    written = f"{TITLE}\n"
    for fact in handbook.facts:
        page, offset = divmod(tokens_of(written + fact.line.removesuffix(f" {fact.value}\n")), page_size)
        found.setdefault(page, []).append((-min(offset, page_size - 1 - offset), Item(handbook, lookup(fact), page)))
        written += fact.line
    return {page: [item for _, item in sorted(items, key=itemgetter(0))] for page, items in found.items()}


def is_known(item: Item) -> bool:
    """Whether the reference is right. What the model gets wrong by itself is no question to ask of an engine."""
    return item.question.is_answered_by(reference(item.prompt))


@cache
def exam(handbook: Handbook, page_size: int) -> Exam:
    """A question for every page on which a value begins."""
    best = (next(filter(is_known, items), None) for items in facts_by_page(handbook, page_size).values())
    return [item for item in best if item is not None]


@cache
def compositions(handbook: Handbook) -> Exam:
    """Questions about a fact that another one names, whose answers take several tokens, and about what is not there."""
    found: list[Item] = []
    for kind in ("two facts", "absent"):
        items = (Item(handbook, question, 0) for question in handbook.questions(0, (kind,)))
        found += islice(filter(is_known, items), 6)
    return found


@cache
def edited(handbook: Handbook, page_size: int) -> Exam:
    """For every page, a copy of the handbook in which one value there is another one, and the question for it: whoever
    reads the page of the original gives the old answer."""
    rng = random.Random(0)
    copies = []
    for item in exam(handbook, page_size):
        at = next(n for n, fact in enumerate(handbook.facts) if lookup(fact) == item.question)
        fact = handbook.facts[at]
        others = sorted({one.value for one in handbook.facts if one.attribute == fact.attribute} - {fact.value})
        changed = replace(fact, value=rng.choice(others))
        copy = Handbook((*handbook.facts[:at], changed, *handbook.facts[at + 1 :]))
        copies.append(Item(copy, lookup(changed), item.page))
    return [copy for copy in copies if is_known(copy)]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(CHECKPOINT)


def tokens_of(text: str) -> int:
    """How long a text is as the beginning of a prompt."""
    return len(tokenizer().encode(text))


@cache
def kv_memory(tokens: int) -> int:
    """Bytes for the KV of so many tokens, in float32."""
    config = ModelConfig.from_folder(CHECKPOINT)
    return tokens * KVCache.bytes_per_page(
        layers=config.layers,
        page_size=1,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
    )


@cache
def _transformers_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@cache
def reference(prompt: str) -> str:
    """What transformers generates, for this prompt alone: with no pages, no prefix of others and no batch."""
    ids = torch.tensor(tokenizer().encode(prompt), dtype=torch.int64)[None]
    with torch.inference_mode():
        output = _transformers_model().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LONGEST_ANSWER
        )
    return str(tokenizer().decode(output[0, ids.shape[1] :].tolist()))


def require_right(items: Exam, texts: Iterable[str]) -> None:
    """The oracle: every answer is, to the letter, what the reference says, which is right (`is_known`).

    Raises:
        WrongAnswers: names them.
    """
    answered = list(zip(items, texts, strict=True))
    wrong = [
        f"page {item.page}: {item.question.text} {text!r} instead of {reference(item.prompt)!r}"
        for item, text in answered
        if text != reference(item.prompt)
    ]
    if wrong:
        raise WrongAnswers(f"{len(wrong)} of {len(answered)} wrong:\n" + "\n".join(wrong))


def serving(**chosen: Any) -> Cluster:
    """A cluster of the built-in model, in threads of this process."""
    defaults = {"devices": ["cpu"], "workers": "thread", "dtype": "float32", "page_size": 16}
    return Cluster(MODEL, **(defaults | {"kv_memory": kv_memory(8192)} | chosen))


async def ask(cluster: Cluster, items: Exam, **terms: Any) -> list[GenerationOutput]:
    """Put all questions at once; the answers have to be right."""
    outputs = await cluster.generate_many([item.prompt for item in items], **(GREEDY | terms))
    require_right(items, [output.text for output in outputs])
    return outputs


class Desk:
    """One engine in the test's own thread, to which questions are put: what happens in which step is the test's to say.

    Args:
        pages: KV pages.
        chosen: `EngineOptions`.
    """

    def __init__(self, *, pages: int = 512, **chosen: Any) -> None:
        source = EngineSource(MODEL, EngineOptions(**({"dtype": "float32", "page_size": 16} | chosen)))
        self.engine: Engine = source.engine(0, "cpu", sharing=1, pages=pages)
        self.tokens: dict[str, list[int]] = {}
        """What has been generated, by request id."""

    def put(self, item: Item, *, ignore_eos: bool = False, **terms: Any) -> str:
        """Queue a request; returns its id."""
        name = str(len(self.tokens))
        tokens = tokenizer().encode(item.prompt)
        self.tokens[name] = []
        sampling = SamplingParams(**GREEDY, ignore_eos=ignore_eos)
        self.engine.submit(Submit(name, tokens, len(tokens), len(tokens) + LONGEST_ANSWER, sampling, seed=0, **terms))
        return name

    def step(self) -> None:
        with torch.inference_mode():
            for delta in self.engine.step().deltas:
                assert delta.error is None, delta.error
                self.tokens[delta.request_id] += delta.token_ids

    def text(self, name: str) -> str:
        """The answer: what was generated before the end of it, if the request was to go on behind that."""
        ends = tokenizer().eos_token_ids
        return tokenizer().decode(list(takewhile(lambda token: token not in ends, self.tokens[name])))

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def run_until(self, name: str, tokens: int) -> None:
        """Until so much of the answer is there."""
        while len(self.tokens[name]) < tokens:
            assert self.engine.has_work, "it ended before"
            self.step()

    def ask(self, items: Exam, **terms: Any) -> list[str]:
        """Put all questions at once, and wait for the answers."""
        names = [self.put(item, **terms) for item in items]
        self.finish()
        return [self.text(name) for name in names]

    def ask_in_turn(self, items: Exam, **terms: Any) -> list[str]:
        """Put one question after the other."""
        return [self.ask([item], **terms)[0] for item in items]
