"""The model that a plan is for: a Hugging Face folder, and whether scores are of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megascore.errors import PlanError
from megascore.plans.model_size import ModelSize, model_size
from megascore.plans.units import Units, all_units
from megascore.scores.score_file import Scores
from megascore.weights.huggingface.checkpoint import HuggingFaceCheckpoint
from megascore.weights.huggingface.config import HuggingFaceModelConfig, read_config

__all__ = ["Parent"]

logger = logging.getLogger(__name__)

BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Parent:
    """A Hugging Face folder whose config and tensors go together; headers alone were read."""

    folder: Path
    checkpoint: HuggingFaceCheckpoint

    @classmethod
    def of(cls, folder: str | Path, *, warn: bool = True) -> Parent:
        """Read config.json and the headers of a folder.

        Args:
            folder: Where they are.
            warn: Whether to warn of tensors that the model does not have.

        Raises:
            ModelError: it is no checkpoint of a known family, or incomplete.
        """
        checkpoint = HuggingFaceCheckpoint(read_config(folder), folder)
        checkpoint.check(warn=warn)
        return cls(Path(folder), checkpoint)

    @property
    def config(self) -> HuggingFaceModelConfig:
        """The model as the files store it."""
        return self.checkpoint.config

    @cached_property
    def fingerprint(self) -> str:
        """What tells these weights from others; reads samples of all tensors."""
        return self.checkpoint.fingerprint()

    @cached_property
    def bytes_per_value(self) -> int:
        """Of the type that most of the tensors have."""
        types = [stored.dtype for stored in self.checkpoint.folder.tensors.values()]
        return BYTES_OF[max(sorted(set(types)), key=types.count)]

    @cached_property
    def units(self) -> Units:
        """All that the model has."""
        return all_units(self.config)

    @cached_property
    def size(self) -> ModelSize:
        """Of the whole model."""
        return model_size(self.config, self.units, self.bytes_per_value)

    def check_scores(self, scores: Scores, same_weights: bool) -> None:
        """Refuse scores of other weights; warn where nothing tells.

        Args:
            scores: What is to rank this model's units.
            same_weights: Whether the user vouches for them.

        Raises:
            PlanError: sizes or fingerprints differ.
        """
        model, facts = self.config.architecture, scores.metadata.get("model", {})
        sizes = {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
        }
        for name, size in sizes.items():
            if facts.get(name, size) != size:
                raise PlanError(
                    f"the scores are of a model with {name} {facts[name]}, and {self.folder} has {size}: take the "
                    "scores of this model, or name the model that was scored, model=FOLDER."
                )
        scored = scores.metadata.get("weights_fingerprint")
        if same_weights or scored == self.fingerprint:
            return
        if scored is not None:
            raise PlanError(
                f"the scores are of weights with the fingerprint {scored[:12]}..., and those of {self.folder} have "
                f"{self.fingerprint[:12]}...: take the scores of this model. If the same weights were scored from "
                "another format, say so: same_weights=true."
            )
        logger.warning(
            "The score file does not say of which weights it is (attach() can't know): %s is taken for the scored "
            "model, as its sizes are the same. same_weights=true says that it is.",
            self.folder,
        )
