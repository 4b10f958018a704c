"""Tasks for the GPU benchmark that go wrong in every way."""

from __future__ import annotations

import os
import signal

from preble.bench.gpu.place import Place
from preble.bench.gpu.record import Record


def succeed(place: Place, record: Record, shard: tuple[int, int]) -> None:
    record.figure("a figure", 2.0, "x", spread=(1.0, 3.0))
    record.check("a check", 0.001, 0.01)


def fail(place: Place, record: Record, shard: tuple[int, int]) -> None:
    record.figure("known before", 1.0, "x")
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def crash(place: Place, record: Record, shard: tuple[int, int]) -> None:
    record.figure("known before", 1.0, "x")
    os.kill(os.getpid(), signal.SIGSEGV)


def find_a_wrong_kernel(place: Place, record: Record, shard: tuple[int, int]) -> None:
    record.check("a kernel", 0.5, 0.01)


def hang(place: Place, record: Record, shard: tuple[int, int]) -> None:
    record.say("hanging")
    signal.pause()
