"""A step's rows of logits: which chunks they belong to, who samples from them, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from preble.engine.device.queue import Mark
from preble.engine.device.sampling import samples_on_host
from preble.engine.sampler import Sampler, SampleResult, SamplingState
from preble.sched.step_plan import Chunk, StepPlan

Ints = NDArray[np.int32]


class HostSample(NamedTuple):
    """A token that the host chooses."""

    chunk: int
    """Which of the plan's chunks that sample."""
    state: SamplingState
    position: int


@dataclass(frozen=True, slots=True)
class LogitRows:
    """The R rows of logits of a step."""

    chunks: list[int]
    """The chunk of each row, by its place in the batch."""
    entries: Ints
    """[R]: the flat entry of the batch that each row comes from."""
    positions: Ints
    """[R]: index of the token to sample in its request."""
    on_device: NDArray[np.bool_]
    """[R]: whether the device samples from the row: not for chunks that don't sample, nor where the host does."""
    places: list[int]
    """The row of each chunk that samples, in the order of the plan."""
    on_host: list[HostSample]

    @classmethod
    def of(cls, batch: list[Chunk], plan: StepPlan, *, every: bool) -> LogitRows:
        """For the chunks of `plan` in the order of the batch; `every` one has a row, or those that sample."""
        ends = accumulate(chunk.count for chunk in batch)
        rows = [
            (at, end - 1) for at, (chunk, end) in enumerate(zip(batch, ends, strict=True)) if every or chunk.samples
        ]
        chunks = [batch[at] for at, _ in rows]
        row_of = {chunk.sequence: row for row, chunk in enumerate(chunks)}
        on_host = [samples_on_host(chunk.sequence.payload.sampling) for chunk in chunks]
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        places = [row_of[chunk.sequence] for chunk in sampling]
        return cls(
            chunks=[at for at, _ in rows],
            entries=np.array([entry for _, entry in rows], np.int32),
            positions=np.array([chunk.start + chunk.count for chunk in chunks], np.int32),
            on_device=np.array(
                [chunk.samples and not host for chunk, host in zip(chunks, on_host, strict=True)], np.bool_
            ),
            places=places,
            on_host=[
                HostSample(index, chunk.sequence.payload.sampling, chunk.start + chunk.count)
                for index, (chunk, place) in enumerate(zip(sampling, places, strict=True))
                if on_host[place]
            ],
        )

    def table_rows(self, numbers: list[int]) -> Ints:
        """[R]: the table row to sample for, given those of the batch's chunks; -1 where the device does not sample."""
        rows = np.array([numbers[at] for at in self.chunks], np.int32)
        return np.where(self.on_device, rows, np.int32(-1))


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step on its way through the device."""

    rows: LogitRows
    tokens: torch.Tensor
    """int32 [R] in host memory, there once `done`: the token of each row, -1 where its logits were invalid."""
    logits: torch.Tensor | None
    """[H, vocabulary] in host memory, there once `done`: one row for each of `rows.on_host`."""
    done: Mark

    def result(self) -> SampleResult:
        """Wait for the device, and choose what is left to the host."""
        self.done.wait()
        sampled = self.tokens.tolist()
        tokens = [sampled[place] for place in self.rows.places]
        result = SampleResult(tokens, [None] * len(tokens))
        if self.logits is not None:
            on_host = self.rows.on_host
            chosen = Sampler().sample(
                self.logits.float(), [one.state for one in on_host], [one.position for one in on_host]
            )
            for one, token, logprob in zip(on_host, chosen.tokens, chosen.logprobs, strict=True):
                tokens[one.chunk] = token
                result.logprobs[one.chunk] = logprob
        result.invalid.extend(index for index, token in enumerate(tokens) if token < 0)
        return result
