"""One Megatron checkpoint in the ``torch_dist`` format: its tensors, its files and its fingerprint, read safely."""

from __future__ import annotations

import hashlib
import logging
import re
from functools import cached_property
from pathlib import Path

import torch

from megascore.errors import ModelError
from megascore.files.json_text import parse_json
from megascore.weights.fingerprint import sampled_digest
from megascore.weights.torch_dist.common import CommonState, read_common
from megascore.weights.torch_dist.index import CheckpointIndex, read_index

__all__ = ["EMBEDDING", "MegatronCheckpoint", "find_iteration"]

logger = logging.getLogger(__name__)

EMBEDDING = "embedding.word_embeddings.weight"
LATEST = "latest_checkpointed_iteration.txt"
LEGACY_RANKS = "mp_rank_[0-9]*"
NO_WEIGHTS = re.compile(r"(^|\.)(optimizer|chained_\d+|rng_state|rerun_state_machine_state)(\.|$|/)|_extra_state")


def find_iteration(folder: str | Path) -> Path:
    """Return the folder of one iteration: the given one, or the latest that Megatron has saved under it.

    Raises:
        ModelError: no such folder, or none that holds a ``torch_dist`` checkpoint.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ModelError(f"checkpoint folder {root} not found: model.load names a Megatron torch_dist checkpoint.")
    if (root / "metadata.json").is_file():
        return root
    latest = root / LATEST
    _refuse_legacy(root)
    if not latest.is_file():
        raise ModelError(
            f"{root} has neither metadata.json nor {LATEST}: model.load expects a checkpoint that Megatron saved with "
            "--ckpt-format torch_dist, or the folder above its iter_NNNNNNN."
        )
    iteration = latest.read_text(encoding="utf-8", errors="replace").strip()
    name = f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
    _refuse_legacy(root / name)
    if name not in {path.name for path in root.iterdir()} or not (root / name / "metadata.json").is_file():
        raise ModelError(f"{latest} says '{iteration}', but {root / name} has no metadata.json: expected a checkpoint.")
    return root / name


def _refuse_legacy(folder: Path) -> None:
    ranks = sorted(path.name for path in folder.glob(LEGACY_RANKS)) if folder.is_dir() else []
    if ranks:
        raise ModelError(
            f"{folder} is a legacy checkpoint (--ckpt-format torch: {ranks[0]} and {len(ranks) - 1} more ranks), which "
            "can only be read in its own layout and by unpickling. Save it with --ckpt-format torch_dist "
            "(--ckpt-convert-format torch_dist in Megatron-LM), or give the Hugging Face folder as model.hf."
        )


class MegatronCheckpoint:
    """One iteration: names and places of its tensors, and the values that Megatron kept beside them. Not collective."""

    def __init__(self, folder: str | Path) -> None:
        """Read the index, no weights.

        Raises:
            ModelError: no checkpoint there, of another format, or its index is damaged.
        """
        self.folder = find_iteration(folder)
        self._check_format()
        index = self.folder / ".metadata"
        if not index.is_file():
            raise ModelError(f"{self.folder} has no .metadata, its index: the checkpoint was not saved to the end.")
        self.index: CheckpointIndex = read_index(index)

    @property
    def name(self) -> str:
        """Name of the checkpoint: that of its folder, or of the one above where the folder is an iteration."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name.startswith("iter_") else folder.name

    @cached_property
    def prefix(self) -> str:
        """Text before Megatron's names of its tensors: none, or ``module.`` as NeMo saves them.

        Raises:
            ModelError: the checkpoint holds no language model.
        """
        names = [name for name in self.index.tensors if name.endswith(EMBEDDING) and not NO_WEIGHTS.search(name)]
        if not names:
            raise ModelError(
                f"checkpoint {self.folder} has no tensor '{EMBEDDING}': expected the weights of a language model."
            )
        return min(names, key=len).removesuffix(EMBEDDING)

    @cached_property
    def weights(self) -> dict[str, torch.Size]:
        """Global shapes of the model's own tensors by their names without `prefix`; no optimizer, no random states."""
        return {
            name.removeprefix(self.prefix): entry.size
            for name, entry in self.index.tensors.items()
            if name.startswith(self.prefix) and not NO_WEIGHTS.search(name)
        }

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, with those that Megatron pads it by."""
        return self.weights[EMBEDDING][0]

    @cached_property
    def naming(self) -> dict[str, bool]:
        """Metadata for Megatron's ``sharded_state_dict``: the ways in which this checkpoint names its tensors."""
        numbered = re.compile(r"decoder\.layers\.\d+\.")
        singletons = re.compile(r"experts\.experts\.\d+\.|linear_fc1\.(weight|bias)_w$")
        return {
            "non_homogeneous_layers": any(numbered.match(name) for name in self.weights),
            "singleton_local_shards": any(singletons.search(name) for name in self.weights),
        }

    def check_vocabulary(self, vocab_size: int, said_by: str) -> None:
        """Check that the checkpoint has the tokens of a model; further rows are padding, of which the log tells.

        Args:
            vocab_size: Tokens of the model.
            said_by: Where that number stands, for messages.

        Raises:
            ModelError: it has fewer.
        """
        if self.vocab_size < vocab_size:
            raise ModelError(
                f"'{EMBEDDING}' in checkpoint {self.folder} has {self.vocab_size} tokens, but {said_by} says "
                f"{vocab_size}: they are not of one model."
            )
        if self.vocab_size > vocab_size:
            logger.info(
                "'%s' in checkpoint %s has %d rows, of which %s says that %d are tokens: the others are padding",
                EMBEDDING,
                self.folder,
                self.vocab_size,
                said_by,
                vocab_size,
            )

    @cached_property
    def common(self) -> CommonState:
        """Values that Megatron keeps unsharded, such as its ``args``.

        Raises:
            ModelError: it is missing or cannot be read safely.
        """
        return read_common(self.folder, self.index)

    def check_files(self) -> None:
        """Check that every file with weights is there and as long as the index says.

        Raises:
            ModelError: one is missing or cut short.
        """
        ends: dict[str, tuple[int, str]] = {}
        for part, place in self.index.places.items():
            end = place.offset + place.length
            if end > ends.get(place.relative_path, (-1, ""))[0]:
                ends[place.relative_path] = end, part.fqn
        for name, (end, tensor) in sorted(ends.items()):
            path = self.folder / name
            if not path.is_file():
                raise ModelError(f"{path} not found: the checkpoint's index says that it holds '{tensor}'.")
            if path.stat().st_size < end:
                raise ModelError(
                    f"{path} has {path.stat().st_size} bytes, but the checkpoint's index says that '{tensor}' goes on "
                    f"to byte {end}: the file was cut short."
                )

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, types, shapes and samples of the bytes of all parts of the model's tensors.

        It tells one saved checkpoint from another; the same weights saved from another layout give another text.
        """
        digest = hashlib.sha256()
        parts = {(part.fqn, tuple(part.offset or ())): place for part, place in self.index.places.items()}
        for name, offset in sorted(parts):
            if not NO_WEIGHTS.search(name):
                entry, place = self.index.tensors[name], parts[name, offset]
                with (self.folder / place.relative_path).open("rb") as file:
                    sample = sampled_digest(file, place.offset, place.offset + place.length)
                digest.update(f"{name} {entry.properties.dtype} {list(entry.size)} {offset} {sample}".encode())
        return digest.hexdigest()

    def _check_format(self) -> None:
        path = self.folder / "metadata.json"
        try:
            backend = parse_json(path.read_text(encoding="utf-8"))["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read as that of a Megatron checkpoint: {error!r}") from error
        if backend != "torch_dist":
            raise ModelError(
                f"checkpoint {self.folder} has the format '{backend}', expected 'torch_dist': save it again with "
                "--ckpt-format torch_dist."
            )
