"""How exact a checkpoint answers, per kind of question and length of handbook, computed by transformers."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaForCausalLM

from preble.demo import Handbook, Question
from preble.demo.handbook import Kind
from tools.demo_model.rows import ATTRIBUTES
from tools.demo_model.vocabulary import EOS

ROWS: dict[str, tuple[Kind, bool]] = {
    "lookup": ("lookup", False),
    "lookup, one attribute": ("lookup", True),
    "absent": ("absent", False),
    "absent, one attribute": ("absent", True),
    "two facts": ("two facts", False),
}
"""What is measured, by its name: the kind of question, and whether the handbook lists one attribute only."""
ANY, LONGEST = 8.4, 9.0
"""Tokens per fact: of handbooks with all attributes, and at most of those with one."""


def evaluate(folder: Path, lengths: list[int], handbooks: int, questions: int) -> None:
    """Print the share of exact answers, in float32 and in bfloat16.

    Args:
        folder: the checkpoint.
        lengths: of the handbooks, in tokens. Those generated come close to it.
        handbooks: how many of each length, none of which was trained on: seeds of training have 62 random bits.
        questions: how many per handbook, each by itself right after the handbook.
    """
    torch.set_num_threads(1)
    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train(False)
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for dtype in (torch.float32, torch.bfloat16):
        network.to(dtype)
        print(f"\n| tokens of the handbook, {dtype} |", *(f"{length:,} |" for length in lengths))
        print("|---|", *("---: |" for _ in lengths))
        for name, (kind, one_attribute) in ROWS.items():
            print(f"| {name} |", end="")
            for length in lengths:
                exact = []
                for number in range(handbooks):
                    handbook = _handbook(number, length, one_attribute)
                    if kind != "two facts" or handbook.pairs:
                        asked = list(islice(handbook.questions(number, (kind,)), questions))
                        exact += exact_answers(network, tokenizer, handbook, asked)
                print(f" {_share(exact)} |", end="", flush=True)
            print()
        print("| 12 in a row, all kinds |", end="")
        for length in lengths:
            print(f" {_share(_in_a_row(network, tokenizer, length, handbooks))} |", end="", flush=True)
        print()


@torch.no_grad()
def exact_answers(
    network: LlamaForCausalLM, tokenizer: Tokenizer, handbook: Handbook, questions: list[Question]
) -> list[bool]:
    """Whether greedy decoding gives exactly the answer and ends, for each question by itself after the handbook.

    The handbook is computed once. All tokens of all answers are predicted in one pass from the right ones before them:
    greedy decoding is exact if, and only if, all of these are right.
    """
    cache = DynamicCache(config=network.config)
    network.model(torch.tensor([tokenizer.encode(handbook.text).ids]), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(questions))
    asked = [_tokens(tokenizer, question) for question in questions]
    longest = max(len(prompt) + len(answer) for prompt, answer in asked)
    rows = [(prompt + answer + [0] * longest)[:longest] for prompt, answer in asked]
    guesses = network(torch.tensor(rows), past_key_values=cache, use_cache=True).logits.argmax(-1)
    return [
        guess[len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist() == answer
        for guess, (prompt, answer) in zip(guesses, asked, strict=True)
    ]


@torch.no_grad()
def _in_a_row(network: LlamaForCausalLM, tokenizer: Tokenizer, length: int, handbooks: int) -> list[bool]:
    """The same for questions that follow one another in a chat, each answered right before the next is asked."""
    exact = []
    for number in range(handbooks):
        handbook = _handbook(number, length - 12 * 16, one_attribute=False)
        kinds: tuple[Kind, ...] = ("lookup", "absent", "two facts") if handbook.pairs else ("lookup", "absent")
        tokens = list(tokenizer.encode(handbook.text).ids)
        answers = []
        for question in islice(handbook.questions(number, kinds), 12):
            prompt, answer = _tokens(tokenizer, question)
            tokens += prompt
            answers.append((len(tokens) - 1, answer))
            tokens += [*answer, *tokenizer.encode("\n", add_special_tokens=False).ids]
        guess = network(torch.tensor([tokens]), use_cache=False).logits[0].argmax(-1)
        exact += [guess[begin : begin + len(answer)].tolist() == answer for begin, answer in answers]
    return exact


def _handbook(number: int, length: int, one_attribute: bool) -> Handbook:
    attribute = random.Random(number).choice(ATTRIBUTES) if one_attribute else None
    return Handbook.generate(number, max(int(length / (LONGEST if one_attribute else ANY)), 3), attribute=attribute)


def _tokens(tokenizer: Tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """A question's tokens up to the answer, and the answer's with the end."""
    prompt = tokenizer.encode(f"Q: {question.text}\nA:", add_special_tokens=False).ids
    answer = tokenizer.encode(f" {question.answer}{EOS}", add_special_tokens=False).ids
    return prompt, answer


def _share(exact: list[bool]) -> str:
    return f"{100 * sum(exact) / len(exact):.2f} % of {len(exact):,}" if exact else "none"
