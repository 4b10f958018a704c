"""Launches go to the GPU or the interpreter, or are recorded."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE

from preble.kernels.architecture import SM_80, SM_90, architecture_of, assume
from preble.kernels.launch import launch, recorded_launches


@triton.jit
def _add(out, amount, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    place = out + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(place, tl.load(place) + amount)


def _add_to(out: torch.Tensor, amount: int, programs: int) -> None:
    launch(_add, (programs,), warps=1, stages=2, out=out, amount=amount, WIDTH=4)


def test_a_launch_runs_every_program_of_its_grid() -> None:
    out = torch.zeros(12, dtype=torch.int32, device=DEVICE)
    _add_to(out, 5, programs=2)
    assert out.tolist() == [5] * 8 + [0] * 4


def test_an_empty_grid_runs_and_records_nothing() -> None:
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    _add_to(out, 5, programs=0)
    launch(_add, (3, 0), warps=1, stages=1, out=out, amount=5, WIDTH=4)
    with recorded_launches() as launches:
        _add_to(out, 5, programs=0)
    assert out.tolist() == [0] * 4
    assert launches == []


def test_a_recorded_launch_does_not_run_and_keeps_everything() -> None:
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    with recorded_launches() as launches:
        _add_to(out, 5, programs=1)
        _add_to(out, 6, programs=1)
    assert out.tolist() == [0] * 4
    first, second = launches
    assert (first.kernel, first.grid, first.warps, first.stages) == (_add, (1,), 1, 2)
    assert first.arguments == {"out": out, "amount": 5, "WIDTH": 4}
    assert second.arguments["amount"] == 6


def test_recordings_nest_and_end() -> None:
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    with recorded_launches() as outer:
        with recorded_launches() as inner:
            _add_to(out, 1, programs=1)
        _add_to(out, 2, programs=1)
    assert [launch.arguments["amount"] for launch in inner] == [1]
    assert [launch.arguments["amount"] for launch in outer] == [2]
    with pytest.raises(ZeroDivisionError), recorded_launches():
        1 / 0  # noqa: B018
    _add_to(out, 3, programs=1)
    assert out.tolist() == [3] * 4


def test_launches_are_recorded_for_tensors_that_have_no_memory() -> None:
    out = torch.empty(1 << 40, dtype=torch.bfloat16, device="meta")
    with recorded_launches() as launches:
        _add_to(out, 1, programs=1 << 30)
    assert launches[0].arguments["out"] is out


def test_tensors_on_no_gpu_lie_on_the_assumed_architecture() -> None:
    device = torch.device("meta")
    default = architecture_of(device)
    with assume(SM_80):
        assert architecture_of(device) == SM_80
        with assume(SM_90):
            assert architecture_of(device) == SM_90
        assert architecture_of(torch.device("cpu")) == SM_80
    with pytest.raises(ZeroDivisionError), assume(SM_80):
        1 / 0  # noqa: B018
    assert architecture_of(device) == default
