"""Norms of Megatron layers: wherever they stand, each is scored under the name of that place, or told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.config import ParallelConfig
from tests.mcore.sites.test_other_models import (
    HIDDEN,
    NUM_LAYERS,
    LayerNormColumnLinear,
    RowLinear,
    build_gpt2,
    parallel_world,
    part_of_weight,
    run_samples,
)
from tests.pool import WorkerPool

TWO = ParallelConfig(tensor=2, sequence=True)
TOLERANCE = 1e-9
"""float64: only the order of additions differs."""


def make_norm(name: str) -> nn.LayerNorm:
    norm = nn.LayerNorm(HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(1 + part_of_weight(name, norm.weight.shape, 1))
    return norm


def put_norms_behind(layer: Any, name: str) -> dict[str, nn.Module]:
    """Give a layer the norms that newer versions of Megatron-Core have, as modules of its own."""
    for part, norm_name in (("self_attention", "post_self_attn_layernorm"), ("mlp", "post_mlp_layernorm")):
        norm = make_norm(f"{name}.{norm_name}")
        layer.add_module(norm_name, norm)
        getattr(layer, part).register_forward_hook(lambda _, args, output, norm=norm: (norm(output[0]), output[1]))
    return {norm_name: getattr(layer, norm_name) for norm_name in ("post_self_attn_layernorm", "post_mlp_layernorm")}


class RowLinearAndNorm(RowLinear):
    """What megascore sees of Megatron-Bridge's projection for Gemma and EXAONE: a norm inside of it, behind it."""

    def __init__(self, linear: Any, norm: nn.Module) -> None:
        super().__init__(linear)
        self.post_layernorm = norm

    def forward(self, x: Tensor) -> Any:
        output, bias = super().forward(x)
        return self.post_layernorm(output), bias


def put_norms_into_projections(layer: Any, name: str) -> dict[str, nn.Module]:
    norms = {key: make_norm(f"{name}.{key}") for key in ("post_self_attn_layernorm", "post_mlp_layernorm")}
    attention = layer.self_attention
    attention.linear_proj = RowLinearAndNorm(attention.linear_proj, norms["post_self_attn_layernorm"])
    layer.mlp.linear_fc2 = RowLinearAndNorm(layer.mlp.linear_fc2, norms["post_mlp_layernorm"])
    return dict(norms)


class DeltaNet(nn.Module):
    """What megascore sees of a gated delta net: projections of other names, with the layer's norm in the first."""

    def __init__(self, norm: nn.Module, config: Any) -> None:
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        options = {"config": config, "init_method": nn.init.zeros_, "bias": False, "skip_bias_add": True}
        self.in_proj = LayerNormColumnLinear(
            norm, ColumnParallelLinear(HIDDEN, 2 * HIDDEN, gather_output=False, **options)
        )
        self.out_proj = RowParallelLinear(2 * HIDDEN, HIDDEN, input_is_parallel=True, **options)
        self.out_norm = nn.RMSNorm(2 * HIDDEN // config.tensor_model_parallel_size, dtype=torch.float64)
        size = config.tensor_model_parallel_size
        with torch.no_grad():
            for name, weight in (
                ("linear_fc1.weight", self.in_proj.weight),
                ("linear_fc2.weight", self.out_proj.weight),
            ):
                weight.copy_(part_of_weight(name, weight.shape, size))

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return self.out_proj(self.in_proj(hidden)[0])


def put_delta_net(layer: Any, name: str) -> dict[str, nn.Module]:
    from megatron.core.transformer.identity_op import IdentityOp

    norm = layer.input_layernorm
    layer.self_attention = DeltaNet(norm, layer.config)
    layer.input_layernorm = IdentityOp()
    return {"input_layernorm": norm}


KINDS: dict[str, tuple[Callable[[Any, str], dict[str, nn.Module]], set[str], str]] = {
    "norms behind": (put_norms_behind, {"post_self_attn_layernorm", "post_mlp_layernorm"}, ""),
    "norms in projections": (put_norms_into_projections, {"post_self_attn_layernorm", "post_mlp_layernorm"}, ""),
    "delta net": (put_delta_net, set(), "decoder.layers.{}.self_attention: DeltaNet"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_over_the_hidden_size_is_scored_where_it_stands(kind: str, world: WorkerPool) -> None:
    _, more, unknown = KINDS[kind]
    alone, expected, told = world.run(1, score, ParallelConfig(), kind)[0]
    names = {"input_layernorm", "pre_mlp_layernorm", *more}
    in_layers = {f"decoder.layers.{number}.{name}" for number in range(NUM_LAYERS) for name in names}
    assert expected.keys() == in_layers | {"decoder.final_layernorm"}
    assert told == ([unknown.format(number) for number in range(NUM_LAYERS)] if unknown else [])
    for scores in (alone, *(scores for scores, _, _ in world.run(2, score, TWO, kind))):
        together = scores.pop("decoder/hidden_size/l2_norm")
        assert scores.keys() == {f"{name}/hidden_size/l2_norm" for name in expected}
        for name, value in expected.items():
            torch.testing.assert_close(scores[f"{name}/hidden_size/l2_norm"], value, rtol=TOLERANCE, atol=0, msg=name)
        torch.testing.assert_close(together, sum(expected.values()), rtol=TOLERANCE, atol=0)


def score(parallel: ParallelConfig, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Return the scores, the formula on what each norm gave (on one rank), and what is unknown."""
    with parallel_world(parallel):
        model = build_gpt2(parallel)
        norms: dict[str, nn.Module] = {"decoder.final_layernorm": model.decoder.final_layernorm}
        for number, layer in enumerate(model.decoder.layers):
            name = f"decoder.layers.{number}"
            own = {key: getattr(layer, key) for key in ("input_layernorm", "pre_mlp_layernorm")}
            own.update(KINDS[kind][0](layer, name))
            norms.update({f"{name}.{key}": norm for key, norm in own.items()})
        given = {name: torch.zeros(HIDDEN, dtype=torch.float64) for name in norms}
        for name, norm in norms.items():
            norm.register_forward_hook(lambda _, args, output, name=name: add_squared_means(given[name], output))
        with megascore.attach(model, scores=[{"target": "hidden_size"}]) as run:
            run_samples(model, run)
        return dict(run.finish()), {name: total.sqrt() for name, total in given.items()}, list(run.view.unknown)


def add_squared_means(total: Tensor, output_SBC: Tensor) -> None:
    total += (output_SBC.abs().mean(0) ** 2).sum(0)


def test_norms_that_claim_one_position_and_norms_of_other_widths_are_named(world: WorkerPool) -> None:
    names, told = world.run(1, look_at_unclear_norms)[0]
    assert names == {"pre_mlp_layernorm"}
    assert told == [
        "decoder.layers.0.input_layernorm: RMSNorm",
        "decoder.layers.0.self_attention.linear_second: LayerNormColumnLinear",
        "decoder.layers.0.self_attention.linear_qkv: a norm, in LayerNormColumnLinear",
    ]


def look_at_unclear_norms() -> tuple[set[str], list[str]]:
    with parallel_world(ParallelConfig()):
        model = build_gpt2(ParallelConfig())
        layer: Any = model.decoder.layers[0]
        attention = layer.self_attention
        attention.linear_qkv = LayerNormColumnLinear(make_norm("a"), attention.linear_qkv)
        attention.linear_second = LayerNormColumnLinear(make_norm("b"), attention.linear_qkv._kernel[1])
        layer.input_layernorm = nn.RMSNorm(HIDDEN // 2)
        run = megascore.attach(model, scores=[{"target": "hidden_size"}])
        run.close()
        own = {site.place.name for site in run.sites if site.place.name.startswith("decoder.layers.0.")}
        return {name.rpartition(".")[2] for name in own}, list(run.view.unknown)
