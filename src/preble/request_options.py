"""The keywords of `generate` and its kin, for editors and type checkers. `SamplingParams` says what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from preble.sampling import SamplingParams


class SamplingOptions(TypedDict, total=False):
    """Each field of `preble.SamplingParams`, as it may be given."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    n: int
    stop: str | Iterable[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    logprobs: int | None
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]]


class RequestOptions(SamplingOptions, total=False):
    """… and what else `generate` takes by keyword."""

    sampling: SamplingParams | None
    priority: int
    timeout: float | None
    namespace: str
    request_id: str | None
    session: str | None
    expected_tokens: int | None
