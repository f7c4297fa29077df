"""`attach` on Megatron models: wrapped ones, ranks without sites, ranks that disagree."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megascore
from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import MegascoreError
from tests.mcore.oracle import all_scores
from tests.models import SIZES, save_checkpoint
from tests.pool import RankErrors, WorkerPool

CPU = torch.device("cpu")
SEQUENCE_LENGTH = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("attach") / "llama", "llama"))


def make_tokens(num_samples: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, SIZES["vocab_size"], (num_samples, SEQUENCE_LENGTH), generator=generator)


def parallel_world(parallel: ParallelConfig) -> Any:
    from megascore.mcore.world import parallel_world as world

    return world.parallel_world(parallel, CPU, timedelta(seconds=30))


def load(checkpoint: str, parallel: ParallelConfig, dtype: str = "float64") -> list[Any]:
    from megascore.mcore.models.build import load_model

    return load_model(ModelConfig(hf=checkpoint, dtype=dtype), parallel, CPU, SEQUENCE_LENGTH)


def forward(chunks: list[Any]) -> None:
    from megascore.mcore.pipeline.schedule import forward_only

    forward_only(chunks, list(make_tokens().split(1)), compute_loss=False)


def test_wrapped_models_give_the_same_scores(world: WorkerPool, checkpoint: str) -> None:
    plain, in_ddp, in_float16 = world.run(1, score_wrapped, checkpoint)[0]
    assert plain.keys() == in_ddp.keys() == in_float16.keys()
    for key, score in plain.items():
        torch.testing.assert_close(in_ddp[key], score, rtol=0, atol=0)
        # bfloat16 weights and activations: 8 bits.
        torch.testing.assert_close(in_float16[key], score, rtol=0.2, atol=0.02)


def score_wrapped(checkpoint: str) -> list[dict[str, Tensor]]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    parallel = ParallelConfig()
    results = []
    with parallel_world(parallel):
        plain = load(checkpoint, parallel)[0]
        config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        half = load(checkpoint, parallel, "bfloat16")[0]
        wrapped = DistributedDataParallel(half.config, config, load(checkpoint, parallel)[0])
        for model in (plain, wrapped, Float16Module(half.config, half)):
            positions = torch.arange(SEQUENCE_LENGTH).expand(2, -1)
            with megascore.attach(model, recipe="minitron") as run, torch.no_grad():
                model(make_tokens(), positions, None)
                run.step()
            results.append(dict(run.finish()))
    return results


def test_training_mode_frozen_weights_and_recomputation(world: WorkerPool, checkpoint: str) -> None:
    before, after, scores, expected = world.run(1, score_while_training, checkpoint)[0]
    assert before == after
    for key, score in scores.items():
        torch.testing.assert_close(score, expected[key], rtol=1e-12, atol=0)


def score_while_training(checkpoint: str) -> tuple[Any, ...]:
    parallel = ParallelConfig()
    with parallel_world(parallel):
        chunks = load(checkpoint, parallel)
        with megascore.attach(chunks, recipe="minitron") as run:
            forward(chunks)
        expected = dict(run.finish())
        model = chunks[0]
        model.train()
        model.config.recompute_granularity = "full"
        model.config.recompute_method = "uniform"
        model.config.recompute_num_layers = 1
        for parameter in model.decoder.layers[0].parameters():
            parameter.requires_grad = False
        before = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
        with megascore.attach(model, recipe="minitron") as run:
            positions = torch.arange(SEQUENCE_LENGTH).expand(2, -1)
            # With gradients on, as in somebody's training loop.
            model(make_tokens(), positions, None)
            run.step()
        after = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
        return before, after, dict(run.finish()), expected


def test_a_rank_without_sites_takes_part(world: WorkerPool, checkpoint: str) -> None:
    ranks = world.run(2, score_with_a_stage_without_sites, checkpoint)
    assert [len(own) for own, _ in ranks] == [4, 0]
    assert ranks[0][1] == ranks[1][1] == {f"decoder.layers.{n}.mlp.linear_fc2/ffn/l2_norm" for n in (0, 1)}


def score_with_a_stage_without_sites(checkpoint: str) -> tuple[list[str], set[str]]:
    parallel = ParallelConfig(pipeline=2)
    with parallel_world(parallel):
        chunks = load(checkpoint, parallel)
        if dist.get_rank() == 1:
            for layer in chunks[0].decoder.layers:
                layer.mlp = Unknown(layer.mlp)
        with megascore.attach(chunks, scores=[{"target": "ffn"}]) as run:
            forward(chunks)
            run.step()
        return [site.key for site in run.sites for _ in (0, 1)], set(run.finish())


class Unknown(nn.Module):
    """A layer's MLP of a class that megascore doesn't know."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList([mlp])

    def forward(self, hidden: Tensor, **_: Any) -> Any:
        return self.inner[0](hidden)


def test_each_hook_is_put_in_place_once(world: WorkerPool, checkpoint: str) -> None:
    for num_sites, num_puts in world.run(2, count_puts, checkpoint):
        # FFN channels have two scores, which share a hook in each of the four layers.
        assert (num_sites, num_puts) == (38, 38)


def count_puts(checkpoint: str) -> tuple[int, int]:
    """Count the calls of the method that all hooks share, on a model with every dense score."""
    from unittest.mock import patch

    from megascore.parallel.placed import PlacedHook

    parallel = ParallelConfig(tensor=2)
    with parallel_world(parallel), patch.object(PlacedHook, "put", autospec=True, side_effect=PlacedHook.put) as put:
        with megascore.attach(load(checkpoint, parallel), scores=all_scores(1)) as run:
            return len(run.sites), put.call_count


def test_layers_that_the_model_runs_past_are_refused(world: WorkerPool, checkpoint: str) -> None:
    refused, attached = world.run(1, attach_to_fused_operations, checkpoint)[0]
    assert "decoder.layers.1.mlp.linear_fc2: the model runs past this module" in refused
    assert "use_transformer_engine_op_fuser=False" in refused
    assert attached == {"layers", "attention_heads"}


def attach_to_fused_operations(checkpoint: str) -> tuple[str, set[str]]:
    """The second layer's MLP is marked as Transformer Engine's fused one is."""
    parallel = ParallelConfig()
    with parallel_world(parallel):
        chunks = load(checkpoint, parallel)
        chunks[0].decoder.layers[1].mlp._fused_impl = None
        with pytest.raises(MegascoreError) as caught:
            megascore.attach(chunks, scores=[{"target": "ffn"}])
        with megascore.attach(chunks, scores=[{"target": "layers"}, {"target": "attention_heads"}]) as run:
            forward(chunks)
            run.step()
        return str(caught.value), {key.split("/")[1] for key in run.finish()}


def test_ranks_that_disagree_stop_together(world: WorkerPool, checkpoint: str) -> None:
    texts = world.run(2, attach_differently, checkpoint)
    assert all("must attach the same scores" in text for text, _ in texts), texts
    assert all("matches no module on any rank" in text for _, text in texts), texts


def attach_differently(checkpoint: str) -> tuple[str, str]:
    parallel = ParallelConfig(tensor=2)
    texts = []
    with parallel_world(parallel):
        chunks = load(checkpoint, parallel)
        iterations = {"target": "ffn", "method": "iterative_contribution", "iterations": 2}
        # The same key, other statistics: one rank has half of the layer's rows only.
        for scores in ([iterations], [{"target": "ffn"}]):
            if scores == [iterations] and dist.get_rank() == 1:
                chunks[0].decoder.layers[0].mlp.linear_fc2.input_size = 48
                chunks[0].decoder.layers[0].mlp.linear_fc2.weight.data = torch.zeros(64, 24, dtype=torch.float64)
            elif scores != [iterations]:
                for layer in chunks[0].decoder.layers:
                    layer.mlp = Unknown(layer.mlp)
            try:
                megascore.attach(chunks, scores=scores)
                texts.append("attached")
            except MegascoreError as error:
                texts.append(str(error))
    return texts[0], texts[1]


def test_a_rank_that_raises_inside_a_hook_stops_all_ranks(world: WorkerPool, checkpoint: str) -> None:
    """The other rank waits in the model's own all-reduce, and is let go when the first has left the world."""
    with pytest.raises(RankErrors, match="rank 1: RuntimeError: inside a hook") as caught:
        world.run(2, raise_inside_a_hook, checkpoint, timeout=30.0)
    assert "rank 0: " in str(caught.value)
    assert "did not answer in time" not in str(caught.value)


def raise_inside_a_hook(checkpoint: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("inside a hook")

    parallel = ParallelConfig(tensor=2)
    with parallel_world(parallel):
        chunks = load(checkpoint, parallel)
        with megascore.attach(chunks, recipe="minitron") as run:
            if dist.get_rank() == 1:
                run.sites[2].hook.observe = fail  # type: ignore[method-assign]
            forward(chunks)
            run.step()
