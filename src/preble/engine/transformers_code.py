"""transformers' modelling code with paged attention in place of its own.

transformers calls the function registered below in every attention layer, after the rotation of K, with the tokens of
all sequences in one row; a context variable tells it of which forward pass. A model that mixes tokens anywhere else (a
state-space layer, a convolution) or attends in a way that this function does not know would give wrong text instead
of an error. So a model is tried when it is loaded: every layer must call the function exactly once, with the shapes
and the window that its config announces, and the logits must be those of transformers' own attention.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from preble.engine.checkpoint import Checkpoint
from preble.engine.config import ModelConfig
from preble.engine.dtypes import resolve_dtype
from preble.errors import CheckpointError, DeviceError, UnsupportedModel

PAGE_SIZE = 16
"""Of the KV cache that a model is tried over: each text is one page, the first text page 0."""
_TABLES = 1 << 28
"""Numbers that a model may compute for itself (tables of positions, masks) instead of storing them."""
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

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Attention of a layer: its number, q [N, query_heads, head_dim], k and v [N, kv_heads, head_dim] with any strides, and
the scale of the scores, to a tensor like q. It stores k and v. What a token sees is up to the config."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one of the texts that a model is tried with."""

    page: int
    """Of its text."""
    start: int
    """Position of its first token."""
    token_ids: torch.Tensor
    """int64 [N]."""

    @property
    def stop(self) -> int:
        """One behind the position of its last token."""
        return self.start + len(self.token_ids)


class TransformersCode:
    """A model of transformers, its weights on a device. Several threads may run one at the same time."""

    def __init__(self, config: ModelConfig, model: PreTrainedModel) -> None:
        self.config = config
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._model = model
        self._selects_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend, logit_rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [R, vocabulary] of `logit_rows` [R], or of all N rows; `token_ids` and `positions` are int64 [N].

        Raises `UnsupportedModel` unless every layer attends once, as the config announces it.
        """
        current = _Pass(self.config, self.dtype, len(token_ids), attend)
        selects = self._selects_rows and logit_rows is not None
        token = _current_pass.set(current)
        try:
            output = self._model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                **({"logits_to_keep": logit_rows} if selects else {}),
            )
        finally:
            _current_pass.reset(token)
        if sorted(current.layers) != list(range(self.config.layers)):
            raise _unsupported(
                self.config,
                f"each of its {self.config.layers} layers should call transformers' attention interface once, "
                f"but the calls came from layers {sorted(current.layers)}",
            )
        logits: torch.Tensor = output.logits[0]
        return logits if selects or logit_rows is None else logits[logit_rows]

    @torch.inference_mode()
    def try_out(self, step: Callable[[list[Piece]], list[torch.Tensor]]) -> None:
        """Raise `UnsupportedModel` unless two short texts, run in pieces, get the logits that transformers gives each.

        `step` is called twice and gives the logits of all tokens of some pieces: first six tokens of each text, then
        the others, which are a decode of one text and a chunk of the other. Not for use while another thread runs the
        model.
        """
        texts = [
            (torch.arange(length, device=self.device) * 37 + length) % self.config.vocabulary_size for length in (11, 7)
        ]
        found: list[list[torch.Tensor]] = [[] for _ in texts]
        try:
            for start, stop in ((0, 6), (6, PAGE_SIZE)):
                pieces = [Piece(page, start, text[start:stop]) for page, text in enumerate(texts)]
                pieces.sort(key=lambda piece: len(piece.token_ids))
                for piece, logits in zip(pieces, step(pieces), strict=True):
                    found[piece.page].append(logits.float())
            self._model.set_attn_implementation("eager")
            expected = [self._model(input_ids=text[None], use_cache=False).logits[0].float() for text in texts]
            self._model.set_attn_implementation(_IMPLEMENTATION)
        except (UnsupportedModel, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _unsupported(
                self.config, f"its modelling code does not run over a paged KV cache: {error}"
            ) from error
        for parts, reference in zip(found, expected, strict=True):
            spread = (reference - reference.mean(-1, keepdim=True)).norm()
            distance = (torch.cat(parts) - reference).norm()
            if not distance <= _TOLERANCE[self.dtype] * spread:  # NaN is refused too
                raise _unsupported(
                    self.config,
                    "over a paged KV cache its logits are not those of its own attention "
                    f"(relative distance {distance / spread:.2g})",
                )


@dataclass(slots=True)
class _Pass:
    """A forward pass, as far as its attention layers need to know it."""

    config: ModelConfig
    dtype: torch.dtype
    tokens: int
    attend: Attend
    layers: list[int] = field(default_factory=list)
    """Those that have attended so far."""

    def checked(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """Attention of a layer that asks for what the config announces."""
        config = self.config
        kv_shape = (self.tokens, config.kv_heads, config.head_dim)
        q_shape = (self.tokens, config.query_heads, config.head_dim)
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
        dtypes = {x.dtype for x in (q, k, v)}
        if dtypes != {self.dtype}:
            raise _unsupported(config, f"layer {layer} of a model in {self.dtype} attends in {[*map(str, dtypes)]}")
        self.layers.append(layer)
        return self.attend(layer, q, k, v, config.head_dim**-0.5 if scale is None else scale)


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
    return current.checked(layer, q, k, v, scaling, sliding_window or None)[None], None


# Without a mask function of the same name, transformers makes no mask.
AttentionInterface.register(_IMPLEMENTATION, _attention)


def load_code(folder: Path, config: ModelConfig, *, device: torch.device, dtype: str) -> TransformersCode:
    """Load a checkpoint folder into transformers' model of its architecture; `dtype` as for `resolve_dtype`.

    Raises `CheckpointError` when files or tensors are missing, superfluous, of the wrong shape or unreadable,
    `UnsupportedModel` when the architecture's code or shape does not fit, and `DeviceError` when the device lacks the
    memory. It remains to be tried.
    """
    if config.query_heads % config.kv_heads:
        raise _unsupported(config, f"{config.kv_heads} KV heads cannot serve {config.query_heads} query heads evenly")
    checkpoint = Checkpoint(folder)
    resolved = resolve_dtype(dtype, stored=config.dtype or checkpoint.main_dtype, device=device)
    _check_size(folder, config, checkpoint)
    try:
        with _quiet():
            # transformers loads to a device with the package accelerate only. But what it loads to the CPU in the dtype
            # of the files is views into them, so that here every tensor goes from its file to the device.
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
    return TransformersCode(config, model.eval())


def _check_size(folder: Path, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for a config.json that announces far more than the files hold.

    transformers would take the memory for it before it notices what is missing.
    """
    stored = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    if config.layers > len(checkpoint.tensors):
        raise CheckpointError(f"{folder} has {len(checkpoint.tensors)} tensors, but config.json {config.layers} layers")
    try:
        with _quiet(), torch.device("meta"):
            known = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_config(known, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise CheckpointError(f"{folder} is refused by transformers as {config.architecture}: {error}") from error
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * stored + _TABLES:
        raise CheckpointError(f"{folder} holds {stored} numbers, but its config.json announces a model of {wanted}")


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
