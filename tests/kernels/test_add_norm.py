"""Residual addition and RMSNorm, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from closeness import TOLERANCE, relative_error
from device import DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preble.kernels.add_norm import add_norm, add_norm_reference


def poisoned(rows: int, width: int, dtype: torch.dtype, *, gap: int = 8) -> torch.Tensor:
    """NaN everywhere; rows lie `gap` elements apart."""
    return torch.full((rows, width + gap), float("nan"), dtype=dtype, device=DEVICE)[:, :width]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 3),
    width=st.sampled_from([64, 200, 896, 1024, 2048, 3584, 4096, 5120, 8192, 16384]) | st.integers(1, 1000),
    dtype=st.sampled_from(list(TOLERANCE)),
    added=st.booleans(),
    in_place=st.booleans(),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    eps=st.sampled_from([1e-6, 0.5]),
    seed=st.integers(0, 99),
)
@example(rows=1, width=16384, dtype=torch.float32, added=True, in_place=True, magnitude=1.0, eps=1e-5, seed=0)
@example(rows=2, width=1, dtype=torch.float32, added=True, in_place=False, magnitude=1.0, eps=1e-5, seed=0)
def test_agrees_with_the_reference(
    rows: int, width: int, dtype: torch.dtype, added: bool, in_place: bool, magnitude: float, eps: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = poisoned(rows, width, dtype).copy_(random(rows, width) * magnitude) if added else None
    residual = poisoned(rows, width, dtype).copy_(random(rows, width) * magnitude)
    weight = (random(width) + 1).to(DEVICE, dtype)
    before = residual.clone()
    sums = before if x is None else (before.float() + x.float()).to(dtype)
    exact = torch.empty(rows, width, dtype=torch.float64, device=DEVICE)
    add_norm_reference(None, sums.double(), weight, eps, exact)

    out = x if in_place and x is not None else poisoned(rows, width, dtype)
    add_norm(x, residual, weight, eps, out)
    assert torch.equal(residual, sums)
    if rows:
        assert relative_error(out, exact) < TOLERANCE[dtype]


def test_a_row_of_zeros_stays_one() -> None:
    residual, out = torch.zeros(2, 96, device=DEVICE), poisoned(2, 96, torch.float32)
    add_norm(torch.zeros_like(residual), residual, torch.ones(96, device=DEVICE), 1e-6, out)
    assert torch.equal(out, torch.zeros_like(out))


# The interpreter computes with numpy, which warns of what a GPU does silently: infinity times 0 is not a number.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    residual, out = torch.ones(3, 96, device=DEVICE), poisoned(3, 96, torch.float32)
    residual[1, 5] = bad
    add_norm(None, residual, torch.ones(96, device=DEVICE), 0.0, out)
    assert not out[1, 5].isfinite()
    torch.testing.assert_close(out[::2], torch.ones_like(out[::2]))


def test_the_reference_is_the_norm_of_torch() -> None:
    x, residual, weight = torch.randn(3, 5, 40).double().unbind()
    want = torch.nn.functional.rms_norm(x + residual, (40,), weight[0], 1e-3)
    out = torch.empty_like(x)
    add_norm_reference(x, residual, weight[0], 1e-3, out)
    torch.testing.assert_close(out, want)
