"""The order in which a device does what it is told, and how the host waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class Mark(Protocol):
    """A place in a queue."""

    def wait(self) -> None:
        """Block until everything queued before it is done."""
        ...


class Queue(Protocol):
    """One runner's work, done in order."""

    captures: bool
    """Whether work can be captured as a CUDA graph."""

    @contextmanager
    def use(self) -> Iterator[None]:
        """Within it, operations are queued here."""
        ...

    def mark(self) -> Mark:
        """The place behind everything queued so far."""
        ...

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised host memory that copies can be queued from and to."""
        ...

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """The most device memory that `work` takes at any time, beyond what was taken before."""
        ...


class CudaQueue:
    """A CUDA stream; host memory is pinned."""

    captures = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def use(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def mark(self) -> CudaMark:
        mark = CudaMark()
        mark.event.record()
        return mark

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        with self.use():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before


class CudaMark:
    """A CUDA event on the current stream."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()


class HostQueue:
    """Work on the CPU, which is done as soon as it is told: the interpreter, and the kernels' references."""

    captures = False

    @contextmanager
    def use(self) -> Iterator[None]:
        yield

    def mark(self) -> Done:
        return Done()

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        work()
        return 0


class Done:
    """A place that everything is before."""

    def wait(self) -> None:
        pass


def make_queue(device: torch.device) -> Queue:
    """A queue of its own on a device."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue()
