"""The real worker with faults in it, which signals set off: runs in the place of `preble.engine.worker`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from preble.engine import worker
from preble.engine.frames import FrameWriter
from preble.engine.messages import Launch

Flaw = Callable[[bytes], bytes]
"""What is sent in the place of a frame."""


def flipped(frame: bytes) -> bytes:
    middle = len(frame) // 2
    return frame[:middle] + bytes([frame[middle] ^ 1]) + frame[middle + 1 :]


def cut(frame: bytes) -> bytes:
    return frame[:-1]


def repeated(frame: bytes) -> bytes:
    return frame + frame


def lost(frame: bytes) -> bytes:
    return b""


FLAWS: tuple[Flaw, ...] = (flipped, cut, repeated, lost)

RAISE, EXHAUST = signal.SIGUSR1, signal.SIGUSR2
"""The next step raises; the next step runs out of memory."""
SPOIL = {flaw: signal.SIGRTMIN + number for number, flaw in enumerate(FLAWS)}
"""The next frame that the worker sends has this flaw."""


class FlawedWriter(FrameWriter):
    """Spoils a frame when it is ordered to."""

    orders: ClassVar[dict[str, Flaw]] = {}
    """By the name of a thread: what becomes of the next frame that it makes."""

    def frame(self, payload: bytes) -> bytes:
        frame = super().frame(payload)
        flaw = self.orders.pop(threading.current_thread().name, None)
        return frame if flaw is None else flaw(frame)


def serve(launch: Launch, parent: worker.Parent) -> None:
    """Serve as a worker does, but for what is ordered."""
    import torch

    from preble.engine.engine import Engine
    from preble.engine.host_runner import HostRunner
    from preble.engine.messages import Command, ResetCache

    errors: list[Exception] = []
    launched, obeyed = HostRunner.launch, Engine.obey

    def launch_step(self: HostRunner, plan: Any) -> Any:
        computed = launched(self, plan)
        if errors:
            raise errors[0]  # with the KV written, and nothing committed
        return computed

    def obey(self: Engine, command: Command) -> None:
        obeyed(self, command)
        if isinstance(command, ResetCache):
            self.scheduler.check()

    HostRunner.launch = launch_step  # type: ignore[method-assign]
    Engine.obey = obey  # type: ignore[method-assign]

    def order(number: int, _: object) -> None:
        if number == RAISE:
            errors.append(RuntimeError("chaos"))
        elif number == EXHAUST:
            errors.append(torch.OutOfMemoryError("chaos"))
        else:
            FlawedWriter.orders[threading.main_thread().name] = FLAWS[number - signal.SIGRTMIN]

    for number in (RAISE, EXHAUST, *SPOIL.values()):
        signal.signal(number, order)
    as_ever(launch, parent)


if __name__ == "__main__":
    as_ever = worker._serve
    worker._serve = serve
    worker.FrameWriter = FlawedWriter  # type: ignore[attr-defined]
    worker.main()
