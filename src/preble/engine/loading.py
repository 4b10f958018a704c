"""Loading a checkpoint into the model that runs it."""

from __future__ import annotations

from pathlib import Path

import torch

from preble.engine.batch import Model
from preble.engine.config import ModelConfig


def load_model(folder: Path, *, device: torch.device, dtype: str) -> Model:
    """Our own decoder for the Llama family; transformers' modelling code with our attention for the rest.

    Args:
        folder: a checkpoint as published on the hub: config.json, safetensors.
        dtype: "auto" or the name of a torch floating point type.
    """
    config = ModelConfig.from_folder(folder)
    if config.fused:
        from preble.engine.decoder import load_decoder

        return load_decoder(folder, config, device=device, dtype=dtype)
    from preble.engine.transformers_model import load_transformers_model

    return load_transformers_model(folder, config, device=device, dtype=dtype)
