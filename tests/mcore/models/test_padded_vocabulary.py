"""Vocabularies that tensor parallelism does not divide: padded, and the padding left out of the loss.

Tier: gloo processes, real Megatron on the CPU.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from megascore.mcore.models.build import load_model
from megascore.mcore.models.choose import model_source
from megascore.mcore.pipeline.schedule import forward_only, token_losses
from megascore.mcore.world.parallel_world import parallel_world
from tests.mcore.logits import CPU, TIMEOUT
from tests.mcore.torch_dist import save_torch_dist, training_args
from tests.models import reference_logits, reference_loss, save_checkpoint, tensors_of
from tests.pool import WorkerPool

VOCABULARY = 129
"""Odd, so that no degree divides it."""
ROWS = 256
"""Of a checkpoint that Megatron's --make-vocab-size-divisible-by 128 has padded."""
SEQUENCE_LENGTH = 16
MODELS = {"tied": "qwen2", "untied": "qwen3"}
LAYOUTS = {
    "tensor": (2, ParallelConfig(tensor=2)),
    "tensor with sequence parallel": (2, ParallelConfig(tensor=2, sequence=True)),
    "tensor and pipeline": (4, ParallelConfig(tensor=2, sequence=True, pipeline=2)),
    "more tensor": (4, ParallelConfig(tensor=4, sequence=True)),
}


def without_padding(wide: Path, folder: Path) -> None:
    """Save a checkpoint of `ROWS` tokens with the first `VOCABULARY` of them only."""
    shutil.copytree(wide, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY}))
    tensors = tensors_of(folder / "model.safetensors")
    cut = {
        name: value[:VOCABULARY].clone() if name in ("model.embed_tokens.weight", "lm_head.weight") else value
        for name, value in tensors.items()
    }
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})


def save(directory: Path, folder: Path, parallel: ParallelConfig) -> None:
    """Load a Hugging Face checkpoint and save it as Megatron does, whose args say which rows are tokens."""
    with parallel_world(parallel, CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(directory), dtype="float64"), parallel, CPU, SEQUENCE_LENGTH)
        args = training_args(directory, vocab_size=VOCABULARY, make_vocab_size_divisible_by=128)
        save_torch_dist(chunks, folder, args=args)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> dict[str, dict[str, ModelConfig]]:
    """Return the same model from each reader, by model and reader."""
    configs: dict[str, dict[str, ModelConfig]] = {}
    for model, family in MODELS.items():
        root = tmp_path_factory.mktemp(model)
        # Its last rows are padding that training has moved far: large logits, which would show in any loss.
        changes = {"num_hidden_layers": 2, "num_key_value_heads": 4}
        wide = save_checkpoint(root / "wide", family, vocab_size=ROWS, **changes)
        tensors = tensors_of(wide / "model.safetensors")
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
            tensors[name][VOCABULARY:] *= 10.0
        save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
        without_padding(wide, root / "hf")
        world.run(2, save, wide, root / "wide megatron", ParallelConfig(tensor=2))
        world.run(1, save, root / "hf", root / "alone", ParallelConfig())
        world.run(2, save, root / "hf", root / "split", ParallelConfig(tensor=2))
        folders: dict[str, dict[str, str]] = {
            "hugging face": {"hf": "hf"},
            "padded when saved": {"load": "wide megatron"},
            "padded when saved, config": {"hf": "hf", "load": "wide megatron"},
            "saved on one process": {"load": "alone"},
            "saved on two": {"load": "split"},
        }
        configs[model] = {
            name: ModelConfig(dtype="float64", **{key: str(root / folder) for key, folder in keys.items()})
            for name, keys in folders.items()
        }
    return configs


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    tokens = torch.randint(0, VOCABULARY, (3, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(1))
    # The last token is where the padding begins.
    tokens[:, 5] = VOCABULARY - 1
    return tokens


def losses_of(
    configs: dict[str, dict[str, ModelConfig]], parallel: ParallelConfig, tokens: Tensor
) -> dict[tuple[str, str], float]:
    """Mean loss by model and reader on a rank of the last stage; nothing on others."""
    losses = {}
    with parallel_world(parallel, CPU, TIMEOUT):
        for model, readers in configs.items():
            for reader, config in readers.items():
                chunks = load_model(config, parallel, CPU, SEQUENCE_LENGTH)
                assert [chunk.vocab_size for chunk in chunks] == [VOCABULARY] * len(chunks)
                found = forward_only(chunks, list(tokens.split(1)), True)
                if parallel_state.is_pipeline_last_stage():
                    losses[model, reader] = found.nats.item() / found.num_tokens
    return losses


@pytest.fixture(scope="module")
def alone(
    configs: dict[str, dict[str, ModelConfig]], tokens: Tensor, world: WorkerPool
) -> dict[tuple[str, str], float]:
    return world.run(1, losses_of, configs, ParallelConfig(), tokens)[0]


def test_on_one_process_the_loss_is_that_of_transformers(
    configs: dict[str, dict[str, ModelConfig]], alone: dict[tuple[str, str], float], tokens: Tensor
) -> None:
    for model, readers in configs.items():
        assert readers["hugging face"].hf is not None
        expected = reference_loss(reference_logits(Path(readers["hugging face"].hf), tokens, torch.float64), tokens)
        for reader in readers:
            # transformers computes norms and softmax in float32, whatever the model.
            assert alone[model, reader] == pytest.approx(expected, rel=1e-6), (model, reader)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_that_of_one_process_on_every_layout(
    layout: str,
    configs: dict[str, dict[str, ModelConfig]],
    alone: dict[tuple[str, str], float],
    tokens: Tensor,
    world: WorkerPool,
) -> None:
    world_size, parallel = LAYOUTS[layout]
    having = [losses for losses in world.run(world_size, losses_of, configs, parallel, tokens) if losses]
    assert len(having) == parallel.tensor
    for losses in having:
        assert losses.keys() == alone.keys()
        for key, loss in losses.items():
            # float64 throughout: layouts differ only in the order of sums.
            assert loss == pytest.approx(alone[key], rel=1e-12), key


def padding_of(configs: dict[str, ModelConfig], parallel: ParallelConfig) -> dict[str, tuple[int, Tensor]]:
    """Rows of the embedding of a rank, and those of them that are no token's, by reader."""
    with parallel_world(parallel, CPU, TIMEOUT):
        found = {}
        for reader, config in configs.items():
            source = model_source(config)
            chunks = source.build(parallel, torch.float64, CPU, SEQUENCE_LENGTH)
            weight = chunks[0].embedding.word_embeddings.weight
            with torch.no_grad():
                weight.fill_(torch.nan)
            source.load(chunks)
            first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
            found[reader] = len(weight), weight.detach()[max(VOCABULARY - first, 0) :].clone()
        return found


def test_padding_is_the_least_that_divides_and_never_left_as_it_was(
    configs: dict[str, dict[str, ModelConfig]], world: WorkerPool
) -> None:
    *full, last = world.run(4, padding_of, configs["tied"], ParallelConfig(tensor=4, sequence=True))
    for reader, (rows, padding) in last.items():
        assert (rows, len(padding)) == (33, 3), reader
        assert bool(padding.isfinite().all()), reader
    assert not last["hugging face"][1].any()
    assert not last["saved on one process"][1].any()
    for rank in full:
        assert all((rows, len(padding)) == (33, 0) for rows, padding in rank.values())


def cross_entropy_on_rank(logits: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    parallel = ParallelConfig(tensor=2)
    with parallel_world(parallel, CPU, TIMEOUT):
        rank = parallel_state.get_tensor_model_parallel_rank()
        return token_losses(logits.chunk(2, dim=-1)[rank], labels, vocab_size)


@pytest.mark.parametrize("vocab_size", [5, 4, 3, None])
def test_entries_behind_the_vocabulary_have_no_part_whatever_they_are(
    vocab_size: int | None, world: WorkerPool
) -> None:
    generator = torch.Generator().manual_seed(2)
    # Far below zero, where a logit of zero would outweigh all of them.
    logits = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator) - 2000.0
    # Of 3 and 4 tokens, the second rank has none.
    num_tokens = 8 if vocab_size is None else vocab_size
    labels = torch.randint(0, num_tokens, (2, 3), generator=generator)
    expected = torch.nn.functional.cross_entropy(
        logits[..., :num_tokens].flatten(0, 1), labels.flatten(), reduction="none"
    ).view(2, 3)
    for padding in (0.0, math.inf, math.nan):
        logits[..., num_tokens:] = padding
        for found in world.run(2, cross_entropy_on_rank, logits, labels, vocab_size):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
