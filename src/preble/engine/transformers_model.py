"""Any other causal language model: transformers' own modelling code, with our paged attention in place of its.

transformers calls the function registered below in every attention layer, after the rotation of K, with the tokens of
all sequences in one row; a context variable tells it of which forward pass. A model that mixes tokens anywhere else (a
state-space layer, a convolution) or attends in a way that this function does not know would give wrong text instead
of an error. So a model is tried when it is loaded: every layer must call the function exactly once, with the shapes
and the window that its config announces, and the logits must be those of transformers' own attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from preble.engine.batch import ForwardBatch, SequenceSlice
from preble.engine.checkpoint import Checkpoint
from preble.engine.config import ModelConfig
from preble.engine.dtypes import resolve_dtype
from preble.engine.kv_cache import KVCache
from preble.errors import CheckpointError, DeviceError, UnsupportedModel
from preble.kernels.paged_attention import PagedAttention

_IMPLEMENTATION = "preble_paged"
_REFUSED = {
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias in attention",
}
"""Arguments by which transformers asks an attention function for more than a softmax over scaled scores."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""How far logits may lie from transformers', relative to their spread. Where tokens see what they should not, it is
about 1; in half precision, rounding adds up over many layers and may send a token to another expert."""


class TransformersModel:
    """A `Model` that runs transformers' modelling code. Several threads may run one at the same time."""

    attention = "torch"

    def __init__(self, config: ModelConfig, model: PreTrainedModel, *, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dtype: torch.dtype = model.dtype
        self._model = model
        self._selects_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Write K and V of the N new tokens to their slots and return fp32 logits [R, vocabulary]."""
        return self._run(_Pass(self.config, batch, kv))

    def _run(self, current: _Pass) -> torch.Tensor:
        batch = current.batch
        selection: dict[str, Any] = {"logits_to_keep": batch.logit_rows} if self._selects_rows else {}
        token = _current_pass.set(current)
        try:
            output = self._model(
                input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=False, **selection
            )
        finally:
            _current_pass.reset(token)
        logits: torch.Tensor = output.logits[0]
        return (logits if self._selects_rows else logits[batch.logit_rows]).float()

    @torch.inference_mode()
    def try_out(self) -> None:
        """Raise `UnsupportedModel` unless two short texts, run in pieces, get the logits that transformers gives each.

        Not for use while another thread runs the model.
        """
        texts = [
            (torch.arange(length, device=self.device) * 37 + length) % self.config.vocabulary_size for length in (11, 7)
        ]
        try:
            found = self._logits_in_pieces(texts)
            self._model.set_attn_implementation("eager")
            expected = [self._model(input_ids=text[None], use_cache=False).logits[0].float() for text in texts]
            self._model.set_attn_implementation(_IMPLEMENTATION)
        except UnsupportedModel:
            raise
        except Exception as error:
            raise _unsupported(
                self.config, f"its modelling code does not run over a paged KV cache: {error}"
            ) from error
        for logits, reference in zip(found, expected, strict=True):
            spread = (reference - reference.mean(-1, keepdim=True)).norm()
            distance = (logits - reference).norm()
            if not distance <= _TOLERANCE[self.dtype] * spread:  # NaN is refused too
                raise _unsupported(
                    self.config,
                    "over a paged KV cache its logits are not those of its own attention "
                    f"(relative distance {distance / spread:.2g})",
                )

    def _logits_in_pieces(self, texts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Prefill six tokens of each text in one batch, then the others: a chunk of one text, a decode of the other."""
        config, page_size = self.config, 16
        kv = KVCache(
            layers=config.layers,
            pages=len(texts),
            page_size=page_size,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        logits: list[list[torch.Tensor]] = [[] for _ in texts]
        for start, stop in ((0, 6), (6, page_size)):
            pieces = [text[start:stop] for text in texts]
            lengths = [len(piece) for piece in pieces]
            positions = [torch.arange(start, start + length, device=self.device) for length in lengths]
            batch = ForwardBatch(
                token_ids=torch.cat(pieces),
                positions=torch.cat(positions),
                slots=torch.cat([page * page_size + offsets for page, offsets in enumerate(positions)]),
                sequences=[
                    SequenceSlice(sum(lengths[:page]), length, start + length, ((page * page_size, start + length),))
                    for page, length in enumerate(lengths)
                ],
                logit_rows=torch.arange(sum(lengths), device=self.device),
            )
            current = _Pass(config, batch, kv)
            for found, piece in zip(logits, torch.split(self._run(current), lengths), strict=True):
                found.append(piece)
            if sorted(current.layers) != list(range(config.layers)):
                raise _unsupported(
                    self.config,
                    f"each of its {config.layers} layers should call transformers' attention interface once, "
                    f"but the calls came from layers {sorted(current.layers)}",
                )
        return [torch.cat(found) for found in logits]


@dataclass(slots=True)
class _Pass:
    """A forward pass, as far as its attention layers need to know it."""

    config: ModelConfig
    batch: ForwardBatch
    kv: KVCache
    layers: list[int] = field(default_factory=list)
    """Those that have attended so far."""
    _plans: dict[int | None, PagedAttention] = field(default_factory=dict)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """Attention of one layer; q, k and v are [N, heads, head_dim]."""
        config = self.config
        kv_shape = (len(self.batch.token_ids), config.kv_heads, config.head_dim)
        q_shape = (kv_shape[0], config.query_heads, config.head_dim)
        if q.shape != q_shape or k.shape != kv_shape or v.shape != kv_shape:
            raise _unsupported(
                config,
                f"layer {layer} attends with Q, K and V of the shapes {[list(x.shape) for x in (q, k, v)]}, "
                f"while config.json announces {[list(shape) for shape in (q_shape, kv_shape, kv_shape)]}",
            )
        if window is not None and window >= config.context_length:
            window = None
        if window != config.layer_windows[layer]:
            raise _unsupported(
                config,
                f"layer {layer} attends with the sliding window {window}, while config.json announces "
                f"{config.layer_windows[layer]}",
            )
        plan = self._plans.get(window)
        if plan is None:
            group = config.query_heads // config.kv_heads
            plan = self._plans[window] = PagedAttention.plan(self.batch.sequences, group=group, window=window)
        keys, values = self.kv.keys[layer], self.kv.values[layer]
        keys.index_copy_(0, self.batch.slots, k)
        values.index_copy_(0, self.batch.slots, v)
        self.layers.append(layer)
        return plan(q, keys, values, config.head_dim**-0.5 if scale is None else scale)


def _unsupported(config: ModelConfig, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"{config.architecture} is not supported: {why}")


_current_pass: ContextVar[_Pass] = ContextVar("preble_forward_pass")


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: query, key and value [1, heads, N, head_dim], output [1, N, heads, head_dim]."""
    current = _current_pass.get()
    refused = [what for name, what in _REFUSED.items() if options.get(name) is not None]
    if attention_mask is not None:
        refused.append("an attention mask of its own")
    if refused:
        raise _unsupported(current.config, f"it has {refused[0]}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return current.attend(layer, q, k, v, scaling, sliding_window or None)[None], None


# Without a mask function of the same name, transformers makes no mask.
AttentionInterface.register(_IMPLEMENTATION, _attention)


def load_transformers_model(
    folder: Path, config: ModelConfig, *, device: torch.device, dtype: str
) -> TransformersModel:
    """Load a checkpoint folder into transformers' model of its architecture; `dtype` as for `resolve_dtype`.

    Raises `CheckpointError` when files or tensors are missing, superfluous, of the wrong shape or unreadable,
    `UnsupportedModel` when the architecture does not run over a paged KV cache, and `DeviceError` when the device
    lacks the memory.
    """
    checkpoint = Checkpoint(folder)
    resolved = resolve_dtype(dtype, stored=config.dtype or checkpoint.main_dtype, device=device)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                attn_implementation=_IMPLEMENTATION,
                dtype=resolved,
                ignore_mismatched_sizes=True,  # they are in the report
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        model, report = loaded
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{device} lacks the memory for the weights in {folder}: {error}") from error
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (_IMPLEMENTATION,):  # it looks in a table of its own
            raise _unsupported(config, "its modelling code does not use transformers' attention interface") from error
        raise CheckpointError(f"{folder} cannot be loaded by transformers as {config.architecture}: {error}") from error
    misshapen = {f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in report["mismatched_keys"]}
    found = {
        "missing": report["missing_keys"],
        "unexpected": report["unexpected_keys"],
        "of the wrong shape": misshapen,
    }
    problems = "; ".join(f"{problem}: {', '.join(sorted(names)[:5])}" for problem, names in found.items() if names)
    if problems:
        raise CheckpointError(f"the tensors in {folder} do not fit its config.json. {problems}")
    result = TransformersModel(config, model.eval(), device=device)
    result.try_out()
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and from logging what becomes an error."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
