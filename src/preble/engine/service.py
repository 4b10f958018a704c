"""The life of a running engine: take commands, step, report, until told to end."""

from __future__ import annotations

from collections.abc import Callable

import torch

from preble.engine.engine import Engine
from preble.engine.messages import Command, StepReport, Submit


def serve(engine: Engine, take: Callable[[bool], list[Command] | None], report: Callable[[StepReport], object]) -> None:
    """Step an engine until `take` gives `None`. Errors of a step come out.

    Args:
        engine: belongs to the calling thread from now on.
        take: the commands that have come since the last call; `None` to end. Called with True where there is nothing
            to compute: then it waits for a command.
        report: is told of every step, and so of every command taken; of new requests before the first step with them.
    """
    with torch.inference_mode():
        while (commands := take(not engine.has_work)) is not None:
            for command in commands:
                engine.obey(command)
            if not engine.paused and any(isinstance(command, Submit) for command in commands):
                # Before the step that may be the last: whoever is in it when it fails is suspected, whoever was still
                # on the way is not.
                report(engine.received())
            report(engine.step())
