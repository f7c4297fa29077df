"""Scores of one run as a read-only mapping, and the one file that they are kept in.

The file is a safetensors file: float64 vectors, their standard errors, the statistics behind them, and one JSON text
under the metadata key ``megascore`` with everything else, including a checksum over all of it. The same content gives
the same bytes, except for ``created``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from megascore.errors import ScoreFileError
from megascore.files.output_path import check_output_path, write_output
from megascore.files.tensor_file import DamagedFile, ForeignFile, decode, encode, json_text
from megascore.hooks.statistics import State
from megascore.parallel.comm import world_rank
from megascore.scores.uncertainty import Uncertainty
from megascore.versions import installed_versions

__all__ = [
    "SCHEMA_VERSION",
    "UNSEEN_VALUE",
    "ScoreKey",
    "Scores",
    "Unseen",
    "check_output_path",
    "load_scores",
    "split_key",
]

SCHEMA_VERSION = 2
"""Version 1 had scores alone; it is read as before."""
UNSEEN_VALUE = -1.0
"""Stands in a vector where no token reached an entry. A measured score may be the same number, for some are below zero:
what was not measured is told by `Scores.unseen` alone."""

Unseen: TypeAlias = list[int] | Literal["all"]
"""Entries of one vector that no token reached: their indices, or ``"all"`` for a vector that isn't there at all."""

_METADATA_KEY = "megascore"
_SEPARATOR = "#"
"""Between the parts of a tensor's name that are no parts of a key: a module's name can't have it."""
_ERROR = "standard_error"
_STATISTIC = "statistic"
_DAMAGED = "the file is damaged, or was changed after it was written: make it again or take a good copy"


class ScoreKey(NamedTuple):
    """The parts of a key: a global module name (``decoder`` for a model-wide vector), what is ranked, and by what."""

    site: str
    target: str
    method: str

    def __str__(self) -> str:
        """Return the key as it is written in a score file."""
        return "/".join(self)


def split_key(key: str) -> ScoreKey:
    """Split ``site/target/method`` into its parts.

    Raises:
        ScoreFileError: the key doesn't have three parts.
    """
    parts = key.split("/")
    if len(parts) != 3 or not all(parts):
        raise ScoreFileError(
            f"score key '{key}': expected site/target/method, such as decoder/layers/block_similarity."
        )
    return ScoreKey(*parts)


class Scores(Mapping[str, torch.Tensor]):
    """Scores by ``site/target/method``, float64 CPU vectors in global channel order; nothing in it can be changed.

    ``scores["decoder.layers.3.mlp.linear_fc2/ffn/l2_norm"]`` is a vector of ffn_size scores. The method may be left out
    where only one is there. Keys iterate in the order of the model: layer 2 before layer 10. What is read is a copy.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        metadata: Mapping[str, Any],
        unseen: Mapping[str, Unseen] | None = None,
        *,
        uncertainty: Mapping[str, Uncertainty] | None = None,
        statistics: Mapping[str, State] | None = None,
    ) -> None:
        """Copy and check; nothing is shared with the arguments.

        Args:
            values: One vector for each key, any float dtype and device.
            metadata: JSON-able. ``created`` (UTC), ``versions``, ``scores`` and ``sites`` are filled in where missing.
            unseen: What no token reached. The value of such an entry is replaced by `UNSEEN_VALUE`; a vector that is
                unseen as a whole is left out of the mapping.
            uncertainty: How sure the vectors are, by their keys, as far as it is known.
            statistics: What the scores were computed from, by ``site/target/method``, or ``moments`` for the method.

        Raises:
            ScoreFileError: a key, shape, value or index that can't be part of a score file.
        """
        vectors = {key: _checked_vector(key, values[key]) for key in values}
        self._unseen: dict[str, Unseen] = {}
        for key in sorted(unseen or {}, key=_model_order):
            split_key(key)
            self._mark_unseen(key, vectors, (unseen or {})[key])
        for key, vector in vectors.items():
            _require_finite(key, vector)
        self._values = {key: vectors[key] for key in sorted(vectors, key=_model_order)}
        self._metadata = _complete_metadata(metadata, {*self._values, *self._unseen})
        self._uncertainty = {
            key: _checked_uncertainty(key, own, self._values) for key, own in (uncertainty or {}).items()
        }
        self._statistics = {key: _checked_statistics(key, state) for key, state in (statistics or {}).items()}

    def _mark_unseen(self, key: str, vectors: dict[str, torch.Tensor], entry: Unseen) -> None:
        length = len(vectors[key]) if key in vectors else 0
        if entry == "all" or (length and len(set(entry)) == length):
            vectors.pop(key, None)
            self._unseen[key] = "all"
            return
        indices = sorted({int(index) for index in entry})
        if not indices:
            return
        if indices[0] < 0 or indices[-1] >= length:
            raise ScoreFileError(
                f"unseen entries of '{key}' go from {indices[0]} to {indices[-1]}: it has {length} scores."
            )
        vectors[key][indices] = UNSEEN_VALUE
        self._unseen[key] = list(indices)

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of what is known about the run: model, tokens, samples, layout, fingerprints, versions, sites."""
        return deepcopy(self._metadata)

    @property
    def unseen(self) -> dict[str, Unseen]:
        """A copy of what no token reached: for each key a list of indices, or ``"all"``."""
        return deepcopy(self._unseen)

    @property
    def uncertainty(self) -> Mapping[str, Uncertainty]:
        """How sure each vector is, by its full key: standard errors, and the expected overlap of two such runs.

        Vectors of which it is not known are left out: of iterative scores, and of runs of one step.
        """
        return MappingProxyType(self._uncertainty)

    @property
    def statistics(self) -> Mapping[str, State]:
        """What the scores were computed from; empty where the run kept none. Not a copy: read only.

        By ``site/target/method``, or ``site/target/moments`` where methods share them: tensors by name, float64 or
        int64, over all data, and, named ``... by group``, over each of 8 groups of steps.
        """
        return MappingProxyType(self._statistics)

    def __getitem__(self, key: str) -> torch.Tensor:
        """Return a copy of one vector, by ``site/target/method`` or by ``site/target`` where one method is there."""
        if key in self._values:
            return self._values[key].clone()
        with_method = [full for full in self._values if full.rpartition("/")[0] == key]
        if len(with_method) == 1:
            return self._values[with_method[0]].clone()
        raise KeyError(self._why_missing(key, with_method))

    def _why_missing(self, key: str, with_method: list[str]) -> str:
        if with_method:
            return f"'{key}' has several methods, name one: {', '.join(with_method)}"
        if any(key in (full, full.rpartition("/")[0]) for full in self._unseen):
            return f"'{key}' was not measured: no token reached it"
        short = {full if key.count("/") >= 2 else full.rpartition("/")[0]: None for full in self._values}
        near = get_close_matches(key, short, n=3)
        hint = f"near matches: {', '.join(near)}" if near else f"there are {len(self)} keys"
        return f"no scores for '{key}'; {hint}"

    def __iter__(self) -> Iterator[str]:
        """Iterate over the full keys in the order of the model."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return the number of vectors."""
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        """Return whether everything in them is exactly equal."""
        if not isinstance(other, Scores):
            return NotImplemented
        # The same content gives the same bytes.
        return self._to_bytes() == other._to_bytes()

    __hash__ = None  # type: ignore[assignment]  # equal content, no identity

    def __repr__(self) -> str:
        """Say what is there without printing the vectors."""
        num_tokens = self._metadata.get("num_tokens", "?")
        return f"Scores({len(self._values)} vectors, {num_tokens} tokens, {len(self._unseen)} unseen)"

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the score file; it appears whole or not at all.

        Not collective. In a `torch.distributed` run only global rank 0 writes, so that all ranks may call it; the
        others return at once.

        Args:
            path: File to write; its folder is made if missing.
            overwrite: Replace a file that is there.

        Raises:
            ScoreFileError: a file is there and `overwrite` is false, or it can't be written.
        """
        if world_rank() == 0:
            write_output(path, self._to_bytes(), overwrite=overwrite)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file that `save` writes."""
        return hashlib.sha256(self._to_bytes()).hexdigest()

    def _to_bytes(self) -> bytes:
        tensors = dict(self._values)
        tensors.update({f"{_ERROR}{_SEPARATOR}{key}": own.standard_error for key, own in self._uncertainty.items()})
        for key, state in self._statistics.items():
            tensors.update({f"{_STATISTIC}{_SEPARATOR}{key}{_SEPARATOR}{name}": v for name, v in state.items()})
        facts = {
            key: {"overlap": own.overlap, "groups": own.num_groups, "num_tokens": own.num_tokens}
            for key, own in self._uncertainty.items()
        }
        content = {"metadata": self._metadata, "unseen": self._unseen, "uncertainty": facts}
        return encode(_METADATA_KEY, content, tensors)


def load_scores(path: str | Path) -> Scores:
    """Read a score file; nothing in it is ever unpickled.

    Raises:
        ScoreFileError: missing, not a score file, damaged, or of a newer schema.
    """
    source = Path(path)
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "not found"
        raise ScoreFileError(f"score file {source} {what}: give the path of a file that 'megascore score' wrote.")
    try:
        content, values = decode(_METADATA_KEY, source.read_bytes())
    except OSError as error:
        raise ScoreFileError(f"score file {source} can't be read: {error.strerror or error}.") from error
    except ForeignFile as error:
        raise ScoreFileError(f"{source} is a safetensors file, but no score file: {error}.") from error
    except DamagedFile as error:
        # A newer megascore may keep its checksum in another way: say that first.
        _refuse_newer(source, error.content)
        raise ScoreFileError(f"score file {source} {error}: {_DAMAGED}.") from error
    _refuse_newer(source, content)
    try:
        return _from_content(content, values)
    except (ScoreFileError, KeyError, TypeError, ValueError) as error:
        raise ScoreFileError(f"score file {source}: {error}") from error


def _from_content(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Scores:
    values: dict[str, torch.Tensor] = {}
    errors: dict[str, torch.Tensor] = {}
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, separator, rest = name.partition(_SEPARATOR)
        if not separator:
            values[name] = tensor
        elif kind == _ERROR:
            errors[rest] = tensor
        elif kind == _STATISTIC:
            key, _, statistic = rest.partition(_SEPARATOR)
            statistics.setdefault(key, {})[statistic] = tensor
        else:
            raise ScoreFileError(f"it has a tensor '{name}' of a kind that is not known.")
    uncertainty = {
        key: Uncertainty(errors[key], facts["overlap"], facts["groups"], facts["num_tokens"])
        for key, facts in content.get("uncertainty", {}).items()
    }
    return Scores(values, content["metadata"], content["unseen"], uncertainty=uncertainty, statistics=statistics)


def _refuse_newer(source: Path, content: Any) -> None:
    metadata = content.get("metadata") if isinstance(content, dict) else None
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ScoreFileError(
            f"score file {source} has schema version {version}; this megascore reads up to {SCHEMA_VERSION}: "
            "update megascore."
        )


def _checked_vector(key: str, vector: torch.Tensor) -> torch.Tensor:
    split_key(key)
    if vector.dim() != 1 or not vector.is_floating_point() or not len(vector):
        raise ScoreFileError(f"scores of '{key}' are {vector.dtype} {list(vector.shape)}: expected a vector of floats.")
    return vector.detach().to("cpu", torch.float64, copy=True).contiguous()


def _checked_uncertainty(key: str, own: Uncertainty, values: Mapping[str, torch.Tensor]) -> Uncertainty:
    if key not in values or own.standard_error.shape != values[key].shape:
        raise ScoreFileError(f"the standard errors of '{key}' are not of its scores.")
    return replace(own, standard_error=own.standard_error.detach().to("cpu", torch.float64, copy=True).contiguous())


def _checked_statistics(key: str, state: State) -> dict[str, torch.Tensor]:
    split_key(key)
    for name, value in state.items():
        if _SEPARATOR in name or value.dtype not in (torch.float64, torch.int64):
            raise ScoreFileError(f"the statistic '{name}' of '{key}' is {value.dtype}: expected float64 or int64.")
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _require_finite(key: str, vector: torch.Tensor) -> None:
    bad = (~torch.isfinite(vector)).nonzero().flatten().tolist()
    if bad:
        raise ScoreFileError(
            f"scores of '{key}' are not finite at {len(bad)} of {len(vector)} entries, first at {bad[0]}: the model's "
            "activations overflowed or hold NaN. Check the weights, or run with model.dtype=float32."
        )


def _complete_metadata(metadata: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    parts = [split_key(key) for key in keys]
    derived = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "scores": sorted({f"{part.target}/{part.method}" for part in parts}),
        "sites": {},
    }
    # Through JSON and back, so that what is read from a file equals what was written into it.
    try:
        completed: dict[str, Any] = json.loads(json_text({**derived, **metadata}))
    except (TypeError, ValueError) as error:
        raise ScoreFileError(f"score metadata can't be written as JSON: {error}.") from error
    return completed


def _model_order(key: str) -> list[tuple[int, int, str]]:
    """Sort key that reads numbers as numbers: layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", key)]
