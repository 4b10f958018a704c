"""Any other causal language model, on the CPU: transformers' modelling code over the paged KV cache."""

from __future__ import annotations

from pathlib import Path

import torch

from preble.engine.batch import ForwardBatch, SequenceSlice
from preble.engine.config import ModelConfig
from preble.engine.kv_cache import KVCache
from preble.engine.transformers_code import PAGE_SIZE, Piece, TransformersCode, load_code
from preble.kernels.paged_attention import PagedAttention


class TransformersModel:
    """A `Model` that runs transformers' modelling code. Several threads may run one at the same time."""

    attention = "torch"

    def __init__(self, code: TransformersCode) -> None:
        self.config = code.config
        self.device = code.device
        self.dtype = code.dtype
        self._code = code

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Write K and V of the N new tokens to their slots and return fp32 logits [R, vocabulary]."""
        config = self.config
        group = config.query_heads // config.kv_heads
        plans: dict[int | None, PagedAttention] = {}

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
            window = config.layer_windows[layer]
            if window not in plans:
                plans[window] = PagedAttention.plan(batch.sequences, group=group, window=window)
            keys, values = kv.keys[layer], kv.values[layer]
            keys.index_copy_(0, batch.slots, k)
            values.index_copy_(0, batch.slots, v)
            return plans[window](q, keys, values, scale)

        return self._code.run(batch.token_ids, batch.positions, attend, batch.logit_rows).float()

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

        def step(pieces: list[Piece]) -> list[torch.Tensor]:
            positions = [torch.arange(piece.start, piece.stop) for piece in pieces]
            lengths = [len(piece.token_ids) for piece in pieces]
            batch = ForwardBatch(
                token_ids=torch.cat([piece.token_ids for piece in pieces]),
                positions=torch.cat(positions),
                slots=torch.cat([piece.page * PAGE_SIZE + at for piece, at in zip(pieces, positions, strict=True)]),
                sequences=[
                    SequenceSlice(sum(lengths[:place]), length, piece.stop, ((piece.page * PAGE_SIZE, piece.stop),))
                    for place, (piece, length) in enumerate(zip(pieces, lengths, strict=True))
                ],
                logit_rows=torch.arange(sum(lengths)),
            )
            return list(torch.split(self.forward(batch, kv), lengths))

        self._code.try_out(step)


def load_transformers_model(
    folder: Path, config: ModelConfig, *, device: torch.device, dtype: str
) -> TransformersModel:
    """Load a checkpoint folder into transformers' model of its architecture, and try it; see `load_code`.

    Raises `UnsupportedModel`, too, when the architecture does not run over a paged KV cache.
    """
    model = TransformersModel(load_code(folder, config, device=device, dtype=dtype))
    model.try_out()
    return model
