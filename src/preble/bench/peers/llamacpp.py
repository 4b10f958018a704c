"""llama.cpp in bf16 through `llama-cpp-python`'s C bindings: one `llama_decode` per step and an argmax in numpy.

The sampler chain, the tokenizer and the Python `Llama` class are left out, so nothing but the engine is timed.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import llama_cpp  # type: ignore[import-not-found,unused-ignore]  # only where llama.cpp is measured
import numpy as np

from preble.bench.peers.gguf_file import write_gguf
from preble.bench.peers.worker import Setup, Trace, Work, serve

PROMPT_BATCH = 2048
"""Prompt tokens handed to one `llama_decode`; llama.cpp's own default."""


@dataclass(slots=True)
class _Token:
    token: int
    position: int
    sequence: int
    wants_logits: bool


class LlamaCpp:
    """Keeps one context per number of sequences, made on first use: the warm-up pays for it."""

    def __init__(self, setup: Setup) -> None:
        file = setup.checkpoint / "model.gguf"
        write_gguf(setup.checkpoint, file)
        # ctypes keeps no reference to a callback: this one must outlive the library's use of it.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {file}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = setup.threads
        self._contexts: dict[tuple[int, int, bool], Any] = {}
        self._batch = llama_cpp.llama_batch_init(PROMPT_BATCH, 0, 1)
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        self.settings = {
            "dtype": "bfloat16, KV float16",
            "flash attention": "on",
            "build": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }

    def run(self, work: Work) -> Trace:
        """Prefill, sharing what the work says is shared, then decode all sequences in step."""
        count = len(work.prompts)
        length = len(work.prompts[0]) + work.new_tokens
        context = self._context(count, length, work.shared)
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, False)
        trace = Trace(time.perf_counter(), [[] for _ in range(count)], [[] for _ in range(count)])
        if work.shared:
            prefix = work.prompts[0][: work.shared]
            self._decode(context, [_Token(token, position, 0, False) for position, token in enumerate(prefix)], trace)
            for sequence in range(1, count):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        self._decode(
            context,
            [
                _Token(prompt[position], position, sequence, position == len(prompt) - 1)
                for sequence, prompt in enumerate(work.prompts)
                for position in range(work.shared, len(prompt))
            ],
            trace,
        )
        for step in range(1, work.new_tokens):
            self._decode(
                context,
                [
                    _Token(trace.tokens[sequence][-1], len(prompt) + step - 1, sequence, True)
                    for sequence, prompt in enumerate(work.prompts)
                ],
                trace,
            )
        return trace

    def _decode(self, context: Any, tokens: list[_Token], trace: Trace) -> None:
        """Compute the tokens and append the most probable next one of those that want it."""
        for start in range(0, len(tokens), PROMPT_BATCH):
            part = tokens[start : start + PROMPT_BATCH]
            batch = self._batch
            batch.n_tokens = len(part)
            for row, one in enumerate(part):
                batch.token[row] = one.token
                batch.pos[row] = one.position
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = one.sequence
                batch.logits[row] = one.wants_logits
            status = llama_cpp.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode failed with {status} on {len(part)} tokens")
            wanted = [one.sequence for one in part if one.wants_logits]
            if not wanted:
                continue
            logits = llama_cpp.llama_get_logits(context)
            rows = np.ctypeslib.as_array(logits, shape=(len(wanted), self._vocabulary)).argmax(axis=1)
            now = time.perf_counter()
            for sequence, token in zip(wanted, rows.tolist(), strict=True):
                trace.tokens[sequence].append(token)
                trace.arrivals[sequence].append(now)

    def _context(self, sequences: int, length: int, shared: int) -> Any:
        """A context for so many sequences; cells are shared between them only where prompts are."""
        cells = shared + sequences * (length - shared)
        key = (sequences, cells, shared > 0)
        if key not in self._contexts:
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx = cells if shared else sequences * (-(-length // 256) * 256)
            parameters.n_batch = PROMPT_BATCH
            parameters.n_seq_max = sequences
            parameters.n_threads = self._threads
            parameters.n_threads_batch = self._threads
            parameters.kv_unified = shared > 0
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            context = llama_cpp.llama_init_from_model(self._model, parameters)
            if not context:
                raise RuntimeError(f"llama.cpp could not make a context for {sequences} sequences of {length} tokens")
            self._contexts[key] = context
        return self._contexts[key]


if __name__ == "__main__":
    serve(lambda setup: nullcontext(LlamaCpp(setup)))
