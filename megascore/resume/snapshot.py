"""Snapshots, the content of checkpoints: the merged state of a whole run between two steps, and the run's identity.

Nothing in it depends on the parallel layout, so any layout can go on from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from megascore.errors import CheckpointError, ConfigError
from megascore.files.tensor_file import ForeignFile, decode, encode, json_text
from megascore.hooks.statistics import State
from megascore.sites.requests import ScoreRequest
from megascore.versions import installed_versions

__all__ = ["SCHEMA_VERSION", "Snapshot", "describe_cursor", "differences", "fingerprint_of", "identity_of"]

SCHEMA_VERSION = 1
_KIND = "megascore_checkpoint"
_SEPARATOR = "#"
"""Between the key of a site and the name of a statistic: a module's name can't have it."""


@dataclass(frozen=True)
class Snapshot:
    """A run at the end of a step."""

    cursor: Mapping[str, int]
    """How far the data has been used: ``step``, and ``block`` where blocks are scored one at a time."""
    identity: Mapping[str, Any]
    """What the results depend on: model, data, order and scores, as `identity_of` flattens them."""
    states: Mapping[str, State]
    """Merged statistics by site and name."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the run adds up, such as the loss."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.cursor["step"]

    def to_bytes(self) -> bytes:
        """Return a checkpoint file's content."""
        tensors = {
            f"{key}{_SEPARATOR}{name}": value for key, state in self.states.items() for name, value in state.items()
        }
        tensors.update({f"{_SEPARATOR}{name}": value for name, value in self.sums.items()})
        content = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": installed_versions(),
            "cursor": dict(self.cursor),
            "identity": dict(self.identity),
            # A site that keeps nothing is still a site.
            "sites": sorted(self.states),
        }
        return encode(_KIND, content, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Read a checkpoint file's content.

        Raises:
            DamagedFile: it is not what was written.
            CheckpointError: it is a file of another kind, or of another schema.
        """
        try:
            content, tensors = decode(_KIND, data)
        except ForeignFile as error:
            raise CheckpointError(f"it is a safetensors file, but no checkpoint of a run: {error}") from error
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"it has schema version {version}, and this megascore goes on from {SCHEMA_VERSION} only: finish the "
                "run with the version of megascore that began it"
            )
        states: dict[str, dict[str, Tensor]] = {site: {} for site in content["sites"]}
        sums = {}
        for name, tensor in tensors.items():
            site, _, statistic = name.rpartition(_SEPARATOR)
            if site:
                states[site][statistic] = tensor
            else:
                sums[statistic] = tensor
        return cls(content["cursor"], content["identity"], states, sums)


def describe_cursor(cursor: Mapping[str, int]) -> str:
    """Return how far a run is, for people: "step 5", or "block 3" where blocks are scored one at a time."""
    return f"block {cursor['block']}" if "block" in cursor else f"step {cursor['step']}"


def identity_of(
    requests: Sequence[ScoreRequest],
    *,
    model: Mapping[str, Any],
    run: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    yours: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what tells one run from another, as one flat mapping from ``section.key`` to plain values.

    Checkpoints hold it, and score files its fingerprint: another name of a section or a key makes another run.

    Args:
        requests: What is scored.
        model: What tells the model from others.
        run: How it goes through the data; the version of megascore is added.
        data: What tells a job's data from others.
        yours: What the owner of a loop says of model and data.

    Raises:
        ConfigError: something has no form in JSON.
    """
    sections = {
        "model": model,
        "data": data or {},
        "run": {**run, "megascore": installed_versions()["megascore"]},
        "scores": [{"target": r.target, "method": r.method, **dict(r.options)} for r in requests],
        "yours": yours or {},
    }
    try:
        # As a checkpoint gives it back, where a tuple is a list.
        return dict(_flat(json.loads(json.dumps(sections, allow_nan=False)), ""))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the identity of the run has something that JSON can't hold: {error}.") from error


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """Return a SHA-256 of an identity, whatever the order of its entries."""
    return hashlib.sha256(json_text(dict(identity)).encode()).hexdigest()


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Name every entry that is not the same in both identities."""
    nothing = "not given"
    return [
        f"{key} is {_short(saved.get(key, nothing))} there, {_short(own.get(key, nothing))} here"
        for key in {**own, **saved}
        if saved.get(key, nothing) != own.get(key, nothing)
    ]


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{number}]")
    else:
        yield name, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-8:]}"
