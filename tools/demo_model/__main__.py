"""`python -m tools.demo_model`, from the root of the repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from preble.demo import CHECKPOINT
from tools.demo_model.evaluate import evaluate
from tools.demo_model.training import train


def main() -> None:
    """Train or evaluate."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a model and write its folder")
    training.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    training.add_argument("--steps", type=int, help="cut the training short (default: until it is done)")
    training.add_argument("--out", type=Path, required=True, help="the folder to write")
    measuring = commands.add_parser("evaluate", help="print how exact a checkpoint answers")
    measuring.add_argument("folder", type=Path, nargs="?", default=CHECKPOINT, help="(default: the packaged one)")
    measuring.add_argument(
        "--lengths", type=int, nargs="+", default=[100, 500, 1000, 2000, 2500, 2900], metavar="TOKENS"
    )
    measuring.add_argument("--handbooks", type=int, default=16, help="of each length (default: %(default)s)")
    measuring.add_argument("--questions", type=int, default=32, help="per handbook (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "evaluate":
        evaluate(args.folder, args.lengths, args.handbooks, args.questions)
        return
    print("SHA-256 of the weights:", train(args.seed, args.out, args.steps))


if __name__ == "__main__":
    main()
