"""Arguments of the commands that simulate a fleet, and what they mean."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from preble.cli.options import positive_integer
from preble.errors import InvalidRequest
from preble.sched.by_name import by_name
from preble.sched.cost import CostModel, PiecewiseCost
from preble.sched.cost_fit import FittedCost
from preble.sched.cost_presets import PRESETS
from preble.sched.orders import ORDERS
from preble.sched.policies import POLICIES
from preble.sim.settings import Failure, Settings
from preble.sim.slo import SLO
from preble.sim.trace import Trace
from preble.sim.traces import read_trace
from preble.sim.workloads import ARRIVALS, WORKLOADS, make_workload

T = TypeVar("T")

DEFAULT_SLO = "ttft=2.0,tpot=0.1"


@dataclass(frozen=True, slots=True)
class Slow:
    """A replica that is slower than the others."""

    replica: int
    factor: float

    @classmethod
    def parse(cls, text: str) -> Slow:
        """From `REPLICA@FACTOR`.

        Raises:
            InvalidRequest: it is written otherwise.
        """
        number, _, factor = text.partition("@")
        try:
            slow = cls(int(number), float(factor))
        except ValueError:
            slow = cls(-1, 0.0)
        if slow.replica < 0 or not 0 < slow.factor < float("inf"):
            raise InvalidRequest(f"a slow replica is REPLICA@FACTOR, as in 1@2 for steps twice as long, not {text!r}")
        return slow


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Which requests arrive, and when."""
    group = parser.add_argument_group("requests")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="a trace in any format that Preble reads")
    source.add_argument("--workload", choices=tuple(WORKLOADS), metavar="NAME", help="made up: one of %(choices)s")
    group.add_argument(
        "--requests", type=positive_integer, metavar="N", help="this many (default: all of a file, a workload's own)"
    )
    speed = group.add_mutually_exclusive_group()
    speed.add_argument(
        "--rate-scale", type=positive_number, metavar="X", help="they arrive X times as fast (default: as they are)"
    )
    speed.add_argument("--rate", type=positive_number, metavar="R", help="they arrive at R requests per second instead")
    group.add_argument(
        "--arrivals", choices=ARRIVALS, metavar="KIND", help="of a workload: one of %(choices)s (default: poisson)"
    )
    group.add_argument(
        "--closed-loop",
        action="store_true",
        help="a session sends its next request its think time after the answer, not at its time in the trace",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of all that is left to chance (default: %(default)s)"
    )


def add_fleet_arguments(parser: argparse.ArgumentParser, *, replicas: int | None = None) -> None:
    """What serves them: `replicas` is the default number of replicas; with `None` that is no argument."""
    group = parser.add_argument_group("fleet")
    if replicas is not None:
        group.add_argument(
            "--replicas", type=positive_integer, default=replicas, metavar="N", help="how many (default: %(default)s)"
        )
    group.add_argument(
        "--policy",
        type=argument(policy_names),
        default="e2",
        metavar="P[,P…]",
        help=f"by commas, of {', '.join(POLICIES)} (default: %(default)s)",
    )
    group.add_argument(
        "--cost",
        type=argument(cost_model),
        default="generic",
        metavar="COST",
        help=f"what steps take: {', '.join(PRESETS)}, or a file of a fitted model (default: %(default)s)",
    )
    group.add_argument(
        "--believed-cost",
        type=argument(cost_model),
        metavar="COST",
        help="what the schedulers think at first that they take (default: the truth)",
    )
    group.add_argument(
        "--kv-tokens", type=positive_integer, metavar="N", help="KV tokens of a replica (default: the cost model's own)"
    )
    group.add_argument(
        "--page-size", type=positive_integer, default=64, metavar="N", help="tokens in a page (default: %(default)s)"
    )
    group.add_argument(
        "--max-batched-tokens",
        type=positive_integer,
        default=2048,
        metavar="N",
        help="tokens of a step at most (default: %(default)s)",
    )
    group.add_argument(
        "--order",
        choices=tuple(ORDERS),
        default="hrrn",
        metavar="NAME",
        help="how a replica serves what waits there: one of %(choices)s (default: %(default)s)",
    )
    group.add_argument(
        "--event-delay",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds until the global scheduler hears what a replica did (default: %(default)s)",
    )
    group.add_argument(
        "--fail",
        type=argument(Failure.parse),
        action="append",
        default=[],
        metavar="R@T[+S]",
        help="replica R fails after T seconds, and is back after S more; repeatable",
    )
    group.add_argument(
        "--slow",
        type=argument(Slow.parse),
        action="append",
        default=[],
        metavar="R@X",
        help="steps of replica R take X times as long; repeatable",
    )


def add_slo_argument(parser: argparse.ArgumentParser) -> None:
    """What counts as good."""
    parser.add_argument(
        "--slo",
        type=argument(SLO.parse),
        default=DEFAULT_SLO,
        metavar="BOUNDS",
        help="seconds to the first token, per token after it, or to the end (e2e) of a good answer; what is not named "
        "is not bounded (default: %(default)s)",
    )


def read_requests(args: argparse.Namespace, *, progress: bool = True) -> Trace:
    """The trace that was asked for; with `progress`, a bar on a terminal while a file is read.

    Raises:
        InvalidRequest: the file is no trace, or the options make no sense for it.
    """
    if args.workload is not None:
        workload = WORKLOADS[args.workload]
        return make_workload(
            workload.name,
            requests=args.requests or workload.requests,
            rate=(args.rate or workload.rate) * (args.rate_scale or 1.0),
            seed=args.seed,
            arrivals=args.arrivals or ARRIVALS[0],
        )
    if args.arrivals is not None:
        raise InvalidRequest("--arrivals is for a --workload; those of a trace are in its file")
    trace: Trace = read_trace(args.trace, seed=args.seed, progress=progress)
    if args.requests is not None:
        trace = trace.first(args.requests)
    if args.rate is not None:
        if not trace.rate:
            raise InvalidRequest(f"--rate: all requests of {args.trace} arrive at once, which no rate changes")
        trace = trace.scaled(args.rate / trace.rate)
    return trace if args.rate_scale is None else trace.scaled(args.rate_scale)


def fleet_settings(args: argparse.Namespace, replicas: int) -> Settings:
    """The fleet that was asked for, of this many replicas.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    factors = {slow.replica: slow.factor for slow in args.slow}
    return Settings(
        replicas=replicas,
        cost=args.cost,
        believed_cost=args.believed_cost,
        capacity_tokens=args.kv_tokens,
        page_size=args.page_size,
        max_batched_tokens=args.max_batched_tokens,
        order=args.order,
        closed_loop=args.closed_loop,
        event_delay=args.event_delay,
        failures=tuple(args.fail),
        slowness=tuple(factors.get(number, 1.0) for number in range(max(factors, default=-1) + 1)),
        seed=args.seed,
    )


def policy_names(text: str) -> tuple[str, ...]:
    """Names by commas, each once.

    Raises:
        InvalidRequest: no policy has that name.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        by_name("policy", name, POLICIES)
    return names


def cost_model(text: str) -> str | CostModel:
    """The name of a preset as it is, or the model that `FittedCost.to_dict` wrote to a file, called like the file.

    Raises:
        InvalidRequest: neither such a name nor such a file.
    """
    path = Path(text)
    if text in PRESETS or not (path.suffix == ".json" or os.sep in text):
        by_name("cost", text, PRESETS, "a file of a fitted model that ends in .json")
        return text
    try:
        model = FittedCost.from_dict(json.loads(path.read_text(encoding="utf-8"))).model
    except OSError as error:
        raise InvalidRequest(f"{text} cannot be read: {error.strerror or error}") from error
    except InvalidRequest as error:
        raise InvalidRequest(f"{text}: {error}") from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise InvalidRequest(f"{text} is no JSON: {error}") from error
    assert isinstance(model, PiecewiseCost)
    # Under its own name, as a preset's stands for a GPU and the KV tokens that it holds.
    return PiecewiseCost(path.name, model.knots, model.base, **model.prices)


def positive_number(text: str) -> float:
    """An argument type.

    Raises:
        ArgumentTypeError: this is no positive, finite number.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return number


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """An argument type that says what `parse` has to say."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except InvalidRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked
