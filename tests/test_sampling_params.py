from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.errors import InvalidRequest, UnknownOption
from preble.sampling import MAX_LOGPROBS, SamplingParams

VALID = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(8, 10**6),
        "min_tokens": st.integers(0, 8),
        "temperature": st.floats(0.01, 1e6),
        "top_p": st.floats(0.0, 1.0, exclude_min=True),
        "top_k": st.integers(0, 10**6),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.01, 100.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "seed": st.none() | st.integers(0, 2**63 - 9),
        "n": st.integers(1, 8),
        "stop": st.text(min_size=1) | st.lists(st.text(min_size=1)),
        "stop_token_ids": st.lists(st.integers(0, 10**6)),
        "ignore_eos": st.booleans(),
        "logprobs": st.none() | st.integers(0, MAX_LOGPROBS),
        "logit_bias": st.dictionaries(st.integers(0, 10**6), st.floats(-math.inf, 1e6)),
    },
)


@given(VALID)
def test_valid_values_are_kept_and_survive_replace(options):
    params = SamplingParams(**options)
    for name, value in options.items():
        kept = getattr(params, name)
        if name == "stop":
            assert kept == ((value,) if isinstance(value, str) else tuple(value))
        elif name == "stop_token_ids":
            assert kept == tuple(value)
        elif name == "logit_bias":
            assert kept == tuple(value.items())
        else:
            assert kept == value
    assert replace(params) == params == SamplingParams.from_options(params, {})
    assert hash(replace(params, max_tokens=9)) == hash(replace(params, max_tokens=9))
    assert SamplingParams.from_options(None, {name: getattr(params, name) for name in options}) == params


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("max_tokens", np.int64(5), 5),
        ("top_k", np.uint8(5), 5),
        ("seed", np.uint64(2**63 - 1), 2**63 - 1),
        ("logprobs", np.int32(0), 0),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.float16(0.5), 0.5),
        ("temperature", np.int64(2), 2.0),
        ("temperature", 1, 1.0),
        ("top_p", Fraction(1, 2), 0.5),
        ("ignore_eos", np.True_, True),
        ("stop", {"a"}, ("a",)),
        ("stop_token_ids", np.array([3, 4]), (3, 4)),
        ("stop_token_ids", {7}, (7,)),
        ("logit_bias", {np.int64(3): np.float32(-1.5)}, ((3, -1.5),)),
        ("logit_bias", [[3, 1], (4, -math.inf)], ((3, 1.0), (4, -math.inf))),
        ("logit_bias", ((3, 1.0),), ((3, 1.0),)),
    ],
)
def test_values_of_other_types_become_plain_ones(name, value, kept):
    got = getattr(SamplingParams(**{name: value}), name)
    assert got == kept
    assert type(got) is type(kept)
    if isinstance(kept, tuple) and kept:
        assert type(got[0]) is type(kept[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": 1.0}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"max_tokens": "5"}, "max_tokens must be an integer"),
        ({"max_tokens": None}, "max_tokens must be an integer"),
        ({"n": np.True_}, "n must be an integer"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is more than max_tokens=8"),
        ({"temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"temperature": np.float64("nan")}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"temperature": False}, "temperature must be a finite number"),
        ({"temperature": 1j}, "temperature must be a finite number"),
        ({"temperature": np.array([1.0])}, "temperature must be a finite number"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.5}, "min_p must be at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be at least 0.01"),
        ({"repetition_penalty": 101}, "repetition_penalty must be at least 0.01 and at most 100"),
        ({"presence_penalty": 2.1}, "presence_penalty must be at least -2 and at most 2"),
        ({"frequency_penalty": -3}, "frequency_penalty must be"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"seed": 2**63}, "seed must be between 0 and"),
        ({"seed": 2**63 - 1, "n": 2}, "leaves no room for n=2"),
        ({"n": 2, "temperature": 0}, "raise temperature, or ask for n=1"),
        ({"stop": ""}, "empty string"),
        ({"stop": ["a", ""]}, "empty string"),
        ({"stop": 5}, "stop must be a string or a sequence"),
        ({"stop": ["a", 5]}, "stop must be a string or a sequence"),
        ({"stop": b"a"}, "stop must be a string or a sequence"),
        ({"stop": None}, "stop must be a string or a sequence"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a sequence"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a sequence"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids must hold non-negative integers"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold non-negative integers"),
        ({"stop_token_ids": [True]}, "stop_token_ids must hold non-negative integers"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False"),
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs must be between 0 and"),
        ({"logprobs": True}, "logprobs must be an integer"),
        ({"logit_bias": {5: math.nan}}, r"logit_bias\[5\] must be a number"),
        ({"logit_bias": {5: math.inf}}, r"logit_bias\[5\] must be a number up to 1e\+06"),
        ({"logit_bias": {5: "high"}}, r"logit_bias\[5\] must be a number"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias must hold non-negative integers"),
        ({"logit_bias": [5, 1.0]}, "logit_bias must map"),
        ({"logit_bias": ["ab"]}, "logit_bias must map"),
        ({"logit_bias": [(5, 1.0, 2.0)]}, "logit_bias must map"),
        ({"logit_bias": 5}, "logit_bias must map"),
        ({"logit_bias": [(5, 1.0), (5, 2.0)]}, "logit_bias names token id 5 twice"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**options)


def test_options_are_laid_over_a_base():
    base = SamplingParams(temperature=0.5, stop="a", logit_bias={3: 1.0}, n=2)
    got = SamplingParams.from_options(base, {"max_tokens": 7})
    assert got == SamplingParams(temperature=0.5, stop="a", logit_bias={3: 1.0}, n=2, max_tokens=7)
    with pytest.raises(InvalidRequest, match="n=2 with temperature=0"):
        SamplingParams.from_options(base, {"temperature": 0})
    with pytest.raises(InvalidRequest, match="sampling must be a SamplingParams, not dict"):
        SamplingParams.from_options({"n": 2}, {})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", "; did you mean 'temperature'?"),
        ("time_out", "; did you mean 'timeout'?"),
        ("zzz", "; the options are max_tokens, "),
    ],
)
def test_an_unknown_option_finds_its_neighbour(name, hint):
    with pytest.raises(UnknownOption, match=rf"unknown option '{name}'{hint}".replace("?", r"\?")):
        SamplingParams.from_options(None, {name: 1})
    assert issubclass(UnknownOption, TypeError)


def test_token_ids_beyond_the_vocabulary():
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1.0}).check_vocabulary(10)
    with pytest.raises(InvalidRequest, match="stop_token_ids: token id 10 is not below the vocabulary size 10"):
        SamplingParams(stop_token_ids=[9, 10]).check_vocabulary(10)
    with pytest.raises(InvalidRequest, match="logit_bias: token id 11"):
        SamplingParams(logit_bias={11: 1.0}).check_vocabulary(10)
