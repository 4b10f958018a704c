"""Steps to sample: requests, their rows on the device and their logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from device import DEVICE
from hypothesis import strategies as st

from preble.kernels.sampling import SamplingWorkspace, sample, sample_reference
from preble.kernels.sampling_rows import MAX_BIASES, MAX_STOP_IDS, WORDS, SamplingRows, count_tokens, packed_row
from preble.sampling import MAX_SEED, SamplingParams

PROMPT = 40
"""Tokens of every prompt here."""
INFINITY = float("inf")


@dataclass
class Request:
    """What a row of the table is made from."""

    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 1
    position: int = PROMPT
    stop_ids: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()

    @property
    def penalised(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def ask(**options: object) -> Request:
    """A request with these sampling parameters."""
    return Request(SamplingParams(**options))  # type: ignore[arg-type]


@dataclass
class Step:
    """Inputs of `sample`: request i has logits i and row `rows[i]`."""

    logits: torch.Tensor
    requests: list[Request]
    rows: list[int]
    params: SamplingRows
    counts: torch.Tensor | None

    @classmethod
    def make(cls, logits: torch.Tensor, requests: list[Request], rows: list[int] | None = None) -> Step:
        vocabulary = logits.shape[1]
        rows = list(range(len(requests)))[::-1] if rows is None else rows
        params = SamplingRows.allocate(max(len(rows), *rows, 0) + 3, DEVICE)
        penalised = sum(request.penalised for request in requests)
        counts = torch.full((penalised + 1, vocabulary), -5, dtype=torch.int16, device=DEVICE)
        if not penalised:
            counts = None
        packed, count_row = [np.full(WORDS, -1, np.int32)], 0
        for row, request in zip(rows, requests, strict=True):
            if counts is not None and request.penalised:
                count_row += 1
                count_tokens(counts, count_row, ids(request.prompt), ids(request.output))
            packed.append(
                packed_row(
                    row,
                    request.params,
                    seed=request.seed,
                    prompt_length=PROMPT,
                    stop_ids=request.stop_ids,
                    count_row=count_row if request.penalised else -1,
                )
            )
        params.write(torch.from_numpy(np.stack(packed)).to(DEVICE))
        return cls(logits.to(DEVICE), requests, rows, params, counts)

    def run(self, operation: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens, last tokens and counts afterwards, with nothing but garbage before."""
        batch, vocabulary = self.logits.shape
        tokens = torch.full((batch,), -77, dtype=torch.int32, device=DEVICE)
        last = torch.full((len(self.params.table),), -88, dtype=torch.int32, device=DEVICE)
        workspace = SamplingWorkspace.allocate(batch + 1, vocabulary, DEVICE)
        for name in SamplingWorkspace.__slots__:
            memory = getattr(workspace, name)
            memory.fill_(math.nan if memory.dtype.is_floating_point else -(1 << 30))
        logits, counts = self.logits.clone(), None if self.counts is None else self.counts.clone()
        operation(  # type: ignore[operator]
            logits,
            tokens,
            last,
            rows=ids(self.rows),
            positions=ids([request.position for request in self.requests]),
            params=self.params,
            counts=counts,
            workspace=workspace,
        )
        assert torch.equal(logits.nan_to_num(), self.logits.nan_to_num()), "the logits were changed"
        return tokens.cpu(), last.cpu(), counts

    def check(self) -> list[int]:
        """Run the kernels and the reference; the tokens."""
        tokens, last, counts = self.run(sample)
        expected_tokens, expected_last, expected_counts = self.run(sample_reference)
        assert tokens.tolist() == expected_tokens.tolist()
        assert last.tolist() == expected_last.tolist()
        assert (counts is None) == (expected_counts is None)
        assert counts is None or expected_counts is None or torch.equal(counts, expected_counts)
        return [int(token) for token in tokens]


def ids(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normal(batch: int, vocabulary: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


SETTINGS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_p": 0.9},
    {"top_k": 1},
    {"top_k": 7},
    {"min_p": 0.1},
    {"top_k": 50, "min_p": 0.02, "temperature": 2.0},
    {"top_k": 200, "top_p": 0.8, "min_p": 0.01, "temperature": 1.5},
    {"top_p": 1e-60},
    {"top_p": 0.5, "temperature": 1e-20},
    {"temperature": 1e30, "top_p": 0.5},
    {"top_k": 10**7, "min_p": 1.0},
]


@st.composite
def requests(draw: st.DrawFn, vocabulary: int) -> Request:
    options: dict[str, object] = dict(draw(st.sampled_from(SETTINGS)))
    token = st.sampled_from([0, vocabulary // 2, vocabulary - 1]) | st.integers(0, vocabulary - 1)
    if draw(st.booleans()):
        options["logit_bias"] = draw(
            st.dictionaries(token, st.sampled_from([-INFINITY, -4.0, 2.5, 8.0, 1e6]), max_size=MAX_BIASES)
        )
    if draw(st.booleans()):  # sums and products of these and of the logits are exact
        options["repetition_penalty"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
        options["presence_penalty"] = draw(st.sampled_from([0.0, 0.5, -1.5]))
        options["frequency_penalty"] = draw(st.sampled_from([0.0, 0.25, -0.5]))
    stop_ids = ()
    if draw(st.booleans()):
        options["min_tokens"] = 5
        stop_ids = tuple(draw(st.lists(token, unique=True, max_size=MAX_STOP_IDS)))
    return Request(
        SamplingParams(**options),  # type: ignore[arg-type]
        seed=draw(st.sampled_from([0, 1, 2**31, 2**32 + 5, MAX_SEED]) | st.integers(0, MAX_SEED)),
        position=PROMPT + draw(st.sampled_from([0, 1, 4, 5, 1000])),
        stop_ids=stop_ids,
        prompt=tuple(draw(st.lists(token, max_size=5))),
        output=tuple(draw(st.lists(token, max_size=5))),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    vocabulary = draw(st.sampled_from([1, 37, 272, 2048, 2049, 5000]))
    asked = draw(st.lists(requests(vocabulary), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["normal", "peaked", "flat", "equal", "ties"]))
    spread = {"normal": 3.0, "peaked": 12.0, "flat": 0.3, "equal": 0.0, "ties": 1.5}[kind]
    logits = normal(len(asked), vocabulary, spread, seed=draw(st.integers(0, 99)))
    logits = (logits * (2 if kind == "ties" else 1024)).round() / (2 if kind == "ties" else 1024)
    banned = draw(st.sampled_from([0.0, 0.0, 0.5, 0.99, 1.0]))
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < banned] = -INFINITY
    for row in logits:
        if draw(st.integers(0, 9)) == 9:
            row[draw(st.integers(0, vocabulary - 1))] = draw(st.sampled_from([math.nan, INFINITY]))
    logits = logits.to(draw(st.sampled_from([torch.float32, torch.float16])))
    rows = draw(st.permutations(range(len(asked) + 3)))[: len(asked)]
    return Step.make(logits, asked, rows)
