"""Where the built-in model lies."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "model"
"""The folder of the built-in model, as published ones: config, weights, tokenizer and a card (README.md). What
`Cluster("demo")` serves; transformers reads it as well."""
