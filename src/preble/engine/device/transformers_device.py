"""Any other causal language model, on a device: transformers' modelling code with the kernels' attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from preble.engine.config import ModelConfig
from preble.engine.device.attention import Attention
from preble.engine.device.batch import DecodeInputs, DeviceBatch, ExtendInputs
from preble.engine.device.kernel_attention import KernelAttention
from preble.engine.kv_cache import KVCache
from preble.engine.transformers_code import PAGE_SIZE, Piece, TransformersCode, load_code
from preble.kernels.architecture import architecture_of
from preble.kernels.operations import Operations
from preble.kernels.paged_extend import extend_tiles, tile_tokens


class DeviceTransformers:
    """A `DeviceModel` that runs transformers' modelling code. Several threads may run one at the same time."""

    capturable = False
    """Nobody has promised it of that code: some of it asks the device for the longest position (long-context rotary
    embeddings) or for the experts that were hit, and what it makes of Python numbers would be gone at a replay."""

    def __init__(self, code: TransformersCode, operations: Operations) -> None:
        self.config = code.config
        self.device = code.device
        self.dtype = code.dtype
        self._code = code
        self._operations = operations

    @torch.inference_mode()
    def forward(self, batch: DeviceBatch, kv: KVCache, attention: Attention) -> torch.Tensor:
        """Write K and V of the N new tokens to their slots and return logits [R, vocabulary] of the model's dtype."""
        attention.begin(batch)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
            keys, values = kv.keys[layer], kv.values[layer]
            self._operations.store_kv(_packed(k), _packed(v), keys, values, slots=batch.slots, **kv.scales(layer))
            # As if it came from one product, whatever the code made of it, so that kernels are compiled once for it.
            return attention.attend(layer, q.contiguous().view(q.shape), kv, scale)

        return self._code.run(batch.token_ids.long(), batch.positions.long(), attend, batch.logit_rows)

    def try_out(self) -> None:
        """Raise `UnsupportedModel` unless the model gives transformers' logits; see `TransformersCode.try_out`."""
        config = self.config
        kv = KVCache(
            layers=config.layers,
            pages=2,
            page_size=PAGE_SIZE,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        attention = KernelAttention(
            config,
            operations=self._operations,
            dtype=self.dtype,
            device=self.device,
            page_size=PAGE_SIZE,
            max_decodes=1,
        )

        def step(pieces: list[Piece]) -> list[torch.Tensor]:
            logits = self.forward(_batch(pieces, config, self.device, self.dtype), kv, attention)
            return list(torch.split(logits, [len(piece.token_ids) for piece in pieces]))

        self._code.try_out(step)


def _packed(heads: torch.Tensor) -> torch.Tensor:
    """The same [N, heads, head_dim], contiguous but for the stride of its rows; copied only if it is not."""
    return heads.reshape(len(heads), -1).view(heads.shape)


def _batch(pieces: list[Piece], config: ModelConfig, device: torch.device, dtype: torch.dtype) -> DeviceBatch:
    """`pieces`, the shortest first, with logits of all their tokens."""
    counts = np.array([len(piece.token_ids) for piece in pieces])
    contexts = np.array([piece.stop for piece in pieces])
    pages = np.array([piece.page for piece in pieces])
    decodes = int((counts == 1).sum())
    new, seen = counts[decodes:], contexts[decodes:]
    tile = tile_tokens(
        architecture_of(device),
        query_heads=config.query_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )

    def there(values: ArrayLike) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)

    positions = [np.arange(piece.start, piece.stop) for piece in pieces]
    slots = [page * PAGE_SIZE + at for page, at in zip(pages, positions, strict=True)]
    return DeviceBatch(
        token_ids=torch.cat([piece.token_ids for piece in pieces]).int(),
        positions=there(np.concatenate(positions)),
        slots=there(np.concatenate(slots)),
        tables=there(np.arange(max(pages) + 1)[:, None]),
        decodes=DecodeInputs(there(pages[:decodes]), there(contexts[:decodes])) if decodes else None,
        extends=ExtendInputs(
            rows=there(pages[decodes:]),
            context_lengths=there(seen),
            query_starts=there(np.cumsum([0, *new])),
            tiles=there(extend_tiles(new, seen, tile)),
            longest=int(new.max()),
            longest_context=int(seen.max()),
        ),
        logit_rows=None,
    )


def load_device_transformers(
    folder: Path, config: ModelConfig, operations: Operations, *, device: torch.device, dtype: str
) -> DeviceTransformers:
    """Load a checkpoint folder into transformers' model of its architecture, and try it there; see `load_code`.

    Raises `UnsupportedModel`, too, when the architecture does not run over a paged KV cache.
    """
    model = DeviceTransformers(load_code(folder, config, device=device, dtype=dtype), operations)
    model.try_out()
    return model
