"""What is wrong with a folder that was given as a checkpoint, and what to give instead."""

from __future__ import annotations

import difflib
from pathlib import Path

_POINTER = b"version https://git-lfs"
"""How the text begins that Git keeps in place of a large file."""
_LOOKED_AT = 1000
"""Names in a folder, at most: nobody mistypes one of more."""


def nearest_model(model: str) -> str:
    """A clause for an error about a model that is not there: the folder or name that was probably meant, if any."""
    folder = Path(model).expanduser()
    try:
        names = [
            entry.name for entry, _ in zip(folder.parent.iterdir(), range(_LOOKED_AT), strict=False) if entry.is_dir()
        ]
    except OSError:  # there is no such place, or nobody may look into it
        names = []
    known = {name: str(folder.parent / name) for name in names} | ({"demo": "demo"} if folder.name == model else {})
    close = difflib.get_close_matches(folder.name, known, n=1)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def where_it_ends(folder: Path) -> str:
    """A clause for an error about a folder that is not there: how far its path leads."""
    there = folder.absolute()
    try:
        while not there.is_dir():
            there, missing = there.parent, there
    except OSError:  # a name that is too long
        return ""
    return f"; there is no {missing.name!r} in {str(there)!r}" if there != folder.absolute() else ""


def instead_of(folder: Path) -> str:
    """A clause for an error about a folder without config.json: what it holds instead."""
    if (folder / "adapter_config.json").is_file():
        return (
            ", but an adapter: merge it into the model that it was trained on (peft's merge_and_unload), and save that "
            "with its tokenizer"
        )
    for inner in ("*/config.json", "snapshots/*/config.json"):
        for config in folder.glob(inner):
            return f"; give {str(config.parent)!r}, which has one"
    if any(folder.glob("*.gguf")):
        return f", but a GGUF file{NO_GGUF}"
    return ", so it is not a checkpoint as published on the hub: give the folder that has config.json and safetensors"


NO_GGUF = ": Preble reads safetensors. Give the folder or hub id of the model that it was converted from"
"""A clause for an error about a GGUF file."""


def is_git_pointer(path: Path) -> bool:
    """Whether Git left the text in a file's place that says where to fetch it."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def git_pointer(path: Path) -> str:
    """The message about such a file."""
    return f"{path} is not the file itself, but Git's pointer to it: run `git lfs pull` in {str(path.parent)!r}"
