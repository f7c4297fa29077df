"""Where models come from: which keys say what, functions of the user's, and Megatron-Bridge. Tier: gloo processes."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import ConfigError, DataError, LayoutError, ModelError
from megascore.mcore.models.build import load_model
from megascore.mcore.models.choose import model_source
from megascore.mcore.models.gpt import build_gpt
from megascore.mcore.models.load_huggingface import HuggingFaceWeights
from megascore.mcore.world.parallel_world import parallel_world
from megascore.weights.huggingface.config import read_config
from tests.mcore import providers
from tests.mcore.logits import run
from tests.mcore.torch_dist import save_torch_dist
from tests.models import save_checkpoint
from tests.pool import WorkerPool

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama")


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))


def logits_of(
    checkpoint: Path, configs: list[ModelConfig], parallel: ParallelConfig, tokens: Tensor
) -> list[tuple[Tensor | None, list[dict[str, Any]]]]:
    """Logits of each model, and the calls of the provider for it."""
    results = []
    with pytest.MonkeyPatch.context() as patch, parallel_world(parallel, CPU, TIMEOUT):
        patch.setenv(providers.CHECKPOINT, str(checkpoint))
        for config in configs:
            providers.calls.clear()
            chunks = load_model(config, parallel, CPU, tokens.shape[1])
            results.append((run(chunks, tokens, compute_loss=True).logits, list(providers.calls)))
    return results


def save(checkpoint: Path, folder: Path) -> None:
    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(checkpoint), dtype="float32"), ParallelConfig(), CPU, 16)
        save_torch_dist(chunks, folder)


def test_a_function_builds_the_model(checkpoint: Path, tokens: Tensor, tmp_path: Path, world: WorkerPool) -> None:
    world.run(1, save, checkpoint, tmp_path / "ck")
    configs = [
        ModelConfig(hf=str(checkpoint), dtype="float32"),
        ModelConfig(provider="tests.mcore.providers:whole", dtype="float32"),
        ModelConfig(provider="tests.mcore.providers:model_provider", load=str(tmp_path / "ck"), dtype="float32"),
    ]
    for world_size, parallel in ((1, ParallelConfig()), (2, ParallelConfig(pipeline=2, virtual_pipeline=2))):
        last = world.run(world_size, logits_of, checkpoint, configs, parallel, tokens)[-1]
        (expected, _), (whole, _), (loaded, calls) = last
        assert expected is not None
        assert torch.equal(whole, expected)
        assert torch.equal(loaded, expected)
        assert [call["vp_stage"] for call in calls] == ([0, 1] if world_size == 2 else [None])
        assert [call["post_process"] for call in calls] == [False] * (len(calls) - 1) + [True]


WRONG_PROVIDERS = {
    "nowhere.at_all:function": r"module nowhere\.at_all cannot be imported: No module named 'nowhere'",
    "tests.mcore.providers:missing": r"expected a function 'missing' in tests\.mcore\.providers, found no such name",
    "tests.mcore.providers:NOT_CALLABLE": r"expected a function 'NOT_CALLABLE' in .*, found a int",
    "tests.mcore.providers:demanding": r"needs args, config: it is given those that it declares of pre_process, post",
    "tests.mcore.providers:not.simple": r"expected package\.module:function",
}


@pytest.mark.parametrize("provider", WRONG_PROVIDERS)
def test_a_function_that_cannot_be_called_is_refused(provider: str) -> None:
    with pytest.raises(ConfigError, match=WRONG_PROVIDERS[provider]):
        model_source(ModelConfig(provider=provider))


def test_a_function_is_named_with_its_module() -> None:
    with pytest.raises(ConfigError, match=r"model\.provider is 'tests\.mcore\.providers\.whole': expected package"):
        ModelConfig(provider="tests.mcore.providers.whole")


@pytest.mark.parametrize(
    ("function", "parallel", "message"),
    [
        ("nothing", ParallelConfig(), r"providers:nothing returned NoneType: expected a Megatron-Core model"),
        ("plain", ParallelConfig(), r"returned Linear: expected a Megatron-Core model"),
        ("three", ParallelConfig(), r"returned 3 chunks: expected 1, one for each of parallel\.virtual_pipeline"),
        (
            "unsplit",
            ParallelConfig(tensor=2),
            r"a model with tensor_model_parallel_size=1, but parallel\.tensor=2: build its TransformerConfig",
        ),
    ],
)
def test_a_function_that_returns_something_else_is_refused(
    function: str, parallel: ParallelConfig, message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(providers.CHECKPOINT, str(checkpoint))
    source = model_source(ModelConfig(provider=f"tests.mcore.providers:{function}"))
    with parallel_world(ParallelConfig(), CPU, TIMEOUT), pytest.raises(ModelError, match=message):
        source.build(parallel, torch.float32, CPU, 16)


def test_a_function_that_returns_a_model_of_another_type_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(providers.CHECKPOINT, str(checkpoint))
    source = model_source(ModelConfig(provider="tests.mcore.providers:unsplit"))
    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        with pytest.raises(
            ModelError, match=r"returned a model in float32, but model\.dtype=bfloat16: set model\.dtype"
        ):
            source.build(ParallelConfig(), torch.bfloat16, CPU, 16)


def test_what_a_function_decides_cannot_be_asked_for_beside_it() -> None:
    source = model_source(ModelConfig(provider="tests.mcore.providers:whole"))
    with pytest.raises(LayoutError, match=r"parallel\.pipeline_layers has no effect with model\.provider"):
        source.check(ParallelConfig(pipeline=2, pipeline_layers=[3, 1]))
    assert source.fingerprint() == "not known: made by tests.mcore.providers:whole"
    assert source.vocab_size is None


def test_tokens_that_a_built_model_does_not_have_are_refused(checkpoint: Path) -> None:
    source = model_source(ModelConfig(hf=str(checkpoint)))
    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        chunks = source.build(ParallelConfig(), torch.float32, CPU, 16)
    source.check_tokens(chunks, 127)
    with pytest.raises(DataError, match=r"the data has token 128, but the model llama has 128 tokens"):
        source.check_tokens(chunks, 128)


def test_a_model_must_come_from_somewhere() -> None:
    with pytest.raises(ConfigError, match=r"model\.hf is not given, nor model\.load or model\.provider"):
        model_source(ModelConfig())


@pytest.fixture
def unknown(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a checkpoint of an architecture that the loader does not know, though it is a llama's."""
    folder = tmp_path / "unknown"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "novel"}))
    return folder


@pytest.mark.parametrize("change", [{"model_type": "novel"}, {"hidden_act": "gelu"}])
def test_without_megatron_bridge_an_unknown_model_names_both_ways_out(
    checkpoint: Path, tmp_path: Path, change: Any
) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ModelError, match=r"not supported; .*\(pip install megatron-bridge\).* model\.provider=package"):
        model_source(ModelConfig(hf=str(tmp_path)))


class FakeProvider:
    """As Megatron-Bridge's model providers: settings, `finalize`, then the model."""

    seq_length = 128
    refuses = False

    def __init__(self, known: Path) -> None:
        self._known = known
        self._finalized = False

    def finalize(self) -> None:
        if self.refuses:
            raise AssertionError("tensor parallelism of such models is not known")
        self._finalized = True

    def provide_distributed_model(self, *, wrap_with_ddp: bool, mixed_precision_wrapper: Any) -> list[Any]:
        assert self._finalized
        assert not wrap_with_ddp
        assert mixed_precision_wrapper is None
        settings = vars(self)
        parallel = ParallelConfig(
            tensor=settings["tensor_model_parallel_size"],
            sequence=settings["sequence_parallel"],
            pipeline=settings["pipeline_model_parallel_size"],
        )
        return build_gpt(read_config(self._known).architecture, parallel, settings["params_dtype"], CPU, 16)


class FakeAutoBridge:
    """As ``megatron.bridge.AutoBridge``, for models of one llama's architecture."""

    known: Path

    @classmethod
    def from_hf_pretrained(cls, path: str) -> FakeAutoBridge:
        if not (Path(path) / "model.safetensors").is_file():
            raise ValueError("Failed to load model with AutoBridge")
        return cls()

    def to_megatron_provider(self, load_weights: bool = True) -> FakeProvider:
        assert not load_weights, "a dry run builds without weights"
        return FakeProvider(self.known)

    def load_hf_weights(self, model: list[Any]) -> None:
        HuggingFaceWeights(read_config(self.known), self.known).load(model)


def install_bridge(patch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    import megascore.mcore.models.bridge as source_bridge

    module = ModuleType("megatron.bridge")
    patch.setattr(FakeAutoBridge, "known", checkpoint, raising=False)
    patch.setattr(module, "AutoBridge", FakeAutoBridge, raising=False)
    patch.setitem(sys.modules, "megatron.bridge", module)
    patch.setattr(source_bridge, "has_bridge", lambda: True)


def bridge_logits(checkpoint: Path, unknown: Path, parallel: ParallelConfig, tokens: Tensor) -> list[Tensor | None]:
    with pytest.MonkeyPatch.context() as patch:
        install_bridge(patch, checkpoint)
        configs = [ModelConfig(hf=str(folder), dtype="float32") for folder in (checkpoint, unknown)]
        return [logits for logits, _ in logits_of(checkpoint, configs, parallel, tokens)]


def test_megatron_bridge_loads_what_the_loader_does_not_know(
    checkpoint: Path, unknown: Path, tokens: Tensor, world: WorkerPool
) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True)
    for expected, by_bridge in world.run(2, bridge_logits, checkpoint, unknown, parallel, tokens):
        assert expected is not None
        assert torch.equal(by_bridge, expected)


def test_what_megatron_bridge_refuses_is_told(checkpoint: Path, unknown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_bridge(monkeypatch, checkpoint)
    source = model_source(ModelConfig(hf=str(unknown)))
    source.check(ParallelConfig())
    assert len(source.fingerprint()) == 64
    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        with pytest.raises(ModelError, match=r"sequence_length=129 is more than the model's 128 positions"):
            source.build(ParallelConfig(), torch.float32, CPU, 129)
        monkeypatch.setattr(FakeProvider, "refuses", True)
        with pytest.raises(ModelError, match=r"Megatron-Bridge for .* in this layout: tensor parallelism of such"):
            source.build(ParallelConfig(), torch.float32, CPU, 16)
    (unknown / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"Megatron-Bridge, which is installed, cannot load it either: Failed to load"):
        model_source(ModelConfig(hf=str(unknown)))
