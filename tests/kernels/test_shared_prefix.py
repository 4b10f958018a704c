"""Decoding over common prefixes, alone and with the rest of decode attention, against attention by definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import e, log2

import pytest
import torch
from device import DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_kv import MadeKV, make_kv

from preble.kernels.architecture import SM_80, SM_90, architecture_of
from preble.kernels.fp8 import decoded
from preble.kernels.launch import recorded_launches
from preble.kernels.merge import merge_partials, merge_partials_reference
from preble.kernels.paged_decode import paged_decode, paged_decode_reference
from preble.kernels.partials import Partials
from preble.kernels.prefix_groups import SHORTEST_SPLIT
from preble.kernels.shared_prefix import (
    plan_shared_splits,
    plan_shared_splits_reference,
    requests_per_tile,
    shared_prefix_decode,
    shared_prefix_decode_reference,
)
from preble.kernels.splits import plan_splits, plan_splits_reference, tile_of
from preble.kernels.tiles import shared_prefix_tile

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}


@dataclass(frozen=True)
class Group:
    """Sequences with common first pages; with 0 pages, what an earlier step has left in an inactive tile."""

    members: list[int]
    pages: int


@dataclass(frozen=True)
class Case:
    """A batch of which some decode on common prefixes."""

    lengths: list[int]
    groups: list[Group]
    page_size: int = 16
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    query_length: int = 1
    soft_cap: float | None = None
    requests: int = 3
    """R, the columns of `members`."""
    split_tiles: int = 2
    """The length of a split, where it is not planned."""
    seed: int = 0

    @property
    def active(self) -> list[Group]:
        return [group for group in self.groups if group.pages]

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def tile_tokens(self) -> int:
        return shared_prefix_tile(architecture_of(DEVICE), self.head_dim, self.dtype.itemsize).tokens

    @cached_property
    def kv(self) -> MadeKV:
        """Members of a group have the first one's pages for the common ones; what they had before is poisoned."""
        kv = make_kv(
            self.lengths,
            page_size=self.page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=torch.uint8 if self.fp8 else self.dtype,
            seed=self.seed,
        )
        for group in self.active:
            first, *others = group.members
            for member in others:
                tokens = group.pages * self.page_size
                for heads in (kv.keys, kv.values):
                    heads[kv.slots[member][:tokens]] = 0x7F if self.fp8 else float("nan")
                kv.tables[kv.rows[member].long(), : group.pages] = kv.tables[kv.rows[first].long(), : group.pages]
                kv.slots[member][:tokens] = kv.slots[first][:tokens]
        return kv

    @cached_property
    def q(self) -> torch.Tensor:
        """A view into a wider matrix, as into the product of the QKV projection; what is not Q is poisoned."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, width = len(self.lengths) * self.query_length, self.kv_heads * self.group * self.head_dim
        qkv = torch.randn(rows, width + 64, generator=generator).mul_(2).to(DEVICE, self.dtype)
        qkv[:, width:] = float("nan")
        return qkv[:, :width].view(rows, -1, self.head_dim)

    @property
    def members(self) -> torch.Tensor:
        members = torch.full((len(self.groups), self.requests), -1, dtype=torch.int32)
        for tile, group in enumerate(self.groups):
            members[tile, : len(group.members)] = torch.tensor(group.members)
        return members.to(DEVICE)

    @property
    def prefix_lengths(self) -> torch.Tensor:
        return torch.tensor([group.pages * self.page_size for group in self.groups], device=DEVICE).int()

    @property
    def starts(self) -> torch.Tensor:
        starts = torch.zeros(len(self.lengths), dtype=torch.int32)
        for group in self.active:
            starts[group.members] = group.pages * self.page_size
        return starts.to(DEVICE)

    @property
    def splits(self) -> int:
        """As few as are needed, and one more."""
        longest = max((group.pages * self.page_size for group in self.groups), default=0)
        return -(-longest // (self.split_tiles * self.tile_tokens)) + 1

    def partials(self, splits: int) -> Partials:
        """Poisoned."""
        rows, query_heads = self.q.shape[:2]
        partials = Partials.allocate(
            rows=rows, query_heads=query_heads, splits=splits, head_dim=self.head_dim, device=DEVICE
        )
        partials.out.fill_(float("nan"))
        partials.lse.fill_(float("nan"))
        return partials

    def options(self) -> dict[str, object]:
        """What all attention kernels are given."""
        return {
            "tables": self.kv.tables,
            "rows": self.kv.rows,
            "page_size": self.page_size,
            "query_length": self.query_length,
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "key_scales": self.kv.key_scales,
            "value_scales": self.kv.value_scales,
        }


def rows_of(case: Case, sequence: int) -> slice:
    return slice(sequence * case.query_length, (sequence + 1) * case.query_length)


def attention(case: Case, sequence: int, tokens: slice, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What new tokens see of `tokens`, in fp64: out [query_length, query_heads, head_dim] and log-sum-exp to base 2."""
    kv = case.kv
    keys, values = kv.keys[kv.slots[sequence][tokens]], kv.values[kv.slots[sequence][tokens]]
    if kv.key_scales is not None and kv.value_scales is not None:
        keys, values = decoded(keys) * kv.key_scales[:, None], decoded(values) * kv.value_scales[:, None]
    keys, values = (heads.double().repeat_interleave(case.group, 1) for heads in (keys, values))
    scores = torch.einsum("qhd,thd->qht", case.q[rows_of(case, sequence)].double(), keys) * case.scale
    if case.soft_cap is not None:
        scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
    if causal:
        seen = torch.ones(scores.shape[0], scores.shape[2]).tril(scores.shape[2] - scores.shape[0]).bool()
        scores = scores.masked_fill(~seen[:, None].to(DEVICE), float("-inf"))
    return torch.einsum("qht,thd->qhd", scores.softmax(-1), values), scores.logsumexp(-1) * log2(e)


@st.composite
def cases(draw: st.DrawFn, heads: int, requests: int) -> Case:
    """Some groups, of one request to a full tile, sequences without one, padding, tiles left over.

    At most `heads` KV heads and `requests` requests to a tile.
    """
    page_size = draw(st.sampled_from([16, 16, 64, 128]))
    query_length = draw(st.sampled_from([1, 1, 2, 3, 4]))
    requests = draw(st.integers(1, requests))
    lengths: list[int] = []
    groups = []
    for _ in range(draw(st.integers(1, 2))):
        pages = draw(st.integers(1, max(1, 330 // page_size)))
        tails = draw(st.lists(st.integers(query_length, 70), min_size=1, max_size=requests))
        groups.append(Group(list(range(len(lengths), len(lengths) + len(tails))), pages))
        lengths += [pages * page_size + tail for tail in tails]
    lengths += draw(st.lists(st.one_of(st.just(0), st.integers(query_length, 90)), max_size=heads))
    if draw(st.booleans()):
        groups.insert(draw(st.integers(0, len(groups))), Group(draw(st.sampled_from([[0], [-1], [99]])), 0))
    order = draw(st.permutations(range(len(lengths))))
    return Case(
        lengths=[lengths[place] for place in order],
        groups=[Group([order.index(m) if m in order else m for m in g.members], g.pages) for g in groups],
        page_size=page_size,
        kv_heads=draw(st.integers(1, heads)),
        group=draw(st.sampled_from([1, 4, 7, 8])) if heads > 1 or query_length == 1 else draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([64, 80, 96, 128, 256])),
        dtype=(dtype := draw(st.sampled_from([torch.float32, torch.float16]))),
        fp8=draw(st.booleans()) if dtype == torch.float16 else False,
        query_length=query_length,
        soft_cap=draw(st.sampled_from([None, 3.0])),
        requests=requests,
        split_tiles=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("function", [shared_prefix_decode, shared_prefix_decode_reference])
def test_partials_answer_the_prefix_and_nothing_else_is_written(function: Callable[..., None]) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(cases(heads=2, requests=4))
    @example(Case([400, 300, 310], [Group([1, 2], 16)], fp8=True, dtype=torch.float16, soft_cap=3.0))
    @example(Case([300] * 16, [Group([*range(8)], 2), Group([*range(8, 16)], 3)], page_size=64, group=8, requests=8))
    def check(case: Case) -> None:
        length = case.split_tiles * case.tile_tokens
        partials, expected = case.partials(case.splits + 1), case.partials(case.splits + 1)
        function(
            case.q,
            case.kv.keys,
            case.kv.values,
            members=case.members,
            prefix_lengths=case.prefix_lengths,
            split_tokens=torch.tensor([length], device=DEVICE).int(),
            partials=partials,
            splits=case.splits,
            **case.options(),
        )
        for group in case.active:
            prefix = group.pages * case.page_size
            for member in group.members:
                for split, start in enumerate(range(0, prefix, length)):
                    out, lse = attention(case, member, slice(start, min(start + length, prefix)), causal=False)
                    expected.out[rows_of(case, member), :, split] = out.float()
                    expected.lse[rows_of(case, member), :, split] = lse.float()
        assert_close(partials.out, expected.out, TOLERANCE[case.dtype])
        assert_close(partials.lse, expected.lse, TOLERANCE[case.dtype])

    check()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Close in norm; NaN, which stands for "not written", in the same places."""
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.double().nan_to_num(), expected.double().nan_to_num()
    assert (actual - expected).norm() <= tolerance * expected.norm()


KERNELS = (plan_shared_splits, shared_prefix_decode, plan_splits, paged_decode, merge_partials)
REFERENCES = (
    plan_shared_splits_reference,
    shared_prefix_decode_reference,
    plan_splits_reference,
    paged_decode_reference,
    merge_partials_reference,
)


@pytest.mark.parametrize("functions", [KERNELS, REFERENCES], ids=["kernels", "references"])
def test_prefixes_and_tails_make_whole_contexts(functions: tuple[Callable[..., None], ...]) -> None:
    # Small, because the interpreter takes milliseconds for each row and head that is merged.
    @settings(max_examples=24, deadline=None, derandomize=True)
    @given(cases(heads=1, requests=2), st.integers(1, 24))
    def check(case: Case, programs: int) -> None:
        plan_shared, decode_shared, plan, decode, merge = functions
        shared_splits, splits, query_length = 4, 4, case.query_length
        context_lengths, starts = case.kv.context_lengths, case.starts
        partials = case.partials(shared_splits + splits)
        shared_split_tokens, split_tokens = torch.full((2, 1), -1, dtype=torch.int32, device=DEVICE)
        out = torch.full(case.q.shape, float("nan"), dtype=case.dtype, device=DEVICE)
        kv_heads, tile_tokens = case.kv_heads, tile_of(case.q, case.kv_heads, query_length).tokens

        plan_shared(
            case.prefix_lengths,
            shared_split_tokens,
            kv_heads=kv_heads,
            splits=shared_splits,
            tile_tokens=case.tile_tokens,
            programs=programs,
        )
        decode_shared(
            case.q,
            case.kv.keys,
            case.kv.values,
            members=case.members,
            prefix_lengths=case.prefix_lengths,
            split_tokens=shared_split_tokens,
            partials=partials,
            splits=shared_splits,
            **case.options(),
        )
        common = {"query_length": query_length, "kv_heads": kv_heads, "splits": splits, "starts": starts}
        plan(context_lengths, split_tokens, tile_tokens=tile_tokens, programs=programs, **common)
        decode(
            case.q,
            case.kv.keys,
            case.kv.values,
            out,
            context_lengths=context_lengths,
            split_tokens=split_tokens,
            partials=partials,
            splits=splits,
            first_split=shared_splits,
            starts=starts,
            **case.options(),
        )
        merge(
            partials,
            out,
            context_lengths=context_lengths,
            split_tokens=split_tokens,
            shared_split_tokens=shared_split_tokens,
            first_split=shared_splits,
            **common,
        )
        expected = torch.zeros(case.q.shape, dtype=torch.float64, device=DEVICE)
        for sequence, length in enumerate(case.lengths):
            if length:
                expected[rows_of(case, sequence)], _ = attention(case, sequence, slice(0, length), causal=True)
        assert_close(out, expected, TOLERANCE[case.dtype])

    check()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 0, 64, 128, 576, 2560, 8192, 131072, 131088]), min_size=1, max_size=9),
    kv_heads=st.sampled_from([1, 8]),
    splits=st.sampled_from([1, 8, 32]),
    tile_tokens=st.sampled_from([32, 64]),
    programs=st.sampled_from([1, 132, 264]),
)
def test_plans_fill_the_gpu_and_keep_to_the_splits(
    lengths: list[int], kv_heads: int, splits: int, tile_tokens: int, programs: int
) -> None:
    planned, expected = torch.full((2, 1), -1, dtype=torch.int32, device=DEVICE)
    for function, split_tokens in ((plan_shared_splits, planned), (plan_shared_splits_reference, expected)):
        function(
            torch.tensor(lengths, device=DEVICE).int(),
            split_tokens,
            kv_heads=kv_heads,
            splits=splits,
            tile_tokens=tile_tokens,
            programs=programs,
        )
    tokens = int(planned)
    assert tokens == int(expected)
    assert tokens % tile_tokens == 0
    assert tokens >= SHORTEST_SPLIT
    counts = [-(-length // tokens) for length in lengths]
    assert max(counts) <= splits
    active = sum(length > 0 for length in lengths)
    if sum(counts) * kv_heads > programs:  # two rounds at most, unless there are too many tiles for that
        assert sum(counts) <= 3 * active
    elif max(counts) < splits and tokens >= SHORTEST_SPLIT + tile_tokens:  # a tile less would have been too many
        assert sum(length / (tokens - tile_tokens) for length in lengths) + active > programs // kv_heads


def test_slots_beyond_31_bits_are_found() -> None:
    page_size, head_dim, last = 64, 256, 2**31 // (64 * 256)
    generator = torch.Generator().manual_seed(0)
    heads = torch.empty((last + 1) * page_size, 1, head_dim, dtype=torch.uint8, device=DEVICE)  # mostly never touched
    heads[-page_size:] = torch.randint(0, 64, (page_size, 1, head_dim), generator=generator).to(DEVICE, torch.uint8)
    q = torch.randn(1, 1, head_dim, generator=generator).to(DEVICE)
    partials = [Partials.allocate(rows=1, query_heads=1, splits=1, head_dim=head_dim, device=DEVICE) for _ in range(2)]
    for function, written in zip((shared_prefix_decode, shared_prefix_decode_reference), partials, strict=True):
        written.out.fill_(float("nan"))
        function(
            q,
            heads,
            heads,
            tables=torch.tensor([[last]], device=DEVICE).int(),
            rows=torch.zeros(1, dtype=torch.int32, device=DEVICE),
            members=torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
            prefix_lengths=torch.tensor([page_size], device=DEVICE).int(),
            split_tokens=torch.tensor([128], device=DEVICE).int(),
            partials=written,
            splits=1,
            page_size=page_size,
            scale=1.0,
            key_scales=torch.ones(1, device=DEVICE),
            value_scales=torch.ones(1, device=DEVICE),
        )
    assert_close(partials[0].out, partials[1].out, 1e-5)


def test_launches_depend_on_shapes_only() -> None:
    """Tensors on "meta" have no values, so a CUDA graph that is captured once holds for every step."""
    numbers = torch.empty(8, 16, dtype=torch.int32, device="meta")
    heads = torch.empty(640, 8, 128, dtype=torch.bfloat16, device="meta")
    with recorded_launches() as launches:
        plan_shared_splits(numbers[0], numbers[1, :1], kv_heads=8, splits=32, tile_tokens=64, programs=264)
        shared_prefix_decode(
            torch.empty(64, 32, 128, dtype=torch.bfloat16, device="meta"),
            heads,
            heads,
            tables=numbers,
            rows=numbers[0],
            members=numbers,
            prefix_lengths=numbers[0],
            split_tokens=numbers[1, :1],
            partials=Partials.allocate(rows=64, query_heads=32, splits=40, head_dim=128, device="meta"),
            splits=32,
            page_size=64,
            scale=0.1,
        )
    plan, decode = launches
    assert plan.grid == (1,)
    assert decode.grid == (8, 8, 32)
    assert decode.arguments["TILE_ROWS"] == 64  # 16 requests of 4 rows


def test_a_tile_holds_as_many_requests_as_fit() -> None:
    assert requests_per_tile(SM_90, 128, torch.bfloat16, group=4) == 16
    assert requests_per_tile(SM_90, 128, torch.bfloat16, group=7) == 9
    assert requests_per_tile(SM_80, 128, torch.float32, group=8, query_length=2) == 2
    assert requests_per_tile(SM_80, 128, torch.bfloat16, group=96) == 1
