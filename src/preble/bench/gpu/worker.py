"""The child's side: one task in a process of its own, so that what it breaks is broken for itself alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from preble.bench.gpu.parts import Task


@dataclass(frozen=True, slots=True)
class Order:
    """What a process is told."""

    task: Task
    file: Path
    """For the record."""
    log: Path
    """For whatever libraries print."""
    dry_run: bool
    quick: bool
    ceilings: Mapping[str, float]


def work(order: Order, progress: Connection) -> None:
    """Carry out an order. Does not return after an error: a lost CUDA context cannot be cleaned up."""
    os.setsid()  # whoever ends this process by its group also ends those that it started
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from preble.bench.gpu.record import Record

    record = Record(order.task.name, order.file, progress.send, order.ceilings)
    try:
        import torch

        from preble.bench.gpu.place import Place

        place = Place.make(dry_run=order.dry_run, quick=order.quick)
        with torch.no_grad():
            order.task.load()(place, record, order.task.shard)
        record.end()
    except BaseException as error:
        record.end(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    progress.close()
