"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from typing import Any


def add_cluster_arguments(parser: argparse.ArgumentParser, *, model: str | None = None, replicas: int = 1) -> None:
    """What a `Cluster` is made with; `model` is the default, required where `None`."""
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--model",
        required=model is None,
        default=model,
        help="checkpoint folder, hub id, or 'demo'" + (f" (default: {model})" if model else ""),
    )
    group.add_argument("--replicas", type=int, default=replicas, help="engines to run (default: %(default)s)")
    group.add_argument("--devices", help="comma-separated torch devices (default: every GPU, else the CPU)")
    group.add_argument("--policy", default="e2", help="placement policy (default: %(default)s)")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
    group.add_argument("--page-size", type=int, default=64, help="tokens in a KV page (default: %(default)s)")
    group.add_argument("--kv-memory", help="KV memory per replica, such as 2GiB (default: from what is free)")


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The sampling values that are worth typing."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens, help="default: %(default)s")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--seed", type=int, help="default: from the cluster's seed")


def cluster_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Cluster` besides the model."""
    return {
        "replicas": args.replicas,
        "devices": args.devices.split(",") if args.devices else None,
        "policy": args.policy,
        "dtype": args.dtype,
        "page_size": args.page_size,
        "kv_memory": args.kv_memory,
    }


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `generate`."""
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
