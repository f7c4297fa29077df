"""Config of a scoring job: typed sections, read from YAML and ``key=value`` overrides.

Unknown keys, wrong types and contradictions are refused here, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megascore.errors import ConfigError
from megascore.sites.requests import resolve_scores
from megascore.typed_text import layer_of_file, layer_of_override, text_keys

__all__ = ["DataConfig", "JobConfig", "ModelConfig", "ParallelConfig", "RunConfig", "load_config"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("auto", "cpu", "cuda")
RESUME = ("auto", "never")
MINUTES_OF_A_YEAR = 525_600
SECTIONS = {
    "model": "model.hf=FOLDER",
    "data": "data.text=FILE",
    "parallel": "parallel.tensor=2",
    "run": "run.output=FILE",
}
"""Sections of a config, with an example of each."""
DATA_SOURCES = ("text", "jsonl", "dataset", "megatron", "tokens")


@dataclass
class ModelConfig:
    """The model whose parts are scored."""

    hf: str | None = None
    """Hugging Face checkpoint directory (config.json, *.safetensors, tokenizer files). Beside ``load`` its config and
    tokenizer are used, not its weights; beside ``provider`` its tokenizer."""
    load: str | None = None
    """Megatron checkpoint in the torch_dist format: the folder of an iteration, or the one above with the latest."""
    provider: str | None = None
    """``package.module:function`` that returns the model of a rank, such as Megatron-LM's ``model_provider``."""
    fingerprint: str | None = None
    """What tells the weights of ``provider`` without ``load`` from others, in words of your own; needed with
    run.checkpoint_dir, as nothing else would notice that they are not those of the checkpoint."""
    dtype: str = "bfloat16"
    """Data type of weights and activations: float32, bfloat16, float16 or float64."""

    def __post_init__(self) -> None:
        """Check values that do not depend on other sections."""
        _require_one_of("model.dtype", self.dtype, DTYPES)
        if self.provider is not None and ":" not in self.provider:
            raise ConfigError(f"model.provider is '{self.provider}': expected package.module:function.")


@dataclass
class DataConfig:
    """Calibration data, from exactly one of text, jsonl, dataset, megatron and tokens."""

    text: str | None = None
    """Plain UTF-8 text file: one running text."""
    jsonl: str | None = None
    """JSON lines, each with a document in the field named by ``field``."""
    dataset: str | None = None
    """Folder that Hugging Face's ``Dataset.save_to_disk`` wrote; documents are in the column named by ``field``."""
    megatron: str | None = None
    """Megatron's indexed dataset of token ids: the path of its .bin and .idx files, without these endings."""
    tokens: str | None = None
    """.npy file of token ids: a stream [tokens], or documents [samples, tokens]."""
    field: str = "text"
    """Field or column with the documents: texts, or lists of token ids."""
    tokenizer: str | None = None
    """Hugging Face folder of the tokenizer; null takes that of model.hf."""
    packing: bool = True
    """Join documents and cut them into whole samples; false makes a sample of each document, cut off or padded."""
    sequence_length: int = 256
    """Tokens of one sample."""
    num_samples: int | None = None
    """Samples to use; null uses all there are."""

    def __post_init__(self) -> None:
        """Check the keys against each other.

        Raises:
            ConfigError: more than one source, or a text that is not to be packed.
        """
        given = [key for key in DATA_SOURCES if getattr(self, key) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(f'data.{key}' for key in given)} are given: expected one of them.")
        if self.text is not None and not self.packing:
            raise ConfigError(
                "data.packing=false makes a sample of each document, and data.text is one document: "
                "put documents into a file of JSON lines (data.jsonl), or leave data.packing=true."
            )
        _require_at_least("data.sequence_length", self.sequence_length, 2)
        if self.num_samples is not None:
            _require_at_least("data.num_samples", self.num_samples, 1)

    def source(self) -> tuple[str, str]:
        """Return the key of the source that is given, and its path.

        Raises:
            ConfigError: none is.
        """
        for key in DATA_SOURCES:
            path = getattr(self, key)
            if path is not None:
                return key, path
        raise ConfigError(f"no data is given: expected one of {', '.join(f'data.{key}' for key in DATA_SOURCES)}.")


@dataclass
class ParallelConfig:
    """Degrees of the parallel axes; data parallelism takes the ranks that are left."""

    tensor: int = 1
    sequence: bool = False
    """Sequence parallelism in the norms; needs ``tensor`` larger than 1."""
    pipeline: int = 1
    pipeline_layers: list[int] | None = None
    """Layers of each pipeline stage; null splits evenly."""
    virtual_pipeline: int = 1
    """Model chunks of each pipeline stage."""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    processes: int | None = None
    """Processes that the job is meant for, over all machines: any other number is refused. null takes those that are
    started, and for a dry run in one process the fewest that fit."""

    def __post_init__(self) -> None:
        """Check the axes against each other.

        Raises:
            ConfigError: a degree below 1, or a combination that Megatron-Core does not have.
        """
        for axis in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor"):
            _require_at_least(f"parallel.{axis}", getattr(self, axis), 1)
        if self.processes is not None:
            _require_at_least("parallel.processes", self.processes, 1)
        if self.sequence and self.tensor == 1:
            raise ConfigError("parallel.sequence=true needs parallel.tensor larger than 1; it is 1.")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError("parallel.virtual_pipeline larger than 1 needs parallel.pipeline larger than 1; it is 1.")
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.pipeline:
            raise ConfigError(
                f"parallel.pipeline_layers has {len(self.pipeline_layers)} entries, {self.pipeline_layers}: "
                f"expected one for each of parallel.pipeline={self.pipeline} stages."
            )


@dataclass
class RunConfig:
    """How the run goes and where its result is written."""

    steps: int | None = None
    """Steps to run; null runs over all samples, 0 is a dry run that lists the sites."""
    global_batch_size: int = 8
    """Samples of one step, over all data-parallel ranks. The order of samples does not depend on the layout."""
    micro_batch_size: int = 1
    """Samples of one forward pass."""
    seed: int = 0
    """Seed of the order of the samples."""
    output: str = "scores.safetensors"
    """Score file to write."""
    overwrite: bool = False
    """Replace a score file that is already there."""
    device: str = "auto"
    """auto (CUDA where there is some), cpu or cuda."""
    loss: bool = True
    """Also compute the language-model loss on the calibration data, which tells whether model and text fit."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others before all stop with an error."""
    checkpoint_dir: str | None = None
    """Folder of this run's checkpoints and its progress.json, seen by all machines; null: a killed run is lost."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints; null leaves it to the clock."""
    checkpoint_seconds: float | None = 300.0
    """Time between checkpoints by rank 0's clock, at least 100 times what the last one took; null: no clock."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint in the folder; never drops those that are there and starts afresh."""
    blockwise: bool = False
    """Run one layer at a time over all samples, so that only its weights need be on the device."""
    spool_dir: str | None = None
    """Folder for what waits between two layers with ``blockwise``; null keeps it in host memory."""
    spool_memory_gb: float = 0.0
    """Host memory of each rank, in GB (1e9 bytes), that is filled before ``spool_dir`` is."""
    until: dict[str, float] | None = None
    """``{overlap: 0.98}`` ends the run when, for all scores, two such runs are expected to have so much of the lowest
    quarter in common; null runs all steps."""
    keep_statistics: bool = True
    """Keep in the score file what scores were computed from, so that it can be scored again, and merged."""

    def __post_init__(self) -> None:
        """Check values that do not depend on other sections."""
        if self.steps is not None:
            _require_at_least("run.steps", self.steps, 0)
        _require_at_least("run.global_batch_size", self.global_batch_size, 1)
        _require_at_least("run.micro_batch_size", self.micro_batch_size, 1)
        _require_one_of("run.device", self.device, DEVICES)
        _require_one_of("run.resume", self.resume, RESUME)
        if self.checkpoint_interval is not None:
            _require_at_least("run.checkpoint_interval", self.checkpoint_interval, 1)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"run.seed is {self.seed}: expected a whole number from 0 to 2**63 - 1.")
        _require_positive("run.timeout_minutes", self.timeout_minutes)
        if self.timeout_minutes > MINUTES_OF_A_YEAR:
            raise ConfigError(
                f"run.timeout_minutes is {self.timeout_minutes}: expected {MINUTES_OF_A_YEAR} at most, which is a year."
            )
        self._check_spool()
        self._check_until()
        if self.checkpoint_seconds is not None:
            _require_positive("run.checkpoint_seconds", self.checkpoint_seconds)

    def _check_until(self) -> None:
        if self.until is None:
            return
        overlap = self.until.get("overlap")
        if set(self.until) != {"overlap"} or overlap is None or not 0 < overlap < 1:
            raise ConfigError(f"run.until is {dict(self.until)}: expected {{overlap: 0.98}}, or another part below 1.")
        if self.blockwise:
            raise ConfigError(
                "run.until is given with run.blockwise=true, where each layer goes over all samples before the next "
                "one begins: leave out one of the two."
            )

    def _check_spool(self) -> None:
        if self.spool_dir is not None and not self.blockwise:
            raise ConfigError("run.spool_dir is given without run.blockwise=true: nothing waits in a full pass.")
        if self.spool_memory_gb and self.spool_dir is None:
            raise ConfigError("run.spool_memory_gb is given without run.spool_dir: without one all is kept in memory.")
        if not 0 <= self.spool_memory_gb < inf:
            raise ConfigError(f"run.spool_memory_gb is {self.spool_memory_gb}: expected 0 or more, and finite.")


@dataclass
class JobConfig:
    """A whole scoring job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    scores: Any = "low_loss"
    """A recipe name, or a list of ``{target, method}``."""
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Check the scores, which have a shape of their own."""
        requests = resolve_scores(self.scores)
        for request in requests if self.run.until is not None else ():
            if request.num_steps is not None:
                raise ConfigError(
                    f"run.until is given, and {request.target}/{request.method} needs {request.num_steps} steps, no "
                    "fewer: leave out one of the two."
                )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a YAML file and ``key=value`` overrides into a checked config.

    Relative paths stay relative to the working directory, as with other torchrun programs. Keys that hold text keep it
    as it was typed: ``run.checkpoint_dir=4711_3`` is the folder ``4711_3``, not a number.

    Args:
        path: YAML file with the sections of `JobConfig`.
        overrides: Such as ``["run.steps=0", "parallel.tensor=2"]``; later ones win.

    Returns:
        The config, all fields filled.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest right one is named), wrong type, contradiction.
    """
    source = Path(path)
    if not source.is_file():
        raise ConfigError(f"config file {source} not found: give the path of a YAML file.")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override '{override}' has no '=': expected key=value, such as run.steps=0.")
    try:
        given = OmegaConf.load(source)
        if not isinstance(given, DictConfig):
            raise ConfigError(
                f"config file {source} holds {type(given).__name__}, expected sections such as 'model:' and 'run:'."
            )
        keys = text_keys(JobConfig)
        # Read a second time: errors of the first have the lines of the file.
        given = layer_of_file(source.read_text(encoding="utf-8"), keys)
        layers = [given, *(layer_of_override(override, keys) for override in overrides)]
        for layer in layers:
            _check_sections(layer)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JobConfig), *layers))
    except OmegaConfBaseException as error:
        what = (
            str(error)
            .splitlines()[0]
            .replace("AnyNode is not a ListConfig, TupleConfig, list, or tuple", "expected a list")
        )
        raise ConfigError(f"config {source}{_overrides_text(overrides)}: {error.full_key or 'it'}: {what}") from error
    except RecursionError as error:
        raise ConfigError(f"config {source}{_overrides_text(overrides)} is nested too deeply to be read.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {source}{_overrides_text(overrides)} is not YAML: {error}") from error
    assert isinstance(config, JobConfig)
    _refuse_nul(config)
    return config


def _check_sections(layer: DictConfig) -> None:
    """Refuse a value where keys are expected, and leave out sections in which everything is commented out."""
    for name in SECTIONS:
        if name not in layer:
            continue
        section = layer._get_node(name)
        if OmegaConf.is_missing(layer, name) or section is None or layer[name] is None:
            del layer[name]
        elif not isinstance(layer[name], DictConfig):
            raise ConfigError(
                f"{name} is {layer[name]!r}, but it is a section: give its keys, such as {SECTIONS[name]}."
            )


def _refuse_nul(config: JobConfig) -> None:
    """Refuse what no file can be called, before a system call does."""
    for name in SECTIONS:
        for key, value in vars(getattr(config, name)).items():
            if isinstance(value, str) and "\0" in value:
                raise ConfigError(f"{name}.{key} is {value!r}: expected a text without NUL characters.")


def _overrides_text(overrides: Sequence[str]) -> str:
    return f" with {' '.join(overrides)}" if overrides else ""


def _require_at_least(key: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{key} is {value}: expected a whole number of at least {minimum}.")


def _require_positive(key: str, value: float) -> None:
    if not 0 < value < inf:
        raise ConfigError(f"{key} is {value}: expected a positive, finite number.")


def _require_one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} is '{value}': expected one of {', '.join(choices)}.")
