"""The writing of K and V that a model's own code computed, against the reference, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from closeness import TOLERANCE
from device import DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preble.kernels.fp8 import LARGEST, decoded
from preble.kernels.launch import recorded_launches
from preble.kernels.store_kv import store_kv, store_kv_reference

SPARE = 3
"""Slots that no token takes."""


@dataclass(frozen=True)
class Case:
    """New tokens and a cache."""

    stored: list[bool]
    """For each token whether it has a slot."""
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    cache: torch.dtype | None = None
    """None for that of the tokens; uint8 for e4m3."""
    gap: int = 16
    """Numbers between K of a token and K of the next; V has twice as many."""
    seed: int = 0


def make(case: Case) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """K, V and the cache, and what goes with them by name."""
    tokens, width = len(case.stored), case.kv_heads * case.head_dim
    generator = torch.Generator().manual_seed(case.seed)
    new = []
    for gap in (case.gap, 2 * case.gap):
        wide = torch.full((tokens, width + gap), float("nan"), dtype=case.dtype)
        wide[:, :width] = torch.randn(tokens, width, generator=generator) * 3
        new.append(wide.to(DEVICE)[:, :width].unflatten(1, (case.kv_heads, case.head_dim)))
    shape = (tokens + SPARE + 1, case.kv_heads, case.head_dim)
    poison = 0x7F if case.cache == torch.uint8 else float("nan")
    # What lies before the first slot is somebody else's.
    cache = [torch.full(shape, poison, dtype=case.cache or case.dtype, device=DEVICE)[1:] for _ in range(2)]
    slots = torch.randperm(tokens + SPARE, generator=generator)[:tokens]
    named = {"slots": slots.where(torch.tensor(case.stored, dtype=torch.bool), -1).to(DEVICE, torch.int32)}
    if case.cache == torch.uint8:  # from what saturates to what is subnormal
        named["key_scales"] = torch.logspace(-3, 1, case.kv_heads).to(DEVICE)
        named["value_scales"] = torch.logspace(1, -3, case.kv_heads).to(DEVICE)
    return [*new, *cache], named


cases = st.builds(
    Case,
    stored=st.lists(st.sampled_from([True, True, False]), max_size=3),
    kv_heads=st.sampled_from([1, 2, 3, 8]),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    dtype=st.sampled_from(list(TOLERANCE)),
    cache=st.sampled_from([None, torch.float16, torch.uint8]),
    gap=st.sampled_from([0, 1, 16]),
    seed=st.integers(0, 99),
)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """What it is a view of."""
    return tensor if tensor._base is None else tensor._base


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases)
@example(Case([]))
@example(Case([False]))
@example(Case([True, False, True], kv_heads=3, head_dim=80, cache=torch.uint8))
def test_agrees_with_the_reference(case: Case) -> None:
    tensors, named = make(case)
    before = [whole(tensor).clone() for tensor in tensors]
    store_kv_reference(*tensors, **named)
    wanted = [whole(tensor).clone() for tensor in tensors]
    for tensor, old in zip(tensors, before, strict=True):
        whole(tensor).copy_(old)
    store_kv(*tensors, **named)
    for tensor, want in zip(tensors, wanted, strict=True):
        assert torch.equal(whole(tensor).nan_to_num(1e4), want.nan_to_num(1e4))


def test_each_token_lies_in_its_slot() -> None:
    """Without the reference."""
    (k, v, keys, values), named = make(Case([True, False, True]))
    store_kv(k, v, keys, values, **named)
    slots = named["slots"].tolist()
    assert slots[1] == -1
    for token in (0, 2):
        assert torch.equal(keys[slots[token]], k[token])
        assert torch.equal(values[slots[token]], v[token])
    untouched = [slot for slot in range(len(keys)) if slot not in slots]
    assert keys[untouched].isnan().all()
    assert values[untouched].isnan().all()


@pytest.mark.parametrize("store", [store_kv, store_kv_reference])
def test_nan_stays_nan_in_8_bits(store: type[store_kv]) -> None:
    """It must end the request that it belongs to, not pass for a number."""
    (k, v, keys, values), named = make(Case([True], kv_heads=1, head_dim=80, cache=torch.uint8))
    v[0, 0, 3], v[0, 0, 4] = float("nan"), float("-inf")
    store(k, v, keys, values, **named)
    stored = decoded(values[named["slots"].long()])[0, 0]
    assert stored[3].isnan()
    assert stored[4] == -LARGEST
    assert int(stored.isnan().sum()) == 1


def test_one_launch_for_any_number_of_tokens() -> None:
    """And nothing is asked of the tensors but their shape: "meta" has no values."""
    tensors, named = make(Case([True, True]))
    with recorded_launches() as launches:
        store_kv(*(t.to("meta") for t in tensors), **{name: t.to("meta") for name, t in named.items()})
    assert len(launches) == 1
