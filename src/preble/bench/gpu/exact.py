"""Attention by its definition in fp64, and what kernels are compared with it by."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from preble.bench.gpu.made_kv import MadeKV
from preble.bench.gpu.place import Place
from preble.bench.gpu.record import Record

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
"""Of the relative error."""


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """‖out - exact‖ / ‖exact‖; infinite for NaN, 0 for two empty tensors."""
    out, exact = out.double(), exact.double()
    error = float((out - exact).norm() / exact.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def exact_attention(
    q: torch.Tensor,
    kv: MadeKV,
    query_lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attention of the last `query_lengths` tokens of each sequence, fp64 like q [N, query_heads, head_dim].

    Sequences without tokens get zeros.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // kv.keys.shape[1]
    begin = 0
    for sequence, (count, length) in enumerate(zip(query_lengths, kv.context_lengths.tolist(), strict=True)):
        rows = slice(begin, begin + count)
        begin += count
        if not length:
            continue
        k, v = (x.repeat_interleave(group, 1) for x in kv.exact(sequence))
        scores = torch.einsum("qhd,thd->hqt", q[rows].double(), k) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        tokens = torch.arange(length, device=q.device)
        positions = tokens[length - count :, None]
        seen = tokens <= positions
        if window is not None:
            seen &= tokens > positions - window
        out[rows] = torch.einsum("hqt,thd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
    return out


def varied(options: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """`count` choices: first that of each option's first value, then mixed ones in which no value is rarer than
    another. The same every time."""
    columns = {}
    for name, values in options.items():
        column = [values[index % len(values)] for index in range(count - 1)]
        random.Random(name).shuffle(column)
        columns[name] = [values[0], *column]
    return [{name: columns[name][index] for name in options} for index in range(count)]


def check_cases(
    place: Place,
    record: Record,
    kernel: str,
    cases: Sequence[Mapping[str, Any]],
    shard: tuple[int, int],
    run: Callable[..., tuple[Callable[[], torch.Tensor], torch.Tensor, torch.dtype]],
) -> None:
    """Check a kernel in every case of this task's share.

    `run(place, seed, **case)` gives what calls the kernel on poisoned memory, the exact answer, and the dtype of the
    kernel. It is called twice: the same bits must come out, or the kernel has a race.
    """
    first, step = shard
    mine = list(enumerate(cases))[first::step]
    for index, case in mine:
        name = f"{kernel}: {described(case)}"
        try:
            call, exact, dtype = run(place, index, **case)
            out = call()
            place.synchronize()
            record.check(name, relative_error(out, exact), LIMITS[dtype])
            again = call()
            place.synchronize()
            record.check(f"{name}, again", float(not same_bits(out, again)), 0.0)
        except Exception as error:  # of the kernel, of Triton's compiler, of CUDA: the other cases still tell something
            record.failed_check(name, error)
            if "CUDA error" in str(error):
                raise  # the context is lost, and so would be all further cases
    record.say(f"{len(mine)} cases of {kernel} checked")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaN included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def described(case: Mapping[str, Any]) -> str:
    """A case in words."""
    return ", ".join(f"{name} {str(value).removeprefix('torch.')}" for name, value in case.items())
