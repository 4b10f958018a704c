"""QK norm, rotary embedding and the writing of K and V, against the reference in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from closeness import TOLERANCE, relative_error
from device import DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preble.kernels.fp8 import LARGEST, decoded, encoded
from preble.kernels.launch import recorded_launches
from preble.kernels.rotate_and_store import rotate_and_store, rotate_and_store_reference

SPARE = 3
"""Slots that no token takes."""


@dataclass(frozen=True)
class Case:
    """New tokens and a cache."""

    stored: list[bool]
    """For each token whether it has a slot."""
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    norm: bool = False
    seed: int = 0

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_dim


@dataclass
class Inputs:
    """Of `rotate_and_store`."""

    qkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    named: dict[str, object]

    @classmethod
    def make(cls, case: Case) -> Inputs:
        tokens, kv_heads, head_dim = len(case.stored), case.kv_heads, case.head_dim
        generator = torch.Generator().manual_seed(case.seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        # A view into something wider, which is poisoned beyond it.
        width = case.query_width + 2 * kv_heads * head_dim
        qkv = torch.full((tokens, width + 16), float("nan"), dtype=case.dtype, device=DEVICE)
        qkv = qkv[:, :width].copy_(random(tokens, width) * 3)
        # With a slot before the first, where a store to slot -1 would go.
        shape = (1 + tokens + SPARE, kv_heads, head_dim)
        if case.fp8:
            keys, values = (torch.full(shape, 0x7F, dtype=torch.uint8, device=DEVICE)[1:] for _ in range(2))
            # From what saturates to what is subnormal.
            scales = [torch.logspace(-3, 1, kv_heads).to(DEVICE), torch.logspace(1, -3, kv_heads).to(DEVICE)]
        else:
            keys, values = (torch.full(shape, float("nan"), dtype=case.dtype, device=DEVICE)[1:] for _ in range(2))
            scales = [None, None]
        slots = torch.randperm(tokens + SPARE, generator=generator)[:tokens]
        slots = slots.where(torch.tensor(case.stored, dtype=torch.bool), -1).to(DEVICE, torch.int32)
        angles = random(tokens, head_dim // 2) * 3
        weights = [(random(head_dim) + 1).to(DEVICE, case.dtype) if case.norm else None for _ in range(2)]
        named = {
            # Not a rotation unless the scaling of some rope types is 1.
            "cos": (angles.cos() * 1.25).to(DEVICE),
            "sin": (angles.sin() * 1.25).to(DEVICE),
            "slots": slots,
            "query_heads": case.query_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "q_norm": weights[0],
            "k_norm": weights[1],
            "eps": 0.5,
            "key_scales": scales[0],
            "value_scales": scales[1],
        }
        return cls(qkv, keys, values, named)

    def exact(self) -> Inputs:
        """What the reference makes of them in fp64, the cache without its scales."""
        cache = [
            torch.full(t.shape, float("nan"), dtype=torch.float64, device=DEVICE) for t in (self.keys, self.values)
        ]
        other = Inputs(self.qkv.double(), *cache, self.named | {"key_scales": None, "value_scales": None})
        rotate_and_store_reference(other.qkv, other.keys, other.values, **other.named)
        return other


def check(case: Case) -> None:
    inputs = Inputs.make(case)
    before, exact = inputs.qkv.clone(), inputs.exact()
    rotate_and_store(inputs.qkv, inputs.keys, inputs.values, **inputs.named)

    q, tolerance = slice(case.query_width), TOLERANCE[case.dtype]
    if case.stored:
        assert relative_error(inputs.qkv[:, q], exact.qkv[:, q]) < tolerance
    assert torch.equal(inputs.qkv[:, case.query_width :], before[:, case.query_width :])
    slots = inputs.named["slots"]
    taken = slots[slots >= 0].long()
    untouched = torch.ones(len(inputs.keys), dtype=torch.bool, device=DEVICE).index_fill_(0, taken, False)
    for cache, want, scales in (
        (inputs.keys, exact.keys, inputs.named["key_scales"]),
        (inputs.values, exact.values, inputs.named["value_scales"]),
    ):
        before_first = cache.as_strided(cache[0].shape, cache[0].stride(), 0)
        got, want = cache[taken], want[taken]
        if case.fp8:
            assert (cache[untouched] == 0x7F).all()
            assert (before_first == 0x7F).all()
            # The nearest of the values that there are: 4 bits of precision, and 2 ** -9 at least between them.
            want = (want / scales[:, None]).clamp(-LARGEST, LARGEST)
            allowed = want.abs().mul(2.0**-4).clamp(min=2.0**-10) + 10 * tolerance * want.abs()
            assert ((decoded(got).double() - want).abs() <= allowed).all()
        else:
            assert cache[untouched].isnan().all()
            assert before_first.isnan().all()
            if len(taken):
                assert relative_error(got, want) < tolerance
    if case.fp8:  # V is computed with a single rounding before that to 8 bits, as the division of torch is
        v = before[:, -case.kv_heads * case.head_dim :].unflatten(1, (case.kv_heads, -1))[slots >= 0]
        assert torch.equal(inputs.values[taken], encoded(v.float() / inputs.named["value_scales"][:, None]))


cases = st.builds(
    Case,
    stored=st.lists(st.sampled_from([True, True, False]), max_size=3),
    kv_heads=st.sampled_from([1, 2, 3, 8]),
    group=st.sampled_from([1, 4, 7, 8]),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    dtype=st.sampled_from(list(TOLERANCE)),
    fp8=st.booleans(),
    norm=st.booleans(),
    seed=st.integers(0, 99),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases)
@example(Case([]))
@example(Case([False]))
@example(Case([True], kv_heads=1, group=1, head_dim=256, fp8=True, norm=True))
@example(Case([True, False], kv_heads=3, group=7, head_dim=80, dtype=torch.float16, norm=True))
def test_agrees_with_the_reference(case: Case) -> None:
    check(case)


def test_dimensions_turn_in_pairs_by_the_angle_of_their_token() -> None:
    """Written out for one pair: a quarter turn sends (1, 2) to (-2, 1)."""
    qkv = torch.zeros(2, 3 * 64, device=DEVICE)
    qkv[1, 5], qkv[1, 37] = 1, 2
    angles = torch.zeros(2, 32)
    angles[1, 5] = torch.pi / 2
    cache = torch.zeros(2, 1, 64, device=DEVICE)
    slots = torch.tensor([-1, -1], dtype=torch.int32, device=DEVICE)
    heads = {"query_heads": 1, "kv_heads": 1, "head_dim": 64}
    rotate_and_store(qkv, cache, cache, cos=angles.cos().to(DEVICE), sin=angles.sin().to(DEVICE), slots=slots, **heads)
    expected = torch.zeros(2, 3 * 64)
    expected[1, 5], expected[1, 37] = -2, 1
    torch.testing.assert_close(qkv.cpu(), expected)
    assert not cache.any()


@pytest.mark.parametrize("head_dim", [64, 80])
def test_nan_stays_nan_in_8_bits(head_dim: int) -> None:
    """It must end the request that it belongs to, not pass for a number."""
    inputs = Inputs.make(Case([True], kv_heads=1, group=1, head_dim=head_dim, fp8=True))
    inputs.qkv[0, 2 * head_dim + 3] = float("nan")
    inputs.qkv[0, 2 * head_dim + 4] = float("-inf")
    rotate_and_store(inputs.qkv, inputs.keys, inputs.values, **inputs.named)
    stored = decoded(inputs.values[inputs.named["slots"].long()])[0, 0]
    assert stored[3].isnan()
    assert stored[4] == -LARGEST
    assert int(stored.isnan().sum()) == 1


def test_one_launch_for_any_number_of_tokens() -> None:
    """And nothing is asked of the tensors but their shape: "meta" has no values."""
    inputs = Inputs.make(Case([True, True]))
    meta = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in inputs.named.items()}
    with recorded_launches() as launches:
        rotate_and_store(inputs.qkv.to("meta"), inputs.keys.to("meta"), inputs.values.to("meta"), **meta)
    assert len(launches) == 1


def test_the_reference_saturates() -> None:
    inputs = Inputs.make(replace(Case([True]), fp8=True))
    inputs.qkv[:] = 1e4
    rotate_and_store_reference(inputs.qkv, inputs.keys, inputs.values, **inputs.named)
    assert decoded(inputs.values).nan_to_num().max() == LARGEST
