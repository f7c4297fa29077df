"""Models of another make than the checkpoints: GPT-2 with one KV head."""

from __future__ import annotations

import re
import zlib
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.config import ParallelConfig
from tests.mcore.oracle import Recorder, all_scores, expected_contributions, expected_scores
from tests.pool import WorkerPool

CPU = torch.device("cpu")
NUM_LAYERS, HIDDEN, HEADS, VOCAB, SEQUENCE_LENGTH = 2, 32, 4, 64, 16
SAMPLES = [[0, 1], [2]]
"""Which samples each step has."""
TOLERANCE = 1e-9
"""float64: only the order of additions differs."""

ROWS_SPLIT = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "word_embeddings.weight")
NORM_INSIDE = re.compile(r"(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_(weight|bias)")
NORMS_BEFORE = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}
"""A norm inside of a linear layer has the weights of the one that would be before it."""
COLUMNS_SPLIT = ("linear_proj.weight", "linear_fc2.weight")


def make_tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(0, VOCAB, (3, SEQUENCE_LENGTH), generator=generator).split(1))


def build_gpt2(parallel: ParallelConfig, zero_centered: bool = False) -> Any:
    """LayerNorm, plain GELU, biases, learned positions, tied embeddings, and one KV head for all query heads.

    The norms' weights may be kept without the one, which Transformer Engine's layers can.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megascore.mcore.models.spec import block_spec

    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=4 * HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=1,
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=zero_centered,
        activation_func=nn.functional.gelu,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float64,
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, CPU),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE_LENGTH,
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = NORM_INSIDE.sub(lambda found: f"{NORMS_BEFORE[found[1]]}.{found[2]}", name)
            parameter.copy_(part_of_weight(own, parameter.shape, parallel.tensor))
            if zero_centered and own.endswith("layernorm.weight"):
                parameter -= 1
    return model.eval()


def part_of_weight(name: str, local_shape: torch.Size, size: int) -> Tensor:
    """This rank's part of the weight that belongs to a name."""
    from megatron.core import parallel_state

    dim = 0 if name.endswith(ROWS_SPLIT) else 1 if name.endswith(COLUMNS_SPLIT) else None
    shape = [length * size if number == dim else length for number, length in enumerate(local_shape)]
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)
    whole = 0.2 * whole + (1.0 if name.endswith("layernorm.weight") else 0.0)
    return whole if dim is None else whole.chunk(size, dim)[parallel_state.get_tensor_model_parallel_rank()]


def run_samples(model: Any, run: Any = None) -> None:
    positions = torch.arange(SEQUENCE_LENGTH)[None]
    tokens = make_tokens()
    with torch.no_grad():
        for step in SAMPLES:
            for sample in step:
                model(tokens[sample], positions, None)
            if run is not None:
                run.step()


def parallel_world(parallel: ParallelConfig) -> Any:
    from megascore.mcore.world import parallel_world as world

    return world.parallel_world(parallel, CPU, timedelta(seconds=60))


@pytest.fixture(scope="module")
def expected(world: WorkerPool) -> dict[str, Tensor]:
    return world.run(1, compute_expected)[0]


def compute_expected() -> dict[str, Tensor]:
    with parallel_world(ParallelConfig()):
        model = build_gpt2(ParallelConfig())
        recorder = Recorder(model)
        run_samples(model)
        scores = expected_scores(recorder, NUM_LAYERS, HIDDEN // HEADS)
        return {**scores, **expected_contributions(recorder, NUM_LAYERS, 1, SAMPLES)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_scores_equal_the_oracle(world_size: int, world: WorkerPool, expected: dict[str, Tensor]) -> None:
    layouts = [ParallelConfig()] if world_size == 1 else [ParallelConfig(tensor=2, sequence=s) for s in (False, True)]
    for parallel in layouts:
        for scores in world.run(world_size, score, parallel):
            assert scores.keys() == expected.keys()
            for key, value in scores.items():
                torch.testing.assert_close(value, expected[key], rtol=TOLERANCE, atol=0, msg=f"{key} on {parallel}")
                assert value.argsort(stable=True).tolist() == expected[key].argsort(stable=True).tolist(), key


def score(parallel: ParallelConfig, zero_centered: bool = False) -> dict[str, Tensor]:
    with parallel_world(parallel):
        model = build_gpt2(parallel, zero_centered)
        with megascore.attach(model, scores=all_scores(len(SAMPLES))) as run:
            run_samples(model, run)
        return dict(run.finish())


class LayerNormColumnLinear(nn.Module):
    """What megascore sees of TELayerNormColumnParallelLinear: no norm module, its weights beside the linear's."""

    def __init__(self, norm: nn.LayerNorm, linear: Any) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(norm.weight.detach())
        self.layer_norm_weight.sequence_parallel = linear.sequence_parallel
        self.layer_norm_bias = nn.Parameter(norm.bias.detach())
        self.normalization, self.eps, self.zero_centered_gamma = "LayerNorm", norm.eps, False
        self.parallel_mode, self.config = "column", linear.config
        self.weight, self.bias = linear.weight, linear.bias
        # In a list: its kernel is no submodule.
        self._kernel = [norm, linear]

    def forward(self, x: Tensor) -> Any:
        norm, linear = self._kernel
        return linear(norm(x))


class RowLinear(nn.Module):
    """What megascore sees of TERowParallelLinear: no input_size, the group under another name, (output, bias) back."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.parallel_mode, self._tp_group, self.config = "row", linear.tp_group, linear.config
        self.te_return_bias = True
        self.weight, self.bias = linear.weight, linear.bias
        self._kernel = [linear]

    def forward(self, x: Tensor) -> Any:
        return self._kernel[0](x)
