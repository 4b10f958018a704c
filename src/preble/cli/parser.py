"""How the command line is read: mistakes in one line, which says what was probably meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from preble.cli.examples import EXAMPLES


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of a screen of usage, keeps the paragraphs of descriptions, and ends its
    help with examples."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **options})
        self._given: list[str] = []
        examples = EXAMPLES.get(self.prog.removeprefix("preble").strip())
        if examples:
            lines = "\n".join(f"  {line}" for example in examples for line in example.splitlines())
            self.epilog = f"{self.epilog or ''}\n\nexamples:\n{lines}".strip()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, with hints: a missing subcommand is one of those there are, an unknown option like one
        of the subcommand that was given."""
        found, unknown = self.parse_known_args(args, namespace)
        parser = self
        while subcommands := parser._subcommands():
            name = getattr(found, subcommands.dest)
            if name is None:
                hint = parser._misspelt(unknown)
                parser.error(f"{subcommands.metavar} is missing, one of {', '.join(subcommands.choices)}{hint}")
            parser = subcommands.choices[name]
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{parser._misspelt(unknown)}")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        hint = self._misspelt(self._given) if "arguments are required" in message else ""
        self.exit(2, f"{self.prog}: {message}{hint} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = _nearest(str(value), choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(choices)}){hint}")

    def _misspelt(self, given: Sequence[str]) -> str:
        """A clause for an error: what the first option that there is not was probably meant to be, if anything."""
        options = [word.partition("=")[0] for word in given if word.startswith("--")]
        unknown = [option for option in options if option not in self._option_string_actions]
        return _nearest(unknown[0], self._option_string_actions) if unknown else ""

    def _subcommands(self) -> Any:
        """The action that takes a subcommand, if this parser has any."""
        return next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)


class HelpFormatter(argparse.HelpFormatter):
    """Fills each paragraph of a description by itself, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(
            paragraph if paragraph.startswith("examples:") else fill(paragraph, width, indent)
            for paragraph in text.split("\n\n")
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    """A clause for an error: what was probably meant, if anything."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
