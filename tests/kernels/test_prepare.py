"""The inputs of a step, against the reference: integers, so all or nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import pytest
import torch
from device import DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preble.kernels.launch import recorded_launches
from preble.kernels.prepare import (
    prepare_inputs,
    prepare_inputs_reference,
    update_tables,
    update_tables_reference,
)

TABLE_ROWS = 6
POISON = -7
GUARD = 600
"""Elements on either side of what a kernel writes that it must leave alone: more than a program works on."""


def guarded(*shape: int) -> torch.Tensor:
    """Poison, with more of it before and behind."""
    size = prod(shape)
    return torch.full((size + 2 * GUARD,), POISON, dtype=torch.int32, device=DEVICE)[GUARD : GUARD + size].view(shape)


def guards(tensor: torch.Tensor) -> torch.Tensor:
    """What lies on either side of a guarded tensor."""
    everything = tensor.as_strided((tensor.numel() + 2 * GUARD,), (1,), 0)
    return torch.cat([everything[:GUARD], everything[-GUARD:]])


def integers(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_updates_reach_their_places_and_no_others(data: st.DataObject) -> None:
    pages = data.draw(st.sampled_from([1, 7, 64]))
    places = st.tuples(st.integers(0, TABLE_ROWS - 1), st.integers(0, pages - 1))
    chosen = data.draw(st.lists(places, unique=True, max_size=12))
    updates = [[row, index, 1000 + number] for number, (row, index) in enumerate(chosen)]
    padding = data.draw(st.integers(0, 5 if updates else 300))
    updates = data.draw(st.permutations(updates + [[-1, 0, 99]] * min(padding, 5))) + [[-1, 5, 98]] * (padding - 5)
    # More columns than a row has: the next row begins later.
    tables = guarded(TABLE_ROWS, pages + 3)
    expected = tables.clone()
    # What follows in the buffer might be taken for an update.
    packed = integers([*updates, [0, pages, 97]]).view(-1, 3)[:-1]
    update_tables_reference(expected[:, :pages], packed)
    update_tables(tables[:, :pages], packed)
    assert torch.equal(tables, expected)
    assert (guards(tables) == POISON).all()
    for row, index, page in updates:
        assert row < 0 or int(tables[row, index]) == page


def test_more_updates_than_a_program_takes() -> None:
    tables = torch.full((2, 400), POISON, dtype=torch.int32, device=DEVICE)
    update_tables(tables, integers([[1, index, index + 5] for index in range(300)]))
    assert tables[1].tolist() == [index + 5 for index in range(300)] + [POISON] * 100
    assert (tables[0] == POISON).all()


@dataclass
class Step:
    """What the host and the rows know of a step."""

    chunks: list[tuple[int, int, int, int]]
    """Table row, first position, tokens, first entry."""
    entries: int
    sources: list[int] = field(default_factory=list)
    """Token ids, or -1; for every entry."""
    page_size: int = 16
    seed: int = 0

    def inputs(self) -> dict[str, torch.Tensor]:
        """Sent in one packed buffer, as the host does, that starts anywhere."""
        generator = torch.Generator().manual_seed(self.seed)
        pages = max(first + count for _, first, count, _ in self.chunks) // self.page_size + 1
        sources = self.sources or torch.randint(-1, 2, (self.entries,), generator=generator).tolist()
        packed = integers([0, *(number for chunk in self.chunks for number in chunk), *sources, 0, 0, 0, 0])
        # Only the pages that a row has got are page numbers.
        tables = torch.randperm(TABLE_ROWS * (pages + 2), generator=generator).view(TABLE_ROWS, -1)
        last_tokens = torch.randint(2**17, 2**18, (TABLE_ROWS,), generator=generator)
        return {
            "chunks": packed[1 : 1 + 4 * len(self.chunks)].view(-1, 4),
            "token_source": packed[1 + 4 * len(self.chunks) : -4],
            "tables": tables.to(DEVICE, torch.int32)[:, :pages],
            "last_tokens": last_tokens.to(DEVICE, torch.int32),
        }

    def outputs(self) -> dict[str, torch.Tensor]:
        sizes = {"token_ids": self.entries, "positions": self.entries, "slots": self.entries}
        sizes |= dict.fromkeys(("context_lengths", "rows", "logit_rows"), len(self.chunks))
        return {name: guarded(size) for name, size in sizes.items()}


def prepared(step: Step) -> dict[str, list[int]]:
    """What the kernel makes of it, which is what the reference does."""
    inputs, outputs, expected = step.inputs(), step.outputs(), step.outputs()
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    prepare_inputs(**inputs, page_size=step.page_size, **outputs)
    prepare_inputs_reference(**inputs, page_size=step.page_size, **expected)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, kept[name]), name
    for name, tensor in outputs.items():
        assert (guards(tensor) == POISON).all(), name
    got = {name: tensor.tolist() for name, tensor in outputs.items()}
    assert got == {name: tensor.tolist() for name, tensor in expected.items()}
    return got


@st.composite
def mixed_steps(draw: st.DrawFn) -> Step:
    """Decodes, prefill chunks and padding, each chunk with room to spare or without."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 17, 130]), min_size=1, max_size=4))
    spare = draw(st.sampled_from([0, 0, 1, 5]))
    chunks, entry = [], 0
    for length in lengths:
        row = draw(st.integers(0, TABLE_ROWS - 1))
        chunks.append((row, draw(st.integers(0, 400)), length, entry))
        entry += max(length, 1) + draw(st.integers(0, spare))
    return Step(chunks, entry, page_size=draw(st.sampled_from([16, 64, 128])), seed=draw(st.integers(0, 99)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(mixed_steps())
@example(Step([(3, 0, 1, 0)], 1))
@example(Step([(3, 15, 2, 0)], 2))
@example(Step([(0, 0, 0, 0)], 1))
@example(Step([(0, 0, 0, 0)], 9))
@example(Step([(1, 0, 512, 0), (2, 7, 1, 512)], 513))
@example(Step([(1, 5, 511, 0), (2, 7, 514, 513)], 1030))
def test_agrees_with_the_reference(step: Step) -> None:
    prepared(step)


def test_a_mixed_step_written_out() -> None:
    step = Step([(4, 31, 1, 0), (2, 14, 3, 1)], 4, [-1, 70, 71, 262143])
    inputs = step.inputs()
    tables, last = inputs["tables"].tolist(), inputs["last_tokens"].tolist()
    assert prepared(step) == {
        "token_ids": [last[4], 70, 71, 262143],
        "positions": [31, 14, 15, 16],
        "slots": [
            tables[4][1] * 16 + 15,
            tables[2][0] * 16 + 14,
            tables[2][0] * 16 + 15,
            tables[2][1] * 16,
        ],
        "context_lengths": [32, 17],
        "rows": [4, 2],
        "logit_rows": [0, 3],
    }


def test_a_decode_bucket_written_out() -> None:
    step = Step([(5, 40, 1, 0), (1, 0, 1, 1), (0, 0, 0, 2), (0, 0, 0, 3)], 4, [-1, -1, -1, 55], page_size=64)
    inputs = step.inputs()
    tables, last = inputs["tables"].tolist(), inputs["last_tokens"].tolist()
    assert prepared(step) == {
        "token_ids": [last[5], last[1], 0, 0],
        "positions": [40, 0, 0, 0],
        "slots": [tables[5][0] * 64 + 40, tables[1][0] * 64, -1, -1],
        "context_lengths": [41, 1, 0, 0],
        "rows": [5, 1, 0, 0],
        "logit_rows": [0, 1, 2, 3],
    }


def test_positions_and_pages_may_be_large() -> None:
    """A million tokens, of which only the last is new, on the last pages of a cache of two billion slots."""
    step = Step([(5, 2**20 - 1, 1, 0)], 1, [-1])
    inputs, outputs = step.inputs(), step.outputs()
    inputs["tables"].copy_(2**27 - 1 - inputs["tables"])
    page = int(inputs["tables"][5, (2**20 - 1) // 16])
    prepare_inputs(**inputs, page_size=16, **outputs)
    assert outputs["slots"].tolist() == [page * 16 + 15]
    assert outputs["context_lengths"].tolist() == [2**20]


@pytest.mark.parametrize("wanted", [True, False])
def test_logit_rows_are_optional(wanted: bool) -> None:
    step = Step([(1, 3, 2, 0), (2, 0, 1, 2)], 3)
    outputs = step.outputs()
    if not wanted:
        del outputs["logit_rows"]
    prepare_inputs(**step.inputs(), page_size=16, **outputs)
    assert outputs["rows"].tolist() == [1, 2]
    assert not wanted or outputs["logit_rows"].tolist() == [1, 2]


def test_the_host_reads_no_tensor() -> None:
    step = Step([(1, 3, 2, 0)], 2)
    tensors = {name: tensor.to("meta") for name, tensor in (step.inputs() | step.outputs()).items()}
    with recorded_launches() as launches:
        prepare_inputs(**tensors, page_size=16)
        update_tables(tensors["tables"], torch.empty(5, 3, dtype=torch.int32, device="meta"))
    assert [launch.grid for launch in launches] == [(1, 1), (1,)]
