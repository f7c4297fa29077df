"""The safetensors files of a folder: which of them count, what their headers say, and the tensors in them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megascore.errors import ModelError
from megascore.files.json_text import parse_json
from megascore.weights.fingerprint import sampled_digest

__all__ = ["INDEX", "SINGLE", "StoredTensor", "TensorReader", "WeightsFolder"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GIT_LFS = b"version https://git-lfs"
"""The first bytes of the text that stands in for a file whose content Git LFS has not fetched."""


class TensorReader(Protocol):
    """Reads tensors of a folder that is open."""

    def __call__(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """Return a tensor, or the part of it that one slice for each dimension cuts out."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, as the header of its file describes it."""

    path: Path
    dtype: str
    """Its type as safetensors writes it, such as ``BF16``."""
    shape: tuple[int, ...]
    begin: int
    """First byte of its values in the file."""
    end: int


class WeightsFolder:
    """The tensors of a folder. Headers are read once; files are open only inside of `reading` and `fingerprint`.

    The files that count are those that ``model.safetensors.index.json`` names; without an index it is
    ``model.safetensors`` alone; without either, every ``*.safetensors`` file. Other files are never opened.
    """

    def __init__(self, folder: str | Path) -> None:
        """Find the files and read their headers, no weights.

        Raises:
            ModelError: no files, one that is missing or damaged, a tensor that the index names and its file lacks, or
                one that two files hold.
        """
        self.folder = Path(folder)
        tensors: dict[str, StoredTensor] = {}
        for path, promised in _weight_files(self.folder).items():
            found = _read_header(path)
            for name in promised:
                if name not in found:
                    raise ModelError(
                        f"{path} has no tensor '{name}', which {INDEX} says is in it: the two are of different "
                        "checkpoints. Take good copies of both."
                    )
            for name in found:
                if name in tensors:
                    raise ModelError(
                        f"tensor '{name}' is both in {tensors[name].path} and in {path}: expected each tensor once. "
                        "Remove the file that is not of this checkpoint."
                    )
            tensors.update(found)
        self.tensors: Mapping[str, StoredTensor] = tensors

    @contextmanager
    def reading(self) -> Iterator[TensorReader]:
        """Yield a function that reads tensors; each file is opened when it is needed first, and all close at the end.

        Tensors are on the CPU and of the file's type. A whole one may be a view of the file, whose bytes are read when
        its values are, and which stays open for it.

        Raises:
            ModelError: a file is missing, damaged, or no longer as its header said.
        """
        with ExitStack() as stack:
            files: dict[Path, Any] = {}

            def read(name: str, part: tuple[slice, ...] | None = None) -> Tensor:
                path, shape = self.tensors[name].path, self.tensors[name].shape
                try:
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="pt"))
                    found = files[path].get_slice(name)
                    if tuple(found.get_shape()) != shape:
                        raise ModelError(f"{path}: {name} has changed its shape while it was in use.")
                    tensor: Tensor = files[path].get_tensor(name) if part is None else found[part]
                except (SafetensorError, OSError) as error:
                    raise _unreadable(path, error) from error
                return tensor

            yield read

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, types, shapes and samples of the bytes of all tensors.

        The same weights give the same text however the tensors are spread over files. Training changes every part of
        every tensor, so samples tell; a change made to a few values by hand may go unseen.

        Raises:
            ModelError: a file is gone.
        """
        entries = []
        for path, tensors in groupby(self.tensors.items(), key=lambda item: item[1].path):
            try:
                with path.open("rb") as file:
                    for name, stored in tensors:
                        sample = sampled_digest(file, stored.begin, stored.end)
                        entries.append(f"{name} {stored.dtype} {list(stored.shape)} {sample}".encode())
            except OSError as error:
                raise _unreadable(path, error) from error
        digest = hashlib.sha256()
        for entry in sorted(entries):
            digest.update(entry)
        return digest.hexdigest()


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """Return the files that count, sorted, each with the tensors that the index says are in it."""
    if (folder / INDEX).is_file():
        return _files_of_index(folder)
    paths = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(
            f"{folder} has no *.safetensors files, neither {SINGLE} nor an {INDEX}: expected a checkpoint in "
            "safetensors format. Save it again with transformers' save_pretrained; pickled *.bin files are never read."
        )
    return {path: [] for path in paths}


def _files_of_index(folder: Path) -> dict[Path, list[str]]:
    index = folder / INDEX
    try:
        weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{index} cannot be read as an index with a weight_map: {error!r}. Take a good copy."
        ) from error
    is_mapping = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not is_mapping or not weight_map:
        raise ModelError(
            f"{index} cannot be read as an index with a weight_map: expected a mapping of tensor names to file names. "
            "Take a good copy."
        )
    names: dict[str, list[str]] = defaultdict(list)
    for tensor, file in weight_map.items():
        names[file].append(tensor)
    for file, tensors in names.items():
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder / file} not found: {INDEX} says that it holds {len(tensors)} tensors, such as '{tensors[0]}'."
            )
    return {folder / file: names[file] for file in sorted(names)}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file; the format is at https://github.com/huggingface/safetensors."""
    try:
        with path.open("rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise ModelError(
                    f"{path} is a Git LFS pointer, not the weights that it stands for: fetch them with 'git lfs pull'."
                )
            # Whether the header is sound, and goes with the length of the file, is safetensors' own affair.
            with safe_open(path, framework="pt"):
                file.seek(0)
                header_bytes = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(header_bytes))
    except ModelError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    begin = 8 + header_bytes
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), *(begin + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} cannot be read as a safetensors file: {error}. Take a good copy.")
