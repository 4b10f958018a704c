"""Arguments that several subcommands share, and what they mean."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from preble.errors import InvalidRequest
from preble.sampling import SamplingParams
from preble.sched import POLICIES

DTYPES = ("auto", "float32", "bfloat16", "float16")


def positive_integer(text: str) -> int:
    """An argument type.

    Raises:
        ArgumentTypeError: this is no integer from 1.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return number


def add_cluster_arguments(
    parser: argparse.ArgumentParser,
    *,
    model: str | None = None,
    replicas: int = 1,
    page_size: int = 64,
    kv_memory: str = "a share of what is free",
) -> None:
    """What a `Cluster` is made with: the defaults. `model` is required where `None`, `kv_memory` says in words what is
    taken where nothing is given."""
    group = parser.add_argument_group("cluster")
    default = "required" if model is None else "default: %(default)s"
    group.add_argument(
        "--model", required=model is None, default=model, help=f"checkpoint folder, hub id, or 'demo' ({default})"
    )
    group.add_argument(
        "--replicas", type=positive_integer, default=replicas, metavar="N", help="engines to run (default: %(default)s)"
    )
    group.add_argument(
        "--devices", metavar="NAMES", help="torch devices, by commas (default: every GPU, or the CPU if there is none)"
    )
    group.add_argument(
        "--workers",
        choices=("auto", "thread", "process"),
        default="auto",
        metavar="KIND",
        help="how replicas run, one of %(choices)s; auto is processes on GPUs (default: %(default)s)",
    )
    group.add_argument(
        "--attention",
        default="auto",
        metavar="NAME",
        help="of a GPU: auto, triton, flash-attn or torch (default: %(default)s)",
    )
    group.add_argument(
        "--policy",
        choices=tuple(POLICIES),
        default="e2",
        metavar="NAME",
        help="one of %(choices)s (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        metavar="TYPE",
        help="one of %(choices)s; auto is the checkpoint's own where the device computes in it (default: %(default)s)",
    )
    group.add_argument(
        "--page-size",
        type=positive_integer,
        default=page_size,
        metavar="TOKENS",
        help="tokens in a KV page; whole pages are shared (default: %(default)s)",
    )
    group.add_argument(
        "--kv-memory", metavar="BYTES", help=f"KV memory per replica, such as 2GiB (default: {kv_memory})"
    )
    group.add_argument(
        "--kv-dtype",
        default="auto",
        metavar="TYPE",
        help="auto, or fp8: K and V in 8 bits, on a GPU (default: %(default)s)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The sampling values that are worth typing."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="tokens at most (default: %(default)s)"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the likeliest tokens up to this probability (default: %(default)s)",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens, 0 all (default: %(default)s)"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends it; repeatable")
    group.add_argument("--seed", type=int, metavar="N", help="of the draws above temperature 0 (default: a fixed one)")


def cluster_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Cluster` besides the model."""
    return {
        "replicas": args.replicas,
        "devices": [name.strip() for name in args.devices.split(",")] if args.devices else None,
        "policy": args.policy,
        "workers": args.workers,
        "dtype": args.dtype,
        "page_size": args.page_size,
        "attention": args.attention,
        "kv_memory": args.kv_memory,
        "kv_dtype": args.kv_dtype,
    }


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling values, checked; ask for them before a model is loaded.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop=tuple(args.stop),
        seed=args.seed,
    )


def not_text(error: UnicodeDecodeError) -> InvalidRequest:
    """What to raise when standard input cannot be decoded."""
    return InvalidRequest(f"standard input is not {error.encoding} text: {error.reason} at byte {error.start}")


def note(text: str) -> None:
    """Say something beside the output, on standard error."""
    print(text, file=sys.stderr, flush=True)
