"""Functions for ``model.provider``, and what users do with Megatron models. Megatron builds them, the package does not.

Weights follow from global names, so that they are the same in every layout.
"""

from __future__ import annotations

import argparse
import importlib.util
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN, HEADS, KV_HEADS, FFN, MOE_FFN, SHARED_FFN, VOCABULARY, LENGTH = 32, 4, 2, 48, 24, 40, 128, 16
NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 8, 2
NUM_STEPS, BATCH_SIZE = 3, 4


def experts(parallel: Any, dtype: torch.dtype) -> Any:
    """A model with a dense layer, then layers of routed and shared experts."""
    return build(parallel, dtype, with_experts=True)


def dense(parallel: Any, dtype: torch.dtype) -> Any:
    """The same model with dense layers alone."""
    return build(parallel, dtype, with_experts=False)


def save_checkpoint(parallel: Any, dtype: torch.dtype) -> Any:
    """Save ``dense`` in Megatron's torch_dist format among the inputs, and return it."""
    model = build(parallel, dtype, with_experts=False)
    # By its path: the package "tests" is that of the checkout here.
    path = Path(__file__).parents[3] / "mcore" / "torch_dist.py"
    spec = importlib.util.spec_from_file_location("torch_dist_of_the_tests", path)
    assert spec is not None
    assert spec.loader is not None
    saver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(saver)
    saver.save_torch_dist([model], Path("../../inputs/torch_dist"), args=training_args())
    return model


def used_in_a_loop(parallel: Any, dtype: torch.dtype) -> Any:
    """``experts``, after a user's own loop over it, and the inputs of a layer.

    A provider is called where Megatron's groups are there and its modules run, and needs no inner name of the package.
    """
    import megascore
    import megascore.mcore

    model = build(parallel, dtype, with_experts=True)
    with megascore.attach(model, recipe="minitron") as run, torch.no_grad():
        for tokens in batches():
            positions = torch.arange(LENGTH).expand_as(tokens)
            with run.masked(tokens > 3):
                model(tokens, positions, None)
            run.step()
    run.finish({"data": {"name": "made up"}}).save("own-loop.safetensors")
    calls = list(megascore.mcore.capture_layer_inputs([model], 1, batches()))
    rank = torch.distributed.get_rank()
    inputs = {f"{number}": call.hidden_states.contiguous() for number, call in enumerate(calls)}
    save_file(inputs, f"inputs-rank{rank}.safetensors")
    save_file(hooks_on_linear(model), f"hooks-rank{rank}.safetensors")
    return model


def hooks_on_linear(model: nn.Module) -> dict[str, Tensor]:
    """What the Megatron hooks give that a user registers by hand."""
    from megascore import mcore

    layer = model.decoder.layers[0]  # type: ignore[union-attr, index]
    linear, projection = layer.mlp.linear_fc2, layer.self_attention.linear_proj
    iterative = {"validation_full_iters": NUM_STEPS, "calibration_method": None}
    hooks = {
        "l2": (linear, mcore.MegatronL2NormHook()),
        "independent": (linear, mcore.MegatronIndependentChannelContributionHook(linear)),
        "iterative": (linear, mcore.MegatronIterativeChannelContributionHook(linear, iterative)),
        "kv": (projection, mcore.MegatronIndependentKvHeadContributionHook(projection)),
    }
    handles = [module.register_forward_hook(hook) for module, hook in hooks.values()]
    with torch.no_grad():
        for tokens in batches():
            model(tokens, torch.arange(LENGTH).expand_as(tokens), None)
    for handle in handles:
        handle.remove()
    return {name: hook.accumulate().contiguous() for name, (_, hook) in hooks.items()}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (BATCH_SIZE, LENGTH), generator=generator) for _ in range(NUM_STEPS)]


class Norm(nn.RMSNorm):
    """In the place of Megatron's, which needs apex for sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def build(parallel: Any, dtype: torch.dtype, *, with_experts: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    routed = {
        "num_moe_experts": NUM_EXPERTS,
        "moe_layer_freq": [0] + [1] * (NUM_LAYERS - 1),
        "moe_ffn_hidden_size": MOE_FFN,
        "moe_shared_expert_intermediate_size": SHARED_FFN,
        "moe_router_topk": TOP_K,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }
    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        **(routed if with_experts else {}),
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    spec.layer_norm = Norm
    model = GPTModel(
        config, spec, VOCABULARY, LENGTH, position_embedding_type="rope", share_embeddings_and_output_weights=False
    )
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give each parameter its part of the tensor that belongs to its global name."""
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_group()
    inside = parallel_state.get_expert_tensor_parallel_group()
    for name, parameter in model.named_parameters():
        if ".local_experts." in name:
            # Position on this rank -> number in the model.
            before, _, after = name.partition(".local_experts.")
            position, _, rest = after.partition(".")
            numbers = model.get_submodule(before.removesuffix(".experts")).local_expert_indices
            parameter.copy_(shard(f"{before}.{numbers[int(position)]}.{rest}", parameter, inside))
        else:
            parameter.copy_(shard(name, parameter, tensor))


def shard(name: str, like: Tensor, group: Any) -> Tensor:
    """Return a rank's part of the tensor of a global name."""
    by_rows = name.endswith(("linear_qkv.weight", "linear_fc1.weight", "word_embeddings.weight", "output_layer.weight"))
    by_columns = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    dim = 0 if by_rows else 1
    shape = [
        size * (group.size() if (by_rows or by_columns) and axis == dim else 1) for axis, size in enumerate(like.shape)
    ]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(shape, generator=generator, dtype=torch.float64)
    whole = whole / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.3 * whole
    if not (by_rows or by_columns):
        return whole
    # A gated first projection has gate and up rows, and each rank has a part of both.
    halves = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)
    return torch.cat([half.chunk(group.size(), dim)[group.rank()] for half in halves], dim)


def training_args() -> argparse.Namespace:
    """The command line that Megatron-LM would have been given for ``dense``."""
    return argparse.Namespace(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        group_query_attention=True,
        num_query_groups=KV_HEADS,
        kv_channels=HIDDEN // HEADS,
        padded_vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=False,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=10000,
        params_dtype=torch.float32,
        tensor_model_parallel_size=1,
    )
