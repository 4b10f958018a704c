"""A checkpoint folder as published on the hub: where it lies, and the tensors in its safetensors files."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from preble.engine.folder_advice import NO_GGUF, git_pointer, instead_of, is_git_pointer, nearest_model, where_it_ends
from preble.engine.json_fields import JsonFields
from preble.engine.rust_panics import panics_as
from preble.errors import CheckpointError, UnsupportedModel

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
_UNWANTED_FILES = ["*/*", "consolidated*.safetensors"]
"""Copies of the weights in other formats, which many repositories hold beside the usual files."""
_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_HEADER = 32 << 20
"""Bytes of a safetensors header: some 300,000 tensors. Published files have a thirtieth of that."""
_SHOWN = 500
"""Characters of the words of others in an error."""
_NAMED = 5
"""How many of the wrong tensors an error names."""


def resolve_model(model: str | Path) -> Path:
    """The checkpoint folder of `model`: a local folder, or a hub id such as `org/name`.

    A hub id is looked up in the local cache first and downloaded only when files are missing there; of a repository
    only the config, safetensors and tokenizer files are taken. Raises `CheckpointError` when there is no such folder
    or repository, when it is not cached and the hub cannot be reached, and when files are missing (`check_folder`).
    """
    folder = Path(model).expanduser()
    if str(model) and folder.is_dir():
        check_folder(folder)
        return folder
    if folder.is_file():
        if folder.suffix == ".gguf":
            raise CheckpointError(f"{folder} is a GGUF file{NO_GGUF}")
        raise CheckpointError(f"{folder} is a file; give the folder with config.json, safetensors and tokenizer files")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"the model {str(model)!r} is neither a folder nor a hub id such as 'org/name'"
            f"{nearest_model(str(model)) or where_it_ends(folder)}"
        )
    return _hub_snapshot(model)


def _hub_snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    def snapshot(*, cached: bool) -> Path:
        path = snapshot_download(
            hub_id, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES, local_files_only=cached
        )
        return Path(path)

    try:
        folder = snapshot(cached=True)
        check_folder(folder)
        return folder
    except (LocalEntryNotFoundError, CheckpointError):
        pass  # Not cached, or cached by a program that needed only some of the files.
    try:
        folder = snapshot(cached=False)
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {hub_id!r}, and no repository of that name on the hub that you may read; for a "
            f"private or gated one log in first, by `hf auth login`{nearest_model(hub_id)}"
        ) from None
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {hub_id!r}; as a hub id it is not, or not completely, in the local cache, and the "
            f"hub cannot be reached to download it ({_root_cause(error)}). `hf download {hub_id}` fills the cache "
            f"where there is a network; the path of a folder does as well{nearest_model(hub_id)}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{hub_id!r} cannot be downloaded from the hub: {error}") from error
    check_folder(folder)
    return folder


def _root_cause(error: BaseException) -> str:
    """The first of a chain of errors, in a line: the rest are its way through the layers of an HTTP client."""
    cause: BaseException | None = error
    while cause is not None:
        error, cause = cause, cause.__cause__ or cause.__context__
    return f"{error!s:.{_SHOWN}}".partition("\n")[0] or type(error).__name__


def check_folder(folder: str | Path) -> None:
    """Raise `CheckpointError`, naming the file, when `folder` lacks config.json, safetensors or tokenizer files."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json{instead_of(folder)}")
    _weight_files(folder)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer.json (nor tokenizer.model, nor vocab.json with merges.txt); "
            "copy the tokenizer files of the model it was made from"
        )


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and which of them the index says holds each tensor; empty without an index."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], {}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise _no_safetensors(folder)
    fields = JsonFields.read(index)
    weight_map = fields.object("weight_map")
    if weight_map is None:
        raise fields.wrong("weight_map", "an object that maps tensors to files")
    for name, file in weight_map.values.items():
        # A name with a folder in it could point anywhere on this machine.
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise CheckpointError(f"{index}: {name!r:.80} lies in {file!r:.80}, which is not a file name")
    files = sorted(set(weight_map.values.values()))
    missing = [file for file in files if not os.path.isfile(folder / file)]
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {_some(missing)}; download them again")
    return [folder / file for file in files], dict(weight_map.values)


def _no_safetensors(folder: Path) -> CheckpointError:
    problem = f"{folder} has neither model.safetensors nor model.safetensors.index.json"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if not others:
        return CheckpointError(f"{problem}: the weights are missing. Download or copy the model's safetensors files")
    if all(name.endswith(".gguf") for name in others):
        return CheckpointError(f"{problem}, only {_some(others)}{NO_GGUF}")
    return CheckpointError(
        f"{problem}, only {_some(others)}; Preble reads safetensors. Weights in .bin files can be converted with "
        f"transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name if name.isprintable() else repr(name):.120}" for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


class TensorEntry(NamedTuple):
    """What a safetensors header says about a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """In the format's words: `BF16`, …"""


class Checkpoint:
    """The tensors in a folder's safetensors files, by name. Only the headers are read until a tensor is asked for.

    Raises `CheckpointError` when files are missing, cut short or corrupt.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files, weight_map = _weight_files(self.folder)
        self.tensors: dict[str, TensorEntry] = {}
        for file in files:
            for name, entry in _read_header(file):
                # A tensor in two files is taken from the one that the index names.
                if weight_map.get(name, file.name) == file.name:
                    self.tensors[name] = entry

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]) -> None:
        """Raise `CheckpointError`, naming the tensors, unless they are exactly those `expected`, by name and shape.

        Tensors for whose name `ignored` is true may be there, whatever they are.
        """
        missing = [name for name in expected if name not in self.tensors]
        extra = [name for name in self.tensors if name not in expected and not ignored(name)]
        misshapen = [
            f"{name} is {list(self.tensors[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        found = [("missing", missing), ("unexpected", extra), ("of the wrong shape", misshapen)]
        problems = "; ".join(f"{problem}: {_some(names)}" for problem, names in found if names)
        if problems:
            raise CheckpointError(f"the tensors in {self.folder} do not fit its config.json. {problems}")
        for name in expected:
            if self.tensors[name].dtype not in _FLOAT_DTYPES:
                raise UnsupportedModel(
                    f"{self.folder}: {name} is stored as {self.tensors[name].dtype}; supported are "
                    f"{', '.join(_FLOAT_DTYPES.values())}"
                )

    @property
    def main_dtype(self) -> str:
        """The dtype in which most of the values are stored, by torch's name."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += math.prod(tensor.shape)
        return _FLOAT_DTYPES.get(max(sizes, key=sizes.__getitem__, default="F32"), "float32")

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A tensor, read straight to a device.

        On the CPU it is mapped from its file: memory is taken up as it is read and given back with it.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        entry = self.tensors[name]
        try:
            # Opened anew for every tensor, so that no handle keeps the pages of tensors already used.
            with panics_as(RuntimeError), safe_open(entry.file, framework="pt", device=str(device)) as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{name} cannot be read from {entry.file}: {error!s:.{_SHOWN}}") from error
        # The format does not align tensors; kernels that load whole vectors expect it.
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _read_header(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    from safetensors import SafetensorError, safe_open

    def corrupt(why: object) -> CheckpointError:
        return CheckpointError(
            f"{path} is cut short, corrupt or not a safetensors file: {why!s:.{_SHOWN}}. Download or copy it again"
        )

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if is_git_pointer(path):
            raise CheckpointError(git_pointer(path))
        if length > MAX_HEADER:
            raise corrupt(f"its header claims {length} bytes, more than {MAX_HEADER}")
        # As for numpy: torch would ask for memory of the file's size, which larger models than fit are refused.
        with panics_as(corrupt), safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - the handle itself cannot be iterated
                header = opened.get_slice(name)
                yield name, TensorEntry(path, tuple(header.get_shape()), header.get_dtype())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise corrupt(error) from None
