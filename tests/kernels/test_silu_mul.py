"""The gated activation, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from closeness import TOLERANCE, relative_error
from device import DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preble.kernels.silu_mul import silu_mul, silu_mul_reference


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 3),
    inner=st.sampled_from([1024, 4864, 5632, 11008, 14336]) | st.integers(1, 3000),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
@example(rows=2, inner=1, dtype=torch.float32, seed=0)
@example(rows=1, inner=1025, dtype=torch.float16, seed=0)
def test_agrees_with_the_reference(rows: int, inner: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.full((rows, 2 * inner + 8), float("nan"), dtype=dtype, device=DEVICE)[:, : 2 * inner]
    gate_up.copy_(torch.randn(rows, 2 * inner, generator=generator) * 4)
    before = gate_up.clone()
    exact = torch.empty(rows, inner, dtype=torch.float64, device=DEVICE)
    silu_mul_reference(gate_up.double(), exact)
    wider = torch.full((rows, inner + 8), 7.0, dtype=dtype, device=DEVICE)
    wider[:, :inner] = float("nan")
    silu_mul(gate_up, wider[:, :inner])
    if rows:
        assert relative_error(wider[:, :inner], exact) < TOLERANCE[dtype]
    assert (wider[:, inner:] == 7.0).all()
    assert torch.equal(gate_up, before)


# The interpreter computes with numpy, which warns of what a GPU does silently: exp(3e38) is infinite.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_large_gates_neither_overflow_nor_vanish() -> None:
    gates = torch.tensor([[-3e38, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 3e38]], device=DEVICE)
    out = torch.full_like(gates, float("nan"))
    silu_mul(torch.cat([gates, torch.ones_like(gates)], 1), out)
    torch.testing.assert_close(out, gates.clamp(min=0), rtol=1e-6, atol=1e-30)


def test_nan_stays_in_its_place() -> None:
    gate_up, out = torch.ones(2, 20, device=DEVICE), torch.empty(2, 10, device=DEVICE)
    gate_up[0, 3] = gate_up[1, 17] = float("nan")
    silu_mul(gate_up, out)
    assert out.isnan().nonzero().tolist() == [[0, 3], [1, 7]]
