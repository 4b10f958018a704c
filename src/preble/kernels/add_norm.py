"""Residual addition and RMSNorm in one pass over the hidden state: read twice, written twice, .

A program takes one row and keeps it in registers between the sum of squares and the product. RMSNorm: Zhang and
Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preble.kernels.launch import launch
from preble.kernels.tiles import power_of_two


@triton.jit
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    out,
    eps,
    x_stride: tl.constexpr,
    residual_stride: tl.constexpr,
    out_stride: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < WIDTH
    there = residual + row * residual_stride + columns
    stream = tl.load(there, mask=inside, other=0.0)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if x is not None:
        added = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
        # What is normed is what the residual stream holds from now on, rounding included.
        stream = (stream.to(tl.float32) + added.to(tl.float32)).to(stream.dtype)
        tl.store(there, stream, mask=inside)
    hidden = stream.to(tl.float32)
    factor = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / WIDTH + eps)
    tl.store(out + row * out_stride + columns, (hidden * factor * scale).to(out.dtype.element_ty), mask=inside)


def add_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """`residual += x`, then `out = residual / sqrt(mean(residual²) + eps) * weight`. Computed in fp32.

    x: [N, width] or None, which leaves the residual as it is.
    residual, out: [N, width]; `out` may be `x`. The last dimension of all three is contiguous.
    weight: [width]. Widths up to 16,384 stay in registers.
    """
    rows, width = residual.shape
    tile = power_of_two(width)
    launch(
        _add_norm_kernel,
        (rows,),
        warps=_warps(tile),
        stages=1,
        x=x,
        residual=residual,
        weight=weight,
        out=out,
        eps=eps,
        x_stride=0 if x is None else x.stride(0),
        residual_stride=residual.stride(0),
        out_stride=out.stride(0),
        WIDTH=width,
        TILE=tile,
    )


def _warps(tile: int) -> int:
    """16 elements a thread, two of the widest loads in 16 bits, as far as a program may have threads."""
    return min(max(tile // (32 * 16), 1), 16)


def add_norm_reference(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """`add_norm` in PyTorch; fp64 tensors are computed in fp64."""
    precise = torch.promote_types(residual.dtype, torch.float32)
    if x is not None:
        residual.copy_(residual.to(precise) + x.to(precise))
    hidden = residual.to(precise)
    out.copy_(hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight.to(precise))
