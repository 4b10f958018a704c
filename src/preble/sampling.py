"""How the next token is chosen: `SamplingParams`, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from numbers import Integral, Real
from typing import Any

from preble.errors import InvalidRequest, PrebleError, shown
from preble.keywords import REQUESTS, explains_keywords, unknown_option

MAX_LOGPROBS = 64
"""The largest `logprobs` a request may ask for."""

MAX_SEED = 2**63 - 1

MAX_TOKENS = 2**31 - 1
"""The largest `max_tokens`, `min_tokens`, `top_k` and token id; positions and ids are 32-bit integers."""

MAX_N = 1024
"""The largest `n`."""

MAX_STOPS = 1024
"""How many stop strings, and how many stop token ids, a request may have."""

_MOST_BIASES = 1 << 20
"""More than any vocabulary has tokens."""

MAX_LOGIT_BIAS = 1e6
"""Above this a bias would only cost the other logits their precision; 1e6 forces a token already."""

REQUEST_OPTIONS = frozenset(
    {"sampling", "priority", "timeout", "namespace", "request_id", "session", "expected_tokens"}
)
"""What `generate` takes besides sampling values; known here so that a misspelling finds its neighbour."""


@explains_keywords({REQUESTS: REQUEST_OPTIONS})
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks of the sampler. Every value is checked here, before any work is queued.

    Order of operations on the logits of one position: `logit_bias`, penalties, `min_tokens`, `temperature`, then
    `top_k`, `top_p`, `min_p` in that order. Sampling is a function of the seed, the position and these logits alone,
    so a request gives the same text in any batch and on any replica.

    Raises:
        InvalidRequest: a value is out of its range, or two values contradict each other.
    """

    max_tokens: int = 256
    """The most tokens to generate, from 1 to 2**31 - 1; fewer when the context or a replica's KV pages end sooner."""
    min_tokens: int = 0
    """No stop token may end the text, and no stop string is looked for, before this many tokens; from 0 to
    `max_tokens`."""
    temperature: float = 1.0
    """From 0, which is greedy; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; above 0, at most 1."""
    top_k: int = 0
    """Keep the k most probable tokens and those equal to the k-th, from 0 on; 0 keeps all, 1 is greedy."""
    min_p: float = 0.0
    """Drop tokens less probable than `min_p` times the most probable one, from 0 to 1."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens seen in prompt or output (CTRL, Keskar et al. 2019); from
    0.01 to 100."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already generated, from -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it was generated, from -2 to 2."""
    seed: int | None = None
    """From 0 to 2**63 - 1; `None` derives one from the cluster's seed and the request id."""
    n: int = 1
    """How many continuations, from 1 to 1024, and 1 where it is greedy; continuation i uses `seed + i`."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are cut from it. One string or a sequence of them, at most 1024, none empty."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the text, besides the checkpoint's end-of-sequence tokens; at most 1024."""
    ignore_eos: bool = False
    """Go on past the checkpoint's end-of-sequence tokens."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most probable ones, from 0 to 64, as the model gave
    them, before any of the above; `None` reports none."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit); a mapping is accepted. -inf bans a token, 1e6 is the most."""

    def __post_init__(self) -> None:
        try:
            self._check()
        except PrebleError:
            raise
        except Exception as error:  # whatever a number or a sequence of somebody's own raises
            raise InvalidRequest(f"a sampling value cannot be read: {shown(error)}") from error

    def _check(self) -> None:
        self._integer("max_tokens", low=1)
        self._integer("n", low=1, high=MAX_N)
        for name in ("min_tokens", "top_k"):
            self._integer(name, low=0)
        self._number("temperature", 0.0, math.inf)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.01, 100.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        if self.seed is not None:
            self._integer("seed", low=0, high=MAX_SEED)
        if self.logprobs is not None:
            self._integer("logprobs", low=0, high=MAX_LOGPROBS)
        self._flag("ignore_eos")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            raise InvalidRequest(f"seed={self.seed} leaves no room for n={self.n} seeds below 2**63")
        if self.temperature == 0.0 and self.n > 1:
            raise InvalidRequest(
                f"n={self.n} with temperature=0 would give {self.n} equal texts: raise temperature, or ask for n=1"
            )

    @classmethod
    def from_options(cls, base: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
        """`base` (or the defaults) with `options` laid over it; a keyword no one knows is named."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise unknown_option(name, [*known, *sorted(REQUEST_OPTIONS)])
        if base is None:
            return cls(**options)
        if not isinstance(base, cls):
            raise InvalidRequest(f"sampling must be a SamplingParams, not {type(base).__name__}")
        return replace(base, **options) if options else base

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Reject token ids that the model does not have."""
        for name, token_ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", [token for token, _ in self.logit_bias]),
        ):
            for token in token_ids:
                if token >= vocabulary_size:
                    raise InvalidRequest(f"{name}: token id {token} is not below the vocabulary size {vocabulary_size}")

    def _integer(self, name: str, low: int, high: int = MAX_TOKENS) -> None:
        value = getattr(self, name)
        number = _as_integer(value)
        if number is None:
            raise InvalidRequest(f"{name} must be an integer, not {shown(value)}")
        if not low <= number <= high:
            allowed = f"at least {low}" if number < low and high == MAX_TOKENS else f"between {low} and {high}"
            raise InvalidRequest(f"{name} must be {allowed}, not {shown(number)}")
        object.__setattr__(self, name, number)

    def _number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        number = _as_float(value)
        if number is None or not math.isfinite(number):
            raise InvalidRequest(f"{name} must be a finite number, not {shown(value)}")
        if number > high or number < low or (open_low and number == low):
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            if high != math.inf:
                bounds += f" and at most {high:g}"
            raise InvalidRequest(f"{name} must be {bounds}, not {number}")
        object.__setattr__(self, name, number)

    def _flag(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool) and getattr(value, "dtype", None) != "bool":
            raise InvalidRequest(f"{name} must be True or False, not {shown(value)}")
        object.__setattr__(self, name, bool(value))


def _as_integer(value: object) -> int | None:
    """The int that `value` is (numpy's integers too), or `None`; `True` is none."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _as_float(value: object) -> float | None:
    """The float that `value` is (numpy's numbers and integers too), or `None`; `True` is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the largest float
        return None


def _at_most(most: int, name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    """The values, unless they are more than `most`: an iterator may never end."""
    found = tuple(islice(values, most + 1))
    if len(found) > most:
        raise InvalidRequest(f"{name} holds more than {most} values")
    return found


def _stop_strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        strings: tuple[object, ...] = (value,)
    else:
        strings = _at_most(MAX_STOPS, "stop", value) if isinstance(value, Iterable) else (None,)
    texts = tuple(one for one in strings if isinstance(one, str))
    if len(texts) != len(strings):
        raise InvalidRequest(f"stop must be a string or a sequence of strings, not {shown(value)}")
    if "" in texts:
        raise InvalidRequest("stop: an empty string would end every text at once")
    return texts


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise InvalidRequest(f"{name} must be a sequence of token ids, not {shown(value)}")
    return tuple(_token_id(name, token) for token in _at_most(MAX_STOPS, name, value))


def _token_id(name: str, value: object) -> int:
    token = _as_integer(value)
    if token is None or not 0 <= token <= MAX_TOKENS:
        raise InvalidRequest(f"{name} must hold non-negative integers below 2**31, not {shown(value)}")
    return token


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, str | bytes):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, not {shown(value)}")
    biases: dict[int, float] = {}
    for pair in _at_most(_MOST_BIASES, "logit_bias", pairs):
        if not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2:
            raise InvalidRequest(f"logit_bias must map token ids to numbers, not hold {shown(pair)}")
        token, bias = _token_id("logit_bias", pair[0]), _as_float(pair[1])
        if bias is None or math.isnan(bias) or bias > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias[{token}] must be a number up to {MAX_LOGIT_BIAS:g}, not {shown(pair[1])}")
        if token in biases:
            raise InvalidRequest(f"logit_bias names token id {token} twice")
        biases[token] = bias
    return tuple(biases.items())
