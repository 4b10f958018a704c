"""The linear layer gives what PyTorch's gives, packed or not, and keeps one copy of its weight."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn.functional import linear

from preble.engine.dtypes import resolve_dtype
from preble.engine.linear import Linear
from preble.errors import InvalidRequest

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 7, 16, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_same_as_pytorch(dtype: torch.dtype, rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, offset, x, residual = (
        torch.randn(shape, generator=generator).to(dtype) for shape in [(24, 33), (24,), (rows, 33), (rows, 24)]
    )
    layer = Linear(weight / 8, offset if bias else None)
    exact = linear(x.double(), (weight / 8).double(), offset.double() if bias else None)
    before = residual.clone()
    torch.testing.assert_close(layer(x).double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    exact += residual.double()
    torch.testing.assert_close(layer(x, residual).double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(residual, before)


def test_the_original_layout_is_not_kept() -> None:
    weight = torch.randn(64, 64)
    original = weakref.ref(weight)
    layer = Linear(weight)
    if not layer.packed:
        pytest.skip("this build of PyTorch cannot pack weights")
    del weight
    assert original() is None


def test_auto_dtype() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert resolve_dtype("auto", stored="bfloat16", device=CPU) == (torch.bfloat16 if native else torch.float32)
    assert resolve_dtype("auto", stored="float16", device=CPU) == torch.float32
    assert resolve_dtype("auto", stored="float64", device=CPU) == torch.float32
    assert resolve_dtype("auto", stored="float16", device=torch.device("cuda")) == torch.float16
    assert resolve_dtype("bfloat16", stored="float32", device=CPU) == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "fp32", "", "float64"])
def test_a_dtype_that_is_none(dtype: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'auto' or one of 'float32'.* not {dtype!r}"):
        resolve_dtype(dtype, stored="float32", device=CPU)
