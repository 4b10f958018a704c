"""Kernels with one fault each, as a module of variants for `preble.kernels.ahead`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from preble.kernels.launch import launch
from preble.kernels.variants import Variant

WIDTH = 1024


@triton.jit(do_not_specialize=["rows"])
def _double(source, out, rows, stride, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    values = tl.load(source + row * stride + columns, mask=row < rows)
    tl.store(out + row * stride + columns, values * 2, mask=row < rows)


@triton.jit
def _double_specialised(source, out, rows, stride, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    values = tl.load(source + row * stride + columns, mask=row < rows)
    tl.store(out + row * stride + columns, values * 2, mask=row < rows)


@triton.jit
def _product(a, b, out, steps, SIZE: tl.constexpr, INNER: tl.constexpr):  # type: ignore[no-untyped-def]
    """[SIZE, steps * INNER] times its transpose-shaped partner, both stored in blocks."""
    rows = tl.arange(0, SIZE)
    inner = tl.arange(0, INNER)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for step in range(steps):
        left = tl.load(a + step * SIZE * INNER + rows[:, None] * INNER + inner[None, :])
        right = tl.load(b + step * SIZE * INNER + inner[:, None] * SIZE + rows[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + rows[:, None] * SIZE + rows[None, :], total)


@triton.jit
def _not_defined(out):  # type: ignore[no-untyped-def]
    tl.store(out, tl.load(out) @ 1)


def _rows(kernel: object, size: int, *, stride: int = WIDTH, offset: int = 0) -> None:
    memory = torch.empty(size * stride + WIDTH, dtype=torch.bfloat16, device="meta")
    launch(
        kernel, (size,), warps=4, stages=1, source=memory[offset:], out=memory, rows=size, stride=stride, WIDTH=WIDTH
    )


def _multiply(size: int, *, side: int, inner: int, warps: int, stages: int) -> None:
    blocks = torch.empty(8 * side * inner, dtype=torch.bfloat16, device="meta")
    out = torch.empty(side, side, dtype=torch.float32, device="meta")
    launch(_product, (size,), warps=warps, stages=stages, a=blocks, b=blocks, out=out, steps=8, SIZE=side, INNER=inner)


def _fail(size: int) -> None:
    launch(_not_defined, (size,), warps=4, stages=1, out=torch.empty(1, device="meta"))


def variants(full: bool) -> Iterator[Variant]:
    """What is good first, then the faults, named for what must be said of them."""
    yield Variant("good copy", partial(_rows, _double))
    yield Variant("good product", partial(_multiply, side=64, inner=64, warps=4, stages=2))
    yield Variant("the same product", partial(_multiply, side=64, inner=64, warps=4, stages=2))
    yield Variant("odd stride", partial(_rows, _double, stride=WIDTH + 1))
    yield Variant("odd address", partial(_rows, _double, offset=1))
    yield Variant("compiled again", partial(_rows, _double_specialised))
    yield Variant("compiled again, knowingly", partial(_rows, _double_specialised), {"_double_specialised": 3})
    yield Variant("spills", partial(_multiply, side=256, inner=32, warps=4, stages=1))
    yield Variant("much shared memory", partial(_multiply, side=128, inner=128, warps=8, stages=5))
    yield Variant("cannot be compiled", _fail)
