"""From logits to tokens: what each request keeps for sampling, and the sampler that serves a whole step at once.

A token is a pure function of the request's seed, the token's position and its logits: each (seed, position) has one
uniform number, and `preble.engine.distribution` inverts the row's CDF with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preble.engine.distribution import block_sums, draw, largest, weights
from preble.outputs import TokenLogprob
from preble.sampling import SamplingParams

CHUNK = 1 << 18
"""Logits worked on at once on the CPU: they stay in its cache, and the memory is reused instead of mapped anew."""

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1), 53 bits, that decides the token of `seed` at `position`: SplitMix64, entered anywhere."""
    state = _mix((seed + _GOLDEN) & _WORD)
    return (_mix((state + (position + 1) * _GOLDEN) & _WORD) >> 11) * 2.0**-53


def _mix(word: int) -> int:
    """SplitMix64's output function: a bijection of 64-bit words whose every output bit depends on every input bit."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


class SeenTokens:
    """The distinct tokens that penalties apply to, and how often each was generated. O(1) per token."""

    def __init__(self, prompt: npt.NDArray[np.int32]) -> None:
        ids = np.unique(prompt).astype(np.int64)
        self._size = len(ids)
        self._slots = {token: slot for slot, token in enumerate(ids.tolist())}
        self._ids = np.concatenate([ids, np.zeros(64, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float32)

    def add(self, token: int) -> None:
        """Count one generated token."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = self._size
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token
            self._size += 1
        self._counts[slot] += 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Distinct token ids [S], the prompt's first."""
        return self._ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often each of `ids` was generated; 0 for those of the prompt alone."""
        return self._counts[: self._size]


class SamplingState:
    """What the sampler knows of one request; `append` every token that joins its output.

    Args:
        params: what the request asks for.
        seed: in [0, 2**63); `params.seed` already resolved, continuation included.
        prompt: the request's prompt, int32 [P].
        vocabulary_size: columns of the logits.
        eos_token_ids: the checkpoint's end-of-sequence tokens.
    """

    __slots__ = ("bias_ids", "bias_values", "generated", "greedy", "params", "seed", "seen", "stop_ids")

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt: npt.NDArray[np.int32],
        vocabulary_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.params = params
        self.seed = seed
        self.greedy = params.temperature == 0.0 or params.top_k == 1
        self.generated = 0
        """Tokens appended so far."""
        self.seen: SeenTokens | None = None
        """`None` without penalties. The prompt counts for the repetition penalty alone."""
        if params.repetition_penalty != 1.0:
            self.seen = SeenTokens(prompt)
        elif params.presence_penalty or params.frequency_penalty:
            self.seen = SeenTokens(prompt[:0])
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_token_ids)
        self.stop_ids = np.array(sorted(token for token in stops if token < vocabulary_size), np.int64)
        """What cannot be sampled before `min_tokens`."""
        self.bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self.bias_values = torch.tensor([bias for _, bias in params.logit_bias], dtype=torch.float32).numpy()

    def append(self, token: int) -> None:
        """Take in one generated token."""
        self.generated += 1
        if self.seen is not None:
            self.seen.add(token)

    @property
    def stops_barred(self) -> bool:
        """Whether the next token may not be a stop token."""
        return self.generated < self.params.min_tokens and len(self.stop_ids) > 0

    @property
    def edits(self) -> bool:
        """Whether the logits change before temperature: by a bias, penalties or `min_tokens`."""
        return self.seen is not None or len(self.bias_ids) > 0 or self.stops_barred


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One entry per row of the logits."""

    tokens: list[int]
    """The sampled token; -1 in invalid rows."""
    logprobs: list[TokenLogprob | None]
    """Set where the request asked for it, and the row is valid."""
    invalid: list[int] = field(default_factory=list)
    """Rows that gave no token: a NaN or +inf among the logits, or nothing finite left to choose from."""


class Sampler:
    """Chooses the next token of every request in a step."""

    def sample(self, logits: Tensor, rows: Sequence[SamplingState], positions: Sequence[int]) -> SampleResult:
        """One token per row.

        Args:
            logits: fp32 [R, vocabulary], on any device; left as they are.
            rows: the requests, one per row.
            positions: index of the token to sample in its request: prompt length + outputs so far.
        """
        best, peaks = _argmax(logits)
        tokens, valid = best.tolist(), np.isfinite(peaks)
        work = [row for row, state in enumerate(rows) if not state.greedy or state.edits]
        if not valid.all():
            work = [row for row in work if valid[row]]
        for part in _chunks(work, logits):
            chosen = _choose(logits, peaks, part, [rows[row] for row in part], [positions[row] for row in part])
            for row, token in zip(part, chosen, strict=True):
                tokens[row] = token
                valid[row] = token >= 0
        invalid = [] if valid.all() else np.flatnonzero(~valid).tolist()
        for row in invalid:
            tokens[row] = -1
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        wanted = [row for row, state in enumerate(rows) if state.params.logprobs is not None and valid[row]]
        for part in _chunks(wanted, logits):
            for row, logprob in zip(part, _logprobs(logits, peaks, part, rows, tokens), strict=True):
                logprobs[row] = logprob
        return SampleResult(tokens, logprobs, invalid)


def _chunks(rows: list[int], logits: Tensor) -> list[list[int]]:
    """The rows in groups that are worked on at once."""
    step = max(1, CHUNK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(rows))
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _argmax(logits: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Index (the first of equals) and value of each row's largest logit. A NaN anywhere in a row is its largest."""
    if logits.device.type == "cpu":  # numpy's argmax is about ten times as fast as torch's
        values = logits.numpy()
        best = values.argmax(axis=1)
        return best, np.take_along_axis(values, best[:, None], axis=1)[:, 0]
    best_on_device = logits.argmax(1, keepdim=True)
    return best_on_device[:, 0].cpu().numpy(), logits.gather(1, best_on_device)[:, 0].cpu().numpy()


def _choose(
    logits: Tensor,
    peaks: npt.NDArray[np.float32],
    work: list[int],
    states: list[SamplingState],
    positions: list[int],
) -> list[int]:
    """Tokens of the rows in `work`, which need more than the argmax; -1 where nothing finite is left."""
    values = logits.index_select(0, torch.tensor(work, device=logits.device))  # a copy
    peaks = peaks[work]
    tokens = [-1] * len(work)
    edited = [row for row, state in enumerate(states) if state.edits]
    if edited:
        edit(values, [(row, states[row]) for row in edited])
        best, peaks[edited] = _argmax(values if len(edited) == len(work) else values[edited])
        for row, token in zip(edited, best.tolist(), strict=True):
            tokens[row] = token if np.isfinite(peaks[row]) else -1
    drawn = [row for row, state in enumerate(states) if not state.greedy and np.isfinite(peaks[row])]
    if drawn:
        kept = weights(
            values if len(drawn) == len(work) else values[drawn],
            torch.from_numpy(peaks[drawn]).to(values.device),
            [states[row].params for row in drawn],
        )
        uniforms = [uniform(states[row].seed, positions[row]) for row in drawn]
        for row, token in zip(drawn, draw(kept, uniforms), strict=True):
            tokens[row] = token
    return tokens


def edit(values: Tensor, states: list[tuple[int, SamplingState]]) -> None:
    """Apply biases, penalties and `min_tokens`, in this order, to the given rows of [G, vocabulary], in place."""
    flat, vocabulary, device = values.view(-1), values.shape[1], values.device

    def tensor(parts: Sequence[npt.NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    biased = [(row, state) for row, state in states if len(state.bias_ids)]
    if biased:
        where = tensor([state.bias_ids + row * vocabulary for row, state in biased])
        flat[where] += tensor([state.bias_values for _, state in biased])
    penalised = [(row * vocabulary, state.params, state.seen) for row, state in states if state.seen is not None]
    if penalised:
        where = tensor([seen.ids + start for start, _, seen in penalised])
        counts = tensor([seen.counts for _, _, seen in penalised])
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        per_row = np.array([[getattr(params, name) for name in names] for _, params, _ in penalised], np.float32)
        spread = np.repeat(per_row, [len(seen.ids) for _, _, seen in penalised], axis=0)
        repetition, frequency, presence = torch.from_numpy(spread).to(device).unbind(1)
        scores = flat[where]
        scores = torch.where(scores > 0, scores / repetition, scores * repetition)
        flat[where] = scores - frequency * counts - presence * (counts > 0)
    barred = [state.stop_ids + row * vocabulary for row, state in states if state.stops_barred]
    if barred:
        flat[tensor(barred)] = -torch.inf


def _logprobs(
    logits: Tensor,
    peaks: npt.NDArray[np.float32],
    wanted: list[int],
    rows: Sequence[SamplingState],
    tokens: list[int],
) -> list[TokenLogprob]:
    """Log-probabilities under the model's own distribution; of equals the lower token id comes first."""
    raw = logits[wanted]
    column = torch.from_numpy(peaks[wanted]).to(raw.device).unsqueeze(1)
    norms = block_sums((raw - column).exp_()).sum(1).log_().add_(column[:, 0]).tolist()
    counts = [min(rows[row].params.logprobs or 0, raw.shape[1]) for row in wanted]
    bounds = largest(raw, max(counts)).cpu().numpy()
    scores = raw.cpu().numpy()
    logprobs = []
    for i, (row, norm, count) in enumerate(zip(wanted, norms, counts, strict=True)):
        top: tuple[tuple[int, float], ...] = ()
        if count:
            candidates = np.flatnonzero(scores[i] >= bounds[i, count - 1])
            ids = candidates[np.argsort(-scores[i, candidates], kind="stable")[:count]].tolist()
            top = tuple((token, float(scores[i, token]) - norm) for token in ids)
        token = tokens[row]
        logprobs.append(TokenLogprob(token, float(scores[i, token]) - norm, top))
    return logprobs
