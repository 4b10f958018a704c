"""Runs steps on the CPU: each is computed where it is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preble.engine.batch import ForwardBatch, Model, SequenceSlice
from preble.engine.kv_cache import KVCache
from preble.engine.sampler import Sampler, SampleResult, SamplingState
from preble.sched.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class Computed:
    """A step that is done."""

    outcome: SampleResult

    def result(self) -> SampleResult:
        """What it sampled."""
        return self.outcome


class HostRunner:
    """A `Runner` over PyTorch's CPU kernels and the host's own sampler.

    Args:
        model: may be shared with other runners; it is only read.
        pages: KV pages to reserve.
        page_size: tokens in a page.
    """

    ahead = 0

    def __init__(self, model: Model, *, pages: int, page_size: int) -> None:
        self.config = model.config
        self.device = model.device
        self.pages = pages
        self.page_size = page_size
        self.attention = model.attention
        self._model = model
        self._sampler = Sampler()
        self._kv = KVCache(
            layers=model.config.layers,
            pages=pages,
            page_size=page_size,
            kv_heads=model.config.kv_heads,
            head_dim=model.config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )

    def lockstep(self, state: SamplingState) -> bool:
        """No: with `ahead` of 0 every step waits for the one before."""
        return False

    def launch(self, plan: StepPlan) -> Computed:
        """Compute a step."""
        logits = self._model.forward(self._prepare(plan), self._kv)
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        states = [chunk.sequence.payload.sampling for chunk in sampling]
        return Computed(self._sampler.sample(logits, states, [chunk.start + chunk.count for chunk in sampling]))

    def _prepare(self, plan: StepPlan) -> ForwardBatch:
        """Flatten the plan into the model's input."""
        page_size = self.page_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sequences: list[SequenceSlice] = []
        logit_rows: list[int] = []
        for chunk in plan.chunks:
            sequence, start, stop = chunk.sequence, chunk.start, chunk.start + chunk.count
            runs = sequence.table.slots(stop, page_size)
            sequences.append(SequenceSlice(len(token_ids), chunk.count, stop, runs))
            if chunk.count == 1:
                token_ids.append(int(sequence.tokens[start]))
                positions.append(start)
                slots.append(sequence.table.pages[start // page_size] * page_size + start % page_size)
            else:
                token_ids += sequence.tokens[start:stop].tolist()
                positions += range(start, stop)
                slots += _tail(runs, chunk.count)
            if chunk.samples:
                logit_rows.append(len(token_ids) - 1)
        device = self._model.device
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            sequences=sequences,
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        )


def _tail(runs: tuple[tuple[int, int], ...], count: int) -> list[int]:
    """The last `count` slots of the runs, in order."""
    spans: list[range] = []
    for start, length in reversed(runs):
        taken = min(length, count)
        spans.append(range(start + length - taken, start + length))
        count -= taken
        if not count:
            break
    return [slot for span in reversed(spans) for slot in span]
