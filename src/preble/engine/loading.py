"""Loading a checkpoint into the model that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from preble.engine.batch import Model
from preble.engine.config import ModelConfig

if TYPE_CHECKING:
    from preble.engine.device.batch import DeviceModel
    from preble.kernels.operations import Operations


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


def load_device_model(
    folder: Path, config: ModelConfig, operations: Operations, *, device: torch.device, dtype: str
) -> DeviceModel:
    """As `load_model`, for a device that works by a queue of its own; `operations` are the kernels to use."""
    if config.fused:
        from preble.engine.decoder_weights import load_weights
        from preble.engine.device.decoder import DeviceDecoder

        weights, resolved = load_weights(folder, config, device=device, dtype=dtype)
        return DeviceDecoder(config, weights, operations, device=device, dtype=resolved)
    from preble.engine.device.transformers_device import load_device_transformers

    return load_device_transformers(folder, config, operations, device=device, dtype=dtype)
