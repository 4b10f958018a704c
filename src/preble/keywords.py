"""Keywords that no call knows, and what was probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from preble.errors import UnknownOption, shown

T = TypeVar("T")

ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "do_sample": "temperature",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "top_logprobs": "logprobs",
    "deadline": "timeout",
    "user": "namespace",
    "tenant": "namespace",
    "num_replicas": "replicas",
    "torch_dtype": "dtype",
    "attn_implementation": "attention",
    "attention_backend": "attention",
    "block_size": "page_size",
    "kv_cache_dtype": "kv_dtype",
    "gpu_memory_utilization": "kv_memory",
    "mem_fraction_static": "kv_memory",
    "max_num_seqs": "max_running",
    "max_running_requests": "max_running",
    "chunked_prefill_size": "max_batched_tokens",
}
"""What transformers, vLLM, SGLang and hosted APIs call it -> what Preble calls it, where the two look unlike."""

INSTEAD = {
    "stream": "call stream or stream_chat for chunks",
    "messages": "give them to chat or stream_chat",
    "system": "give chat a first message with the role 'system'",
    "model": "a cluster serves one model, its first argument",
    "max_model_len": "the context is the checkpoint's, and kv_memory says how many tokens a replica holds",
    "tensor_parallel_size": "a model has to fit on one device, and replicas says how many engines there are",
}
"""Keywords of others for which Preble has none -> what to do."""

REQUESTS = "generate, stream or chat"
"""The calls that make a request, in words."""


def unknown_option(
    name: str, known: Collection[str], *, of: str = "", elsewhere: Mapping[str, Collection[str]] = MappingProxyType({})
) -> UnknownOption:
    """The error for a keyword that a call does not take.

    Args:
        name: the keyword.
        known: those that it takes.
        of: what was called, where the keyword alone does not say.
        elsewhere: other calls, in words, and their keywords, which are easily given to this one.
    """
    problem = f"unknown option {shown(name)}{of and ' of '}{of}"
    for others, theirs in elsewhere.items():
        if name in theirs:
            return UnknownOption(f"{problem}; give it to {others}")
    if name in INSTEAD:
        return UnknownOption(f"{problem}; {INSTEAD[name]}")
    meant = ELSEWHERE.get(name)
    close = [meant] if meant in known else difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
    return UnknownOption(f"{problem}; {hint}")


def explains_keywords(elsewhere: Mapping[str, Collection[str]]) -> Callable[[type[T]], type[T]]:
    """A class decorator: a keyword that the class is not made with raises `UnknownOption`.

    Args:
        elsewhere: as for `unknown_option`.
    """

    def decorate(kind: type[T]) -> type[T]:
        make: Callable[..., None] = kind.__init__
        known = [name for name in inspect.signature(make).parameters if name != "self"]

        @functools.wraps(make)
        def explaining(self: T, *args: Any, **options: Any) -> None:
            for name in options:
                if name not in known:
                    raise unknown_option(name, known, of=kind.__name__, elsewhere=elsewhere)
            make(self, *args, **options)

        setattr(kind, "__init__", explaining)  # noqa: B010 - no plain assignment to a method has a type
        return kind

    return decorate
