"""Preble: serve LLMs on many GPUs from asyncio, every prompt where its prefix lies."""

__version__ = "0.1.0"
