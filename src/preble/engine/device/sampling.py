"""Choosing the next tokens on the device, so that the next step need not wait for the host to know them."""

from __future__ import annotations

from collections.abc import Sequence as Several

import numpy as np
import torch
from numpy.typing import NDArray

from preble.engine.device.rows import Row
from preble.engine.sampler import SamplingState
from preble.kernels.operations import Operations
from preble.kernels.sampling import SamplingWorkspace
from preble.kernels.sampling_rows import WORDS, SamplingRows, count_tokens, fits, packed_row
from preble.sampling import SamplingParams


def samples_on_host(state: SamplingState) -> bool:
    """Whether the host has to choose a request's tokens: it reports log-probabilities, or its lists are too long."""
    return state.params.logprobs is not None or not fits(state.params, state.stop_ids.tolist())


class DeviceSampling:
    """The sampling parameters of every row, and what was sampled in it last.

    Args:
        rows: requests at once.
        vocabulary_size: columns of the logits.
        operations: which kernels.
        device: where the logits lie.
    """

    def __init__(self, rows: int, vocabulary_size: int, *, operations: Operations, device: torch.device) -> None:
        self.last_tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tokens = torch.empty(rows, dtype=torch.int32, device=device)
        self._workspace = SamplingWorkspace.allocate(rows, vocabulary_size, device)
        self._operations = operations
        self._rows = SamplingRows.allocate(rows, device)
        self._counts = torch.zeros(rows, vocabulary_size, dtype=torch.int16, device=device)
        """How often tokens occur in each row, where the request asks for penalties."""

    def arrays(self, new: Several[Row]) -> list[NDArray[np.int32]]:
        """What `enter` needs of requests that got a row, for the step's one copy."""
        packed = np.zeros((len(new), WORDS), np.int32)
        penalised: list[NDArray[np.int32]] = []
        for words, row in zip(packed, new, strict=True):
            state: SamplingState = row.sequence.payload.sampling
            if samples_on_host(state):
                words[:] = packed_row(-1, SamplingParams(), seed=0, prompt_length=0)
                continue
            words[:] = packed_row(
                row.number,
                state.params,
                seed=state.seed,
                prompt_length=row.sequence.prompt_length,
                stop_ids=state.stop_ids.tolist(),
                count_row=-1 if state.seen is None else row.number,
            )
            if state.seen is not None:
                tokens, length = row.sequence.tokens, row.sequence.prompt_length
                penalised += [tokens[:length], tokens[length:]]
        return [packed, *penalised]

    def enter(self, new: Several[Row], arrays: Several[torch.Tensor]) -> None:
        """Take in what `arrays` made of `new`, now on the device."""
        packed, *penalised = arrays
        if not new:
            return
        self._operations.write_sampling_rows(self._rows, packed)
        counted = [
            row
            for row in new
            if (state := row.sequence.payload.sampling).seen is not None and not samples_on_host(state)
        ]
        for row, prompt, output in zip(counted, penalised[::2], penalised[1::2], strict=True):
            count_tokens(self._counts, row.number, prompt, output)

    def sample(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens int32 [R] for logits [R, vocabulary] of requests in `rows` int32 [R] (-1: none) at `positions`.

        A token is -1 where there is no request or its logits are invalid. Valid until the next call.
        """
        tokens = self._tokens[: len(logits)]
        self._operations.sample(
            logits,
            tokens,
            self.last_tokens,
            rows=rows,
            positions=positions,
            params=self._rows,
            counts=self._counts,
            workspace=self._workspace,
        )
        return tokens
