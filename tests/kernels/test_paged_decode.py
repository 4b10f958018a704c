"""Paged decode, its plan and its merge, against attention by definition and against their references."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import e, log2

import pytest
import torch
from device import DEVICE
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from made_kv import MadeKV, make_kv

from preble.kernels.architecture import SM_80, SM_90, Architecture, assume
from preble.kernels.fp8 import decoded
from preble.kernels.launch import recorded_launches
from preble.kernels.merge import merge_partials, merge_partials_reference
from preble.kernels.paged_decode import paged_decode, paged_decode_reference
from preble.kernels.partials import Partials
from preble.kernels.splits import plan_splits, plan_splits_reference, splits_for, tile_of, work_items

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
MOST_TOKENS = 420
WIDE = settings(deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
"""Without shrinking, which interprets a failing kernel for minutes."""


@dataclass(frozen=True)
class Case:
    """A batch to decode, and how."""

    lengths: list[int]
    page_size: int = 16
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    query_length: int = 1
    window: int | None = None
    soft_cap: float | None = None
    splits: int = 4
    programs: int = 8
    listed: bool = True
    """Whether the work is listed, or a program started for every possible split."""
    shared_pages: int = 0
    """Pages that all sequences long enough begin with, and that somebody else has answered."""
    shared_split_pages: int = 1
    seed: int = 0
    architecture: Architecture = SM_90
    """Whose tiles and conversions are taken, where there is no GPU."""

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def starts(self) -> list[int]:
        """Of padding, whatever was there before."""
        start = self.shared_pages * self.page_size
        return [start if length == 0 or length - self.query_length >= start else 0 for length in self.lengths]

    def kv(self) -> MadeKV:
        return make_kv(
            self.lengths,
            page_size=self.page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=torch.uint8 if self.fp8 else self.dtype,
            seed=self.seed,
            shared_tokens=self.shared_pages * self.page_size,
        )

    def q(self) -> torch.Tensor:
        """A view into a wider matrix, as into the product of the QKV projection."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, width = len(self.lengths) * self.query_length, self.kv_heads * self.group * self.head_dim
        qkv = torch.randn(rows, width + 64, generator=generator).mul_(2).to(DEVICE, self.dtype)
        return qkv[:, :width].view(rows, -1, self.head_dim)


def attention(
    case: Case, kv: MadeKV, q: torch.Tensor, sequence: int, tokens: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """What new tokens see of `tokens`, in fp64: out [query_length, query_heads, head_dim] and log-sum-exp to base 2."""
    keys, values = (tensor[kv.slots[sequence][tokens.start : tokens.stop]] for tensor in (kv.keys, kv.values))
    if case.fp8:
        assert kv.key_scales is not None
        assert kv.value_scales is not None
        keys, values = decoded(keys) * kv.key_scales[:, None], decoded(values) * kv.value_scales[:, None]
    keys, values = (tensor.double().repeat_interleave(case.group, 1) for tensor in (keys, values))
    queries = q[sequence * case.query_length : (sequence + 1) * case.query_length].double()
    scores = torch.einsum("qhd,thd->qht", queries, keys) * case.scale
    if case.soft_cap is not None:
        scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
    length = case.lengths[sequence]
    age = torch.arange(length - case.query_length, length)[:, None] - torch.tensor(tokens)
    hidden = age < 0
    if case.window is not None:
        hidden |= age >= case.window
    scores = scores.masked_fill(hidden[:, None].to(DEVICE), float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # of a row that sees nothing
    return torch.einsum("qht,thd->qhd", weights, values), scores.logsumexp(-1) * log2(e)


def expected(case: Case, kv: MadeKV, q: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64, device=DEVICE)
    for sequence, length in enumerate(case.lengths):
        if length:
            rows = slice(sequence * case.query_length, (sequence + 1) * case.query_length)
            out[rows], _ = attention(case, kv, q, sequence, range(length))
    return out


@dataclass
class Decode:
    """Everything that a step keeps on the device; what is yet to be written is poisoned."""

    case: Case
    kv: MadeKV = field(init=False)
    q: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        self.kv, self.q = case.kv(), case.q()
        self.out = torch.full(self.q.shape, float("nan"), dtype=case.dtype, device=DEVICE)
        self.first_split = -(-case.shared_pages // case.shared_split_pages)
        self.partials = Partials.allocate(
            rows=self.q.shape[0],
            query_heads=self.q.shape[1],
            splits=self.first_split + case.splits + 1,
            head_dim=case.head_dim,
            device=DEVICE,
        )
        self.partials.out.fill_(float("nan"))
        self.partials.lse.fill_(float("nan"))
        self.split_tokens = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
        items = work_items(len(case.lengths), case.kv_heads, case.programs)
        self.work = torch.full((items,), 99, dtype=torch.int32, device=DEVICE) if case.listed else None
        self.starts = torch.tensor(case.starts, dtype=torch.int32, device=DEVICE) if case.shared_pages else None
        self.shared_split_tokens = None
        if case.shared_pages:
            self.shared_split_tokens = torch.tensor([case.shared_split_pages * case.page_size], device=DEVICE).int()

    def plan(self, function=plan_splits) -> None:  # type: ignore[no-untyped-def]
        case = self.case
        function(
            self.kv.context_lengths,
            self.split_tokens,
            starts=self.starts,
            window=case.window,
            query_length=case.query_length,
            kv_heads=case.kv_heads,
            splits=case.splits,
            tile_tokens=tile_of(self.q, case.kv_heads, case.query_length).tokens,
            programs=case.programs,
            work=self.work,
        )

    def answer_prefix(self) -> None:
        """What the kernel for shared prefixes would leave."""
        step = self.case.shared_split_pages * self.case.page_size
        for sequence, start in enumerate(self.case.starts):
            if self.case.lengths[sequence] == 0:
                continue
            rows = slice(sequence * self.case.query_length, (sequence + 1) * self.case.query_length)
            for split, begin in enumerate(range(0, start, step)):
                tokens = range(begin, min(begin + step, start))
                out, lse = attention(self.case, self.kv, self.q, sequence, tokens)
                self.partials.out[rows, :, split], self.partials.lse[rows, :, split] = out.float(), lse.float()

    def decode(self, function=paged_decode) -> None:  # type: ignore[no-untyped-def]
        case, kv = self.case, self.kv
        function(
            self.q,
            kv.keys,
            kv.values,
            self.out,
            tables=kv.tables,
            rows=kv.rows,
            context_lengths=kv.context_lengths,
            split_tokens=self.split_tokens,
            partials=self.partials,
            splits=case.splits,
            first_split=self.first_split,
            starts=self.starts,
            page_size=case.page_size,
            query_length=case.query_length,
            scale=case.scale,
            window=case.window,
            soft_cap=case.soft_cap,
            key_scales=kv.key_scales,
            value_scales=kv.value_scales,
            work=self.work,
        )

    def merge(self, function=merge_partials) -> None:  # type: ignore[no-untyped-def]
        case = self.case
        function(
            self.partials,
            self.out,
            context_lengths=self.kv.context_lengths,
            split_tokens=self.split_tokens,
            splits=case.splits,
            query_length=case.query_length,
            kv_heads=case.kv_heads,
            window=case.window,
            starts=self.starts,
            shared_split_tokens=self.shared_split_tokens,
            first_split=self.first_split,
        )


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative; NaN if anything was left as it was poisoned."""
    difference = (actual.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    return float(difference)


@st.composite
def cases(draw: st.DrawFn, *, shared: bool = False) -> Case:
    query_length = draw(st.sampled_from([1, 1, 2, 5, 8]))
    length = st.one_of(st.sampled_from([0, query_length]), st.integers(query_length, MOST_TOKENS))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    page_size = draw(st.sampled_from([16, 64, 128]))
    return Case(
        lengths=draw(st.lists(length, min_size=1, max_size=3)),
        page_size=page_size,
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 4, 7, 8])),
        head_dim=draw(st.sampled_from([64, 80, 96, 128, 256])),
        dtype=dtype,
        fp8=draw(st.booleans()),
        query_length=query_length,
        window=None if shared else draw(st.one_of(st.none(), st.integers(1, MOST_TOKENS))),
        soft_cap=draw(st.sampled_from([None, None, 5.0])),
        splits=draw(st.integers(1, 5)),
        programs=draw(st.integers(1, 16)),
        listed=draw(st.booleans()),
        shared_pages=draw(st.integers(1, 256 // page_size)) if shared else 0,
        shared_split_pages=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 5)),
        architecture=draw(st.sampled_from([SM_90, SM_80])),
    )


@settings(WIDE, max_examples=40)
@given(cases())
@example(Case([MOST_TOKENS, 0, 1, 64, 65], splits=5, programs=40))
@example(Case([32, 33], programs=64))  # one split to the last token, and one token more
@example(Case([34], query_length=8, programs=64))  # whose first queries see none of the last split
@example(Case([300], window=1, query_length=8, group=7))
@example(Case([300], window=40, query_length=8, dtype=torch.float16))
@example(Case([200, 0], page_size=128, head_dim=256, listed=False))
@example(Case([150, 20], fp8=True, dtype=torch.float16, architecture=SM_80))
def test_decode_is_attention(case: Case) -> None:
    with assume(case.architecture):
        step = Decode(case)
        step.plan()
        step.decode()
        step.merge()
    assert error(step.out, expected(case, step.kv, step.q)) < TOLERANCE[case.dtype]


@settings(WIDE, max_examples=25)
@given(cases(shared=True))
@example(Case([256, 100, 0, 257], shared_pages=16, shared_split_pages=3, splits=3))
@example(Case([420, 0, 300], shared_pages=12, head_dim=256, splits=14, programs=64))  # more than are merged at a time
@example(Case([90, 95, 81], shared_pages=5, shared_split_pages=2, splits=1, query_length=8, dtype=torch.float16))
@example(Case([90, 64], shared_pages=2, window=20, splits=2, query_length=2))
def test_after_a_shared_prefix_own_tokens_are_added(case: Case) -> None:
    with assume(case.architecture):
        step = Decode(case)
        step.answer_prefix()
        step.plan()
        step.decode()
        step.merge()
    assert error(step.out, expected(case, step.kv, step.q)) < TOLERANCE[case.dtype]


@settings(WIDE, max_examples=25)
@given(st.booleans().flatmap(lambda shared: cases(shared=shared)))
@example(Case([150, 20], fp8=True, dtype=torch.float16))
@example(Case([34], query_length=8, programs=64))
@example(Case([300], window=1, query_length=8, group=7))
def test_kernels_write_what_their_references_write(case: Case) -> None:
    """And nothing else: what is not written stays NaN in both."""
    with assume(case.architecture):
        step, reference = Decode(case), Decode(case)
        step.plan()
        reference.plan(plan_splits_reference)
        assert torch.equal(step.split_tokens, reference.split_tokens)
        if case.listed:
            assert step.work is not None
            assert reference.work is not None
            assert step.work.sort().values.tolist() == reference.work.sort().values.tolist()

        step.decode()
        reference.decode(paged_decode_reference)
        tolerance = TOLERANCE[case.dtype]
        for actual, wanted in (
            (step.out, reference.out),
            (step.partials.out, reference.partials.out),
            (step.partials.lse, reference.partials.lse),
        ):
            assert torch.equal(actual.isnan(), wanted.isnan())
            assert torch.equal(actual == float("-inf"), wanted == float("-inf"))
            finite = wanted.isfinite()
            assert error(actual[finite], wanted[finite]) < tolerance

        step.answer_prefix()
        reference.answer_prefix()
        step.merge()
        reference.merge(merge_partials_reference)
    assert error(step.out, reference.out) < tolerance


@settings(WIDE, max_examples=40)
@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(1, 40_000)), min_size=1, max_size=600),
    shared=st.integers(0, 300),
    window=st.one_of(st.none(), st.integers(1, 5_000)),
    query_length=st.integers(1, 8),
    kv_heads=st.sampled_from([1, 3, 8]),
    splits=st.integers(1, 70),
    tile_tokens=st.sampled_from([16, 32, 64]),
    programs=st.integers(1, 600),
)
@example([1_000] * 512, 0, None, 1, 8, 8, 64, 528)
@example([131_072, *[100] * 511], 0, None, 1, 8, 8, 64, 528)
@example([2_000_000] * 300, 0, None, 1, 8, 8, 64, 528)  # more tokens x heads than 32 bits count
@example([0], 0, None, 1, 8, 8, 64, 528)
def test_a_plan_is_even_and_fits(
    lengths: list[int],
    shared: int,
    window: int | None,
    query_length: int,
    kv_heads: int,
    splits: int,
    tile_tokens: int,
    programs: int,
) -> None:
    lengths = [max(length, query_length) if length else 0 for length in lengths]
    starts = [shared * 16 if length - query_length >= shared * 16 else 0 for length in lengths]
    context_lengths, starts_there = (torch.tensor(numbers, device=DEVICE).int() for numbers in (lengths, starts))
    made = []
    for plan in (plan_splits, plan_splits_reference):
        split_tokens = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
        work = torch.full((work_items(len(lengths), kv_heads, programs) + 1,), 99, dtype=torch.int32, device=DEVICE)
        plan(
            context_lengths,
            split_tokens,
            starts=starts_there if shared else None,
            window=window,
            query_length=query_length,
            kv_heads=kv_heads,
            splits=splits,
            tile_tokens=tile_tokens,
            programs=programs,
            work=work,
        )
        made.append((int(split_tokens), work.tolist()))
    (tokens, items), (tokens_of_reference, items_of_reference) = made
    assert tokens == tokens_of_reference
    assert items == items_of_reference
    assert tokens > 0
    assert tokens % tile_tokens == 0
    counts = Counter(item // splits for item in items if item >= 0)
    assert set(counts) == set(range(len(lengths)))
    for sequence, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        oldest = 0 if window is None else length - query_length - window + 1
        own = length - max(start, oldest)
        assert (counts[sequence] - 1) * tokens <= max(own + tile_tokens, 0)
        assert counts[sequence] * tokens >= own
        assert counts[sequence] <= splits


def test_what_does_not_fit_is_refused() -> None:
    step = Decode(Case([100, 50]))
    assert step.work is not None
    step.work = step.work[:-1]
    with pytest.raises(ValueError, match="work has 5 items; 6 are possible"):
        step.plan()

    step = Decode(Case([100, 50], splits=6))
    step.partials = Partials(step.partials.out[:, :, :5], step.partials.lse[:, :, :5])
    for call in (step.decode, step.merge):
        with pytest.raises(ValueError, match=r"0 \+ 6 splits do not fit in partials for 5"):
            call()

    step = Decode(Case([100, 50]))
    step.starts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="go together"):
        step.merge()


def test_splits_follow_from_the_batch() -> None:
    assert splits_for(1, 8, 132) == 128
    assert splits_for(4, 8, 132) == 33
    assert splits_for(256, 8, 132) == 8
    assert [splits_for(batch, 8, 132) for batch in range(1, 300)] == sorted(
        (splits_for(batch, 8, 132) for batch in range(1, 300)), reverse=True
    )


def test_launches_need_no_values_and_are_compiled_once_for_all_batches() -> None:
    """A tensor on "meta" has no values; and nothing but tensors and numbers that are not specialised varies."""
    constants = []
    for batch in (1, 3, 64):
        with recorded_launches() as launches:
            record_on_meta(batch)
        assert [launch.grid for launch in launches] == [
            (1,),
            (8, work_items(batch, 8, 528)),
            (batch, 32),
        ]
        constants.append([{k: v for k, v in launch.arguments.items() if k.isupper()} for launch in launches])
    assert constants[0] == constants[1] == constants[2]


def record_on_meta(batch: int) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    splits = splits_for(batch, 8, 132)
    q, cache = meta(batch, 32, 128, dtype=torch.bfloat16), meta(4096, 8, 128, dtype=torch.bfloat16)
    lengths, split_tokens, work = meta(batch), meta(1), meta(work_items(batch, 8, 528))
    partials = Partials.allocate(rows=batch, query_heads=32, splits=splits, head_dim=128, device="meta")
    plan_splits(
        lengths,
        split_tokens,
        kv_heads=8,
        splits=splits,
        tile_tokens=tile_of(q, 8, 1).tokens,
        programs=528,
        work=work,
    )
    paged_decode(
        q,
        cache,
        cache,
        torch.empty_like(q),
        tables=meta(64, 100),
        rows=meta(batch),
        context_lengths=lengths,
        split_tokens=split_tokens,
        partials=partials,
        splits=splits,
        page_size=64,
        scale=0.1,
        work=work,
    )
    merge_partials(partials, q, context_lengths=lengths, split_tokens=split_tokens, splits=splits, kv_heads=8)
