"""What the sampler on the GPU knows of each request: a table with one row per request, and counts for penalties.

A row is 96 32-bit words, floats and the seed by their bits, so that all rows that a step changes travel in one copy and
are entered by one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from preble.errors import InvalidRequest
from preble.kernels.launch import launch
from preble.sampling import SamplingParams

MAX_STOP_IDS = 16
"""Stop tokens that a row can bar."""
MAX_BIASES = 32
"""Logit biases that a row can hold."""

# The words of a row.
ROW = tl.constexpr(0)  # which row this is
STEPS = tl.constexpr(1)  # fp32: depth steps per logit, DEPTH_STEPS / temperature; 0 is greedy
TOP_P = tl.constexpr(2)  # fp32
TOP_K = tl.constexpr(3)  # 0 keeps all
DEEPEST = tl.constexpr(4)  # the largest depth kept: min_p
REPETITION = tl.constexpr(5)  # fp32
PRESENCE = tl.constexpr(6)  # fp32
FREQUENCY = tl.constexpr(7)  # fp32
COUNT_ROW = tl.constexpr(8)  # the row of `counts`, -1 without penalties
BARRED_UNTIL = tl.constexpr(9)  # stop tokens are barred at positions below
SEED = tl.constexpr(10)  # two words, the lower first
STOPS = tl.constexpr(12)  # how many stop tokens follow
BIASES = tl.constexpr(13)  # how many biases follow
STOP_IDS = tl.constexpr(16)
BIAS_IDS = tl.constexpr(32)
BIAS_VALUES = tl.constexpr(64)  # fp32
WORDS = 96

DEPTH_STEPS = 2.0**24
"""Depth, how far a scaled logit lies below the row's largest, counts in steps of 2**-24."""
BOTTOM = int(-math.log(2e-35) * DEPTH_STEPS)
"""The largest depth that is ever kept; 80 below the largest, as on the CPU."""
LOWEST_BIAS = float(np.finfo(np.float32).min)
"""A lower one bans its token."""
COOLEST, HOTTEST = 1e-30, 1e30
"""Temperatures beyond these act alike."""

IN_PROMPT = -(1 << 15)
"""The bit of a count that marks the tokens of the prompt."""
MOST = (1 << 15) - 1
"""No token is counted more often."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The table. Row numbers are those of the page tables: one per request on the device."""

    table: torch.Tensor
    """int32 [R, WORDS]."""

    @classmethod
    def allocate(cls, rows: int, device: torch.device | str) -> SamplingRows:
        """Rows are greedy until they are written."""
        table = torch.zeros(rows, WORDS, dtype=torch.int32, device=device)
        table[:, COUNT_ROW.value] = -1
        return cls(table)

    def write(self, updates: torch.Tensor) -> None:
        """Enter rows as `packed_row` gives them.

        updates: int32 [U, WORDS] on the device, contiguous. A row of -1 is padding; no row is named twice.
        """
        launch(
            _write_rows_kernel, (len(updates),), warps=1, stages=1, table=self.table, updates=updates, WORDS=WORDS,
            TILE=128, ROW=ROW.value,
        )  # fmt: skip

    def write_reference(self, updates: torch.Tensor) -> None:
        """`write` in PyTorch."""
        kept = updates[updates[:, ROW.value] >= 0]
        self.table[kept[:, ROW.value].long()] = kept


@triton.jit(do_not_specialize_on_alignment=["updates"])
def _write_rows_kernel(table, updates, WORDS: tl.constexpr, TILE: tl.constexpr, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    update = updates + tl.program_id(0) * WORDS
    row = tl.load(update + ROW)
    word = tl.arange(0, TILE)
    values = tl.load(update + word, mask=word < WORDS, other=0)
    tl.store(table + row.to(tl.int64) * WORDS + word, values, mask=(word < WORDS) & (row >= 0))


def fits(params: SamplingParams, stop_ids: Sequence[int]) -> bool:
    """Whether a row can hold what the request asks for; else the host has to sample for it."""
    barred = len(stop_ids) if params.min_tokens else 0
    return barred <= MAX_STOP_IDS and len(params.logit_bias) <= MAX_BIASES


def packed_row(
    row: int,
    params: SamplingParams,
    *,
    seed: int,
    prompt_length: int,
    stop_ids: Sequence[int] = (),
    count_row: int = -1,
) -> npt.NDArray[np.int32]:
    """The words of a row, int32 [WORDS], for `SamplingRows.write`.

    Args:
        row: where it belongs.
        params: what the request asks for.
        seed: in [0, 2**63); `params.seed` already resolved, continuation included.
        prompt_length: tokens of the prompt, without any output: `min_tokens` counts from there.
        stop_ids: what may not be sampled before `min_tokens`, all below the vocabulary size.
        count_row: the row of `counts` that belongs to the request, -1 without penalties.

    Raises:
        InvalidRequest: the lists are longer than a row.
    """
    if not fits(params, stop_ids):
        raise InvalidRequest(
            f"a row on the device holds {MAX_BIASES} logit biases and {MAX_STOP_IDS} stop tokens, not "
            f"{len(params.logit_bias)} and {len(stop_ids)}: let the host sample for this request"
        )
    words = np.zeros(WORDS, np.int32)
    floats, seeds = words.view(np.float32), words[SEED.value : SEED.value + 2].view(np.int64)
    words[ROW.value] = row
    if params.temperature > 0.0 and params.top_k != 1:
        floats[STEPS.value] = DEPTH_STEPS / min(max(params.temperature, COOLEST), HOTTEST)
    floats[TOP_P.value] = max(params.top_p, 2.0**-100)  # not 0 in fp32: the most probable token is always kept
    words[TOP_K.value] = min(params.top_k, np.iinfo(np.int32).max)
    words[DEEPEST.value] = depth_of_probability(params.min_p)
    floats[REPETITION.value] = params.repetition_penalty
    floats[PRESENCE.value] = params.presence_penalty
    floats[FREQUENCY.value] = params.frequency_penalty
    words[COUNT_ROW.value] = count_row
    seeds[0] = seed
    if params.min_tokens:
        words[BARRED_UNTIL.value] = min(prompt_length + params.min_tokens, np.iinfo(np.int32).max)
        words[STOPS.value] = len(stop_ids)
        words[STOP_IDS.value : STOP_IDS.value + len(stop_ids)] = stop_ids
    words[BIASES.value] = len(params.logit_bias)
    for index, (token, bias) in enumerate(params.logit_bias):
        words[BIAS_IDS.value + index] = token
        floats[BIAS_VALUES.value + index] = bias if bias >= LOWEST_BIAS else -math.inf
    return words


def depth_of_probability(share: float) -> int:
    """The depth at which a token is `share` times as probable as the most probable one."""
    return min(BOTTOM, round(-math.log(share) * DEPTH_STEPS)) if share > 0.0 else BOTTOM


def count_tokens(
    counts: torch.Tensor, count_row: int, prompt: torch.Tensor | None, output: torch.Tensor | None = None
) -> None:
    """Fill a row of `counts` when its request is admitted; `sample` counts from then on.

    counts: int16 [penalty_rows, vocabulary]: how often a token was generated, and `IN_PROMPT`.
    count_row: what stood there is forgotten.
    prompt: int32 [P] token ids on the device of `counts`; None where the repetition penalty is 1.
    output: int32 [n] token ids generated before, when a request goes on after it was preempted or moved.
    """
    row = counts[count_row]
    row.zero_()
    if output is not None:
        # Not in int16, where a token repeated 32768 times would seem to be in the prompt.
        times = torch.zeros(len(row), dtype=torch.int32, device=row.device)
        times.index_add_(0, output, torch.ones_like(output))
        row.copy_(times.clamp_(max=MOST))
    if prompt is not None:
        row[prompt.long()] |= IN_PROMPT
