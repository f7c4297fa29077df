"""A small mixture-of-experts GPTModel, the same in every layout: its weights follow from their global names."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megascore.config import ParallelConfig

__all__ = ["NUM_EXPERTS", "SIZES", "UNREACHABLE", "Variant", "build_expert_model", "experts_spec"]

SIZES = {"hidden": 32, "heads": 4, "ffn": 48, "moe_ffn": 24, "shared_ffn": 40, "vocab": 64, "sequence": 16}
NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 8, 2
UNREACHABLE = (4, 5)
"""Experts that the router's bias keeps all tokens from; with EP=4 they are all that one rank has."""

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Variant:
    """Which of Megatron's ways to move tokens and to run experts."""

    dispatcher: str = "allgather"
    experts: str = "sequential"
    overlap: bool = False
    """Shared experts run beside the dispatcher, which then does their communication."""
    dtype: str = "float64"
    """Of the model; grouped experts are stand-ins in float64 only."""

    @property
    def of_engine(self) -> bool:
        """Whether all layers are Transformer Engine's, which only the workers of tests/engine have."""
        return self.experts.startswith("engine_")


def build_expert_model(parallel: ParallelConfig, variant: Variant = Variant()) -> list[Any]:
    """Return this rank's chunk: one dense layer, then layers of routed and shared experts."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = _config(parallel, variant)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(config, variant),
        vocab_size=SIZES["vocab"],
        max_sequence_length=SIZES["sequence"],
        pre_process=stage == 0,
        post_process=stage == parallel.pipeline - 1,
        position_embedding_type="rope",
    ).eval()
    with torch.no_grad():
        _fill(model)
    return [model]


def _config(parallel: ParallelConfig, variant: Variant) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=SIZES["hidden"],
        ffn_hidden_size=SIZES["ffn"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=getattr(torch, variant.dtype),
        pipeline_dtype=getattr(torch, variant.dtype),
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        num_moe_experts=NUM_EXPERTS,
        moe_layer_freq=[0] + [1] * (NUM_LAYERS - 1),
        moe_ffn_hidden_size=SIZES["moe_ffn"],
        moe_shared_expert_intermediate_size=SIZES["shared_ffn"],
        moe_router_topk=TOP_K,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=variant.dispatcher,
        moe_shared_expert_overlap=variant.overlap,
        moe_grouped_gemm=variant.experts == "engine_grouped",
    )


def _block_spec(config: Any, variant: Variant) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megascore.mcore.compat import submodules_of
    from megascore.mcore.models.spec import TorchNorm
    from megascore.mcore.world.context_parallel import GatheringAttention

    if variant.of_engine:
        return _block_spec_of_engine(config, variant)
    dense = get_gpt_layer_local_spec(normalization="RMSNorm")
    moe = get_gpt_layer_local_spec(num_experts=NUM_EXPERTS, moe_grouped_gemm=False, normalization="RMSNorm")
    for layer in (dense, moe):
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchNorm
        if config.context_parallel_size > 1:
            layer.submodules.self_attention.submodules.core_attention = GatheringAttention
    moe_parts = submodules_of(moe.submodules.mlp)
    moe_parts.experts = experts_spec(variant, moe_parts.experts)
    return _own_layers(config, dense, moe, TorchNorm)


def _block_spec_of_engine(config: Any, variant: Variant) -> Any:
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    dense = get_gpt_layer_with_transformer_engine_spec()
    grouped = variant.experts == "engine_grouped"
    moe = get_gpt_layer_with_transformer_engine_spec(num_experts=NUM_EXPERTS, moe_grouped_gemm=grouped)
    return _own_layers(config, dense, moe, TENorm)


def _own_layers(config: Any, dense: Any, moe: Any, final_norm: Any) -> Any:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    layers = [dense] + [moe] * (NUM_LAYERS - 1)
    first = get_transformer_layer_offset(config)
    own = layers[first : first + get_num_layers_to_build(config)]
    return TransformerBlockSubmodules(layer_specs=own, layer_norm=final_norm)


def experts_spec(variant: Variant, sequential: Any) -> Any:
    """Return what the experts of a layer are built of; ``sequential`` where the variant has no grouped ones."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import experts
    from megatron.core.transformer.spec_utils import ModuleSpec

    if variant.experts == "te_grouped":
        linears = MLPSubmodules(linear_fc1=ColumnGroupedLinear, linear_fc2=RowGroupedLinear)
        return ModuleSpec(module=experts.TEGroupedMLP, submodules=linears)
    if variant.experts == "legacy_grouped":
        return ModuleSpec(module=_legacy_grouped_mlp())
    return sequential


class _GroupedLinear(nn.Module):
    """Transformer Engine's GroupedLinear as Megatron calls it: ``forward(x, m_splits)`` returns (output, None)."""

    parallel_mode: str

    def __init__(self, num_gemms: int, input_size: int, output_size: int, **_: Any) -> None:
        from megatron.core import parallel_state

        super().__init__()
        self.num_gemms = num_gemms
        size = parallel_state.get_expert_tensor_parallel_world_size()
        column = self.parallel_mode == "column"
        shape = (output_size // size, input_size) if column else (output_size, input_size // size)
        for number in range(num_gemms):
            setattr(self, f"weight{number}", nn.Parameter(torch.zeros(shape, dtype=torch.float64)))

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        parts = x.split(m_splits)
        return torch.cat([part @ getattr(self, f"weight{n}").T for n, part in enumerate(parts)]), None


class ColumnGroupedLinear(_GroupedLinear):
    parallel_mode = "column"


class RowGroupedLinear(_GroupedLinear):
    parallel_mode = "row"


def _legacy_grouped_mlp() -> type[nn.Module]:
    """Return Megatron's own GroupedMLP with a grouped product in plain PyTorch, as its CUDA kernel is not there."""
    from megatron.core.transformer.moe import experts

    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
        return torch.cat([part @ weight for part, weight in zip(a.split(batch_sizes.tolist()), b, strict=True)])

    class LegacyGroupedMLP(experts.GroupedMLP):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # It refuses other types than bfloat16, which its CUDA kernel is written for.
            self.config = copy.copy(self.config)
            self.config.bf16 = True

    experts.gg = SimpleNamespace(ops=SimpleNamespace(gmm=gmm), assert_grouped_gemm_is_available=lambda: None)
    return LegacyGroupedMLP


def _fill(model: nn.Module) -> None:
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder.layers."):
            parameter.copy_(_shard(name, parameter.shape, *tp))
    for layer in model.decoder.layers:
        prefix = f"decoder.layers.{layer.layer_number - 1}."
        for name, parameter in layer.named_parameters():
            if ".experts." not in name:
                # A norm inside of a linear layer has the weights of the one that would be before it.
                own = FUSED_NORMS.get(name, name)
                parameter.copy_(_shard(prefix + own, parameter.shape, *tp))
        if hasattr(layer.mlp, "experts"):
            layer.mlp.router.expert_bias[list(UNREACHABLE)] = -1e4
            _fill_experts(layer.mlp, f"{prefix}mlp.experts.")


def _fill_experts(moe_layer: Any, prefix: str) -> None:
    from megatron.core import parallel_state

    experts, num_local = moe_layer.experts, moe_layer.num_local_experts
    group = parallel_state.get_expert_tensor_parallel_group()
    fc1 = (2 * SIZES["moe_ffn"] // group.size(), SIZES["hidden"])
    fc2 = (SIZES["hidden"], SIZES["moe_ffn"] // group.size())
    for position, number in enumerate(moe_layer.local_expert_indices):
        weight1 = _shard(f"{prefix}{number}.linear_fc1.weight", fc1, group.rank(), group.size())
        weight2 = _shard(f"{prefix}{number}.linear_fc2.weight", fc2, group.rank(), group.size())
        if hasattr(experts, "local_experts"):
            experts.local_experts[position].linear_fc1.weight.copy_(weight1)
            experts.local_experts[position].linear_fc2.weight.copy_(weight2)
        elif hasattr(experts, "linear_fc1"):
            getattr(experts.linear_fc1, f"weight{position}").copy_(weight1)
            getattr(experts.linear_fc2, f"weight{position}").copy_(weight2)
        else:
            experts.weight1.view(num_local, SIZES["hidden"], -1)[position] = weight1.T
            experts.weight2.view(num_local, -1, SIZES["hidden"])[position] = weight2.T


def _shard(name: str, local_shape: Any, rank: int, size: int) -> Tensor:
    """Return a rank's part of the tensor that belongs to a global name."""
    split_by_rows = ("linear_qkv.weight", "linear_fc1.weight", "word_embeddings.weight", "output_layer.weight")
    dim = 0 if name.endswith(split_by_rows) else 1
    is_split = name.endswith((*split_by_rows, "linear_proj.weight", "linear_fc2.weight"))
    shape = list(local_shape)
    if is_split:
        shape[dim] *= size
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(shape, generator=generator, dtype=torch.float64)
    whole = whole / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.3 * whole
    if not is_split:
        return whole
    # A gated first projection has gate and up rows, and each rank has a part of both.
    halves = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)
    return torch.cat([half.chunk(size, dim)[rank] for half in halves], dim=0 if dim == 0 else 1)
